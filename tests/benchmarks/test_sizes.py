"""Sizes that the benchmarks time and count, which are those that their names say."""

import math
import re
from collections import Counter
from typing import Any

import pytest

from benchmarks import report, test_counted, test_data, test_losses, test_optimizers
from llmfast.checkup.shapes import HEADS, MODELS, PARAMETERS
from llmfast.models import Decoder
from llmfast.plan import model_config
from llmfast.train.config import Config

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
