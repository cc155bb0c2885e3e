"""Sizes that the benchmarks time and count, which are those that their names say; and what pictures of them show."""

import math
import re
from collections import Counter
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks import report, test_counted, test_data, test_losses, test_optimizers
from llmfast.checkup.shapes import HEADS, MODELS, PARAMETERS
from llmfast.models import Decoder
from llmfast.plan import model_config
from llmfast.train.config import Config

H100 = report.H100.name
LLAMA = {"N": 16384, "D": 4096, "V": 128256}


@pytest.mark.parametrize("name", test_optimizers.MODELS)
def test_a_model_has_the_parameters_and_tensors_of_its_name(name: str) -> None:
    shapes = [*test_optimizers.MODELS[name]]
    found = re.fullmatch(r"(?:demo, )?(\d+)M(?: in (\d+))?", name)
    assert found and int(found[1]) == round(sum(map(math.prod, shapes)) / 1e6)
    assert found[2] is None or int(found[2]) == len(shapes)


def test_the_demo_is_that_of_make_train() -> None:
    config = model_config(Config())
    (shapes,) = (found for name, found in test_optimizers.MODELS.items() if name.startswith("demo"))
    assert Counter(shapes) == Counter(tuple(p.shape) for p in Decoder(config).parameters())
    assert test_losses.LINEAR["demo"][1:] == (config.width, config.vocab_size)
    assert test_losses.ROWS["demo"][1] == config.vocab_size


def test_vocabularies_are_those_of_their_models() -> None:
    for model in ("GPT-2", "Llama-3"):
        V = MODELS[model][1]
        assert test_losses.LINEAR[f"{model}'s V"][2] == test_losses.ROWS[f"{model}'s V"][1] == V
    assert report.SHOWN == LLAMA
    assert report.HEADLINE == {
        "Llama-3, 16k": LLAMA,
        "Llama-3, 8k": LLAMA | {"N": 8192},
        "Gemma-2, 16k": {"N": 16384, "D": 2304, "V": 256000},
        "Qwen-3, 16k": {"N": 16384, "D": 2560, "V": 151936},
    }
    assert HEADS == [{"K": 4, "N": 8192, "D": 4096, "V": 128256}, {"K": 4, "N": 8192, "D": 7168, "V": 129280}]


def test_each_way_is_counted_at_every_size() -> None:
    """Vary N for each model, and V where the rest is Llama-3's."""
    ours = [job.size for job in test_counted.LINEAR if job.way == "llmfast"]
    wanted = [{"N": N, "D": D, "V": V} for D, V in MODELS.values() for N in (1024, 8192, 16384, 65536)]
    assert ours == wanted + [LLAMA | {"V": V} for V in (8192, 32768, 262144)]
    for operation in ("linear_logprobs", "linear_distillation"):
        others = [job.size for job in test_counted.OTHERS if (job.operation, job.way) == (operation, "llmfast")]
        assert others == [size | {"N": 8192} for name, size in report.HEADLINE.items() if "8k" not in name]
    steps = [(job.dtype, job.size["parameters"]) for job in test_counted.ADAMW if job.way == "llmfast"]
    assert steps == [(dtype, size) for dtype in ("float32", "bfloat16") for size in PARAMETERS]
    assert all(job.dry for job in [*test_counted.LINEAR, *test_counted.MTP, *test_counted.OTHERS, *test_counted.ADAMW])
    assert not any(job.dry for job in test_counted.COMPARED)


@pytest.mark.parametrize(("what", "shape"), [("batches", "0.8 M tokens"), ("packing", "4.2 M tokens")])
def test_times_of_data_say_of_how_many_tokens_they_are(what: str, shape: str) -> None:
    rows: list[Any] = []
    timing = test_data.Timing(2.0, 0.5, 0.25)
    test_data.record(lambda section, **fields: rows.append((section, fields)), {"ours": timing}, what)
    assert rows == [
        (
            "clock",
            {"operation": what, "shape": shape, "way": "ours", "seconds": 2.0, "ratio": 0.5, "spread": 0.25},
        )
    ]
    tokens = {"batches": 100 * 8 * 1024, "packing": 4096 * 1024}[what]
    assert shape == f"{tokens / 1e6:.1f} M tokens"


def rows() -> list[dict[str, Any]]:
    """Return rows of two ways around Llama-3's size: 7 ps per logit and way, and a GiB per 1024 rows."""
    found = []
    for number, way in enumerate(("llmfast", "other"), 1):
        sizes = [LLAMA, LLAMA | {"N": 1024}, LLAMA | {"V": 8192}, {"N": 1024, "D": 768, "V": 50257}]
        for size in sizes:
            seconds = {H100: 7e-12 * number * size["N"] * size["V"], "B200": 1e9}
            found.append({"way": way, "size": size, "seconds": seconds, "peak_bytes": number * size["N"] << 20})
    return found


def lines(axes: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [*zip(*line.get_data())] for line in axes.get_lines()}


def test_a_picture_of_times_varies_one_size_at_a_time() -> None:
    figure = Figure()
    report.draw_time(figure, rows(), ["llmfast", "other"])
    by_rows, by_classes = figure.axes
    for axes, at in ((by_rows, (1024, 16384)), (by_classes, (8192, 128256))):
        shown = lines(axes)
        for number, way in enumerate(("llmfast", "other"), 1):
            assert shown[way] == [pytest.approx((x, 7.0 * number)) for x in at]
    assert (by_rows.get_xlabel(), by_classes.get_xlabel()) == ("tokens N", "vocabulary V")
    assert by_rows.get_ylabel() == f"ps per logit, modelled on an {H100}"
    assert (by_rows.get_title(), by_classes.get_title()) == ("D = 4096, V = 128256", "N = 16384, D = 4096")
    assert [line.get_linewidth() for line in by_rows.get_lines()] == [2.2, 1.0]


def test_a_picture_of_memory_is_in_gib() -> None:
    figure = Figure()
    report.draw_memory(figure, rows(), ["llmfast", "other"])
    (axes,) = figure.axes
    assert lines(axes) == {"llmfast": [(1024, 1.0), (16384, 16.0)], "other": [(1024, 2.0), (16384, 32.0)]}
    assert axes.get_ylabel().endswith("GiB") and axes.get_title() == "Memory: D = 4096, V = 128256, counted"
    text = axes.xaxis.get_major_formatter()
    assert [text(value, 0) for value in (512, 1024, 65536)] == ["512", "1k", "64k"]


def test_a_picture_of_optimizers_has_a_half_per_dtype() -> None:
    figure = Figure()
    numel = 8_030_261_248
    given = [
        {"way": way, "dtype": dtype, "size": {"parameters": "8B"}, "dram": numel * value}
        for dtype, values in (("float32", (28.0, 32.5)), ("bfloat16", (14.0, 16.5)))
        for way, value in zip(("llmfast", "other"), values)
    ]
    report.draw_optimizers(figure, given)
    for axes, dtype, values in zip(figure.axes, ("float32", "bfloat16"), ((28.0, 32.5), (14.0, 16.5))):
        assert [bar.get_width() for bar in axes.patches] == [*values]
        assert [text.get_text() for text in axes.texts] == [f" {value}" for value in values]
        assert axes.get_title() == f"parameters and gradients in {dtype}"
        assert axes.patches[0].get_facecolor() != axes.patches[1].get_facecolor()
