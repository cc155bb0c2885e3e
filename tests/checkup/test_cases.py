"""Cases of a check-up at full size: each runs what its name says, on the device, and in the order of their worth."""

import math
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from llmfast.checkup import behaviour, clock, further_losses, here, memory, numerics, several, speed, tuning
from llmfast.checkup.implementations import _IMPLEMENTATIONS
from llmfast.checkup.record import Case
from support.launched import unrecorded
from support.pretended_gpu import pretending_a_gpu

CPU = torch.device("cpu")
FULL, EIGHT_BIT = numerics.FULL, {"state_dtype": "8bit"}
Named = dict[str, tuple[Any, ...]]


def found(cases: list[Case]) -> Named:
    """Return the function of each case and its arguments, those by name last, by the case's name."""
    runs: dict[str, Any] = {case.name: case.run for case in cases if hasattr(case.run, "func")}
    return {name: (run.func, *run.args, *([run.keywords] if run.keywords else [])) for name, run in runs.items()}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def called(cls: type, options: dict[str, Any]) -> str:
    return f"{cls.__name__}({', '.join(f'{name}={value}' for name, value in options.items())})"


def test_numbers_are_those_of_each_loss_and_variant() -> None:
    cases = found(numerics.cases(CPU, "full"))
    dtypes = torch.float32, torch.bfloat16, torch.float16
    wanted: Named = {
        "cross_entropy, probabilities": (further_losses.of_probabilities,),
        "logprobs": (further_losses.of_ids,),
        "offsets above 2^31": (numerics.wide,),
    }
    for dtype in dtypes:
        for name in ("cross_entropy", "linear_cross_entropy"):
            for variant in numerics.VARIANTS:
                wanted[f"{name}, {variant}, {short(dtype)}"] = numerics.loss, name, variant, dtype
    wanted |= {f"rows, {layout}": (numerics.rows_in_layout, layout) for layout in numerics.LAYOUTS}
    wanted |= {f"linear_cross_entropy, {what}": (numerics.linear_in_mode, what) for what in numerics.LINEAR}
    wanted |= {f"mtp_cross_entropy, {heads}": (numerics.mtp, heads) for heads in ("own hidden states", "shared")}
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        wanted[f"linear_distillation, {kind}"] = further_losses.distilled, kind
    for i, (cls, options) in enumerate(numerics.OPTIMIZERS):  # the first also in the last of the dtypes
        for dtype in dtypes[: 2 if i else 3]:
            wanted[f"{called(cls, options)}, {short(dtype)}"] = numerics.optimizer, cls, options, dtype
    for cls, options in numerics.FORMATS:
        wanted[f"{called(cls, options)}, bfloat16"] = numerics.formats, cls, options
    assert cases == {name: (*run, CPU, FULL) for name, run in wanted.items()}
    small = found(numerics.cases(CPU, "small"))
    assert small.keys() < cases.keys() and {run[-1] for run in small.values()} == {numerics.SMALL}
    assert len({run[0] for run in small.values()}) == len({run[0] for run in cases.values()})


def test_what_only_a_gpu_has_is_tried_with_each_loss_and_optimizer() -> None:
    shapes = 256, 64, 5003
    losses = "cross_entropy", "linear_cross_entropy", "mtp_cross_entropy"
    wanted: Named = {
        "no step waits for the device": (behaviour.no_waits, CPU, shapes),
        "GradScaler": (behaviour.scaled, CPU),
        "CPU and GPU parameters in one optimizer, clipped": (behaviour.mixed_devices, CPU),
        "step in backward": (behaviour.in_backward, CPU),
        "gradients freed and made again": (behaviour.moving_gradients, CPU),
        "a learning rate on the device": (behaviour.lr_on_device, CPU),
        "another default device": (behaviour.default_device, CPU, shapes),
        "two streams": (behaviour.two_streams, CPU, shapes),
        "several GPUs": (several.findings, CPU),
    }
    for cls, options in behaviour.OPTIMIZERS:
        wanted[f"graph of {called(cls, options)}"] = behaviour.step_in_graph, cls, options, CPU
    wanted |= {f"graph of {name}": (behaviour.loss_in_graph, name, CPU, shapes) for name in losses}
    wanted |= {f"torch.compile of {name}": (behaviour.compiled_loss, name, CPU, shapes) for name in losses[:2]}
    assert found(behaviour.cases(CPU, "full")) == wanted


def test_rates_are_of_memory_and_matrices_beyond_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def noting(*given: Any) -> float:
        asked.append(given)
        return 1.0

    monkeypatch.setattr(clock, "copy_bandwidth", noting)
    monkeypatch.setattr(clock, "product_rate", noting)
    for case in here.cases(CPU, "full")[2:]:
        (finding,) = case.run()
        assert finding.figures["samples"] == 5 and "share_of_data_sheet" not in finding.figures
    dtypes = torch.bfloat16, torch.float16, torch.float32
    assert asked == [(1 << 30,)] * 5 + [(8192, dtype) for dtype in dtypes for _ in range(5)]


def test_tiles_are_those_of_the_kernel_that_is_timed() -> None:
    wanted: Named = {
        "AdamW, float32": (tuning.UPDATE, tuning.adamw, 1 << 28, torch.float32),
        "AdamW, bfloat16": (tuning.UPDATE, tuning.adamw, 1 << 28, torch.bfloat16),
        "AdamW, split8, 8-bit states": (
            *(tuning.PAIRED, tuning.adamw, 1 << 28, torch.bfloat16),
            EIGHT_BIT | {"master_weights": "split8"},
        ),
        "AdamW, 8-bit states": (tuning.PAIRED, tuning.adamw, 1 << 28, torch.bfloat16, EIGHT_BIT),
        "norm, float32": (tuning.NORM, tuning.norm, 1 << 28, torch.float32),
        "norm, bfloat16": (tuning.NORM, tuning.norm, 1 << 28, torch.bfloat16),
        "scale and cast": (tuning.SCALE, speed.scale_and_cast, 1 << 28),
    }
    of_rows = {
        **dict.fromkeys(("loss", "loss and gradient"), tuning.FEW_TERMS),
        **dict.fromkeys(("softcap, loss", "softcap, loss and gradient"), tuning.MANY_TERMS),
        "gradient later": tuning.BACKWARD,
    }
    for V in (128256, 32768, 256000):
        for what, choice in of_rows.items():
            wanted[f"{what}, N=4096 V={V}"] = choice, speed.row_kernel, what, 4096, V
    made = {
        name.removeprefix("tiles of "): (choice, *found([Case("", kernel)])[""])
        for name, (run, choice, kernel) in found(tuning.cases(CPU, "full")).items()
        if run is tuning.tiles
    }
    assert made == wanted


def made(case: Any) -> Callable[[], object]:
    run: Callable[[], object] = case.run.args[1]().run
    return run


def test_each_kernel_is_launched_with_the_tile_that_is_tried() -> None:
    with pretending_a_gpu(), unrecorded():
        for case in tuning.cases(torch.device("cuda", 0), "small"):
            choice = case.run.args[0]  # type: ignore[attr-defined]
            tuned, run = choice.found(choice.name), made(case)
            with mock.patch.object(choice.found(choice.kernel), "run") as launch:
                for tile in tuned.tiles:
                    with tuned.trying(tile):
                        run()
            blocks = [call.kwargs.get("BLOCK", call.kwargs.get("BLOCK_V")) for call in launch.call_args_list]
            wide = [tile.elements * tile.threads for tile in tuned.tiles]
            most = 4096 if "V=2100" in case.name else 1 << 16  # no row's block is twice as long as the row
            assert blocks == [min(block, most) for block in wide], case.name


def tensors(run: Any) -> int:
    """Return the bytes of a case's own tensors: inputs, gradients, and the states of all optimizers compared."""
    kind, args = run.func, run.args
    if kind in (memory.linear, memory.rows, numerics.wide):
        N, D, V = args[0] if kind is not numerics.wide else (args[1].wide[0], 0, args[1].wide[1])
        return 4 * (N * D + V * D if kind is memory.linear else N * V)
    if kind is speed.row_kernels:
        return 4 * args[0] * args[1]
    if kind is speed.row_kernel:
        return 4 * args[1] * args[2]
    if kind is speed.linear:  # logits and their gradient exist where nothing is fused
        _, N, D, V = args
        return 4 * (N * V + N * D + V * D)
    if kind is speed.one_optimizer:
        return 4 * torch.bfloat16.itemsize * sum(map(math.prod, args[0]))
    if kind is speed.adamw:
        others = [one for one in _IMPLEMENTATIONS["adamw"] if not re.search("8-bit|one by one", one.name)]
        assert {"llmfast", "torch fused", "apex"} < {one.name for one in others}
        return (2 + 2 * len(others)) * args[1].itemsize * sum(map(math.prod, args[0]))
    if kind is tuning.tiles:
        return tensors(args[1])
    if kind is tuning.adamw:
        return 4 * args[0] * (1 if run.keywords else args[1].itemsize)
    return 2 * args[0] if kind in (tuning.norm, speed.scale_and_cast) else 0


def test_a_case_asks_for_the_memory_that_its_tensors_take() -> None:
    """A case that asks for less would be begun where it fails."""
    taken: dict[str, int] = {}
    for section in (memory, numerics, speed, tuning):
        for case in section.cases(CPU, "full"):
            taken[case.name] = tensors(case.run)
            assert case.gpu_bytes >= taken[case.name], case.name
    assert sum(least > 1 << 30 for least in taken.values()) > 30
    assert taken["offsets above 2^31"] > 1 << 33 and taken["AdamW, 8B, bfloat16"] > 59 << 30
