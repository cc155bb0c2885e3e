"""Counting by worker processes, and the peers' ways on inputs small enough to check."""

import math

import pytest

from benchmarks.counted import Job, count
from llmfast.checkup.implementations import implementations, versions
from llmfast.checkup.shapes import PARAMETERS

SIZE = {"N": 32, "D": 32, "V": 500}


@pytest.fixture(scope="module")
def results() -> dict[tuple[str, str, bool], object]:
    """Count all installed implementations, computed and dry; keyed by operation, way and dryness."""
    jobs = [
        Job("linear_cross_entropy", way, SIZE, dry=dry)
        for way in implementations("linear_cross_entropy", "counted")
        for dry in (False, True)
    ]
    jobs += [
        Job("cross_entropy", way, {"N": 32, "V": 500}, dry=dry)
        for way in implementations("cross_entropy", "counted")
        for dry in (False, True)
    ]
    jobs += [Job("adamw", "llmfast", {"parameters": "124M"}), Job("adamw", "torch fused", {"parameters": "124M"})]
    return {(r.job.operation, r.job.way, r.job.dry): r for r in count(jobs)}


def test_every_way_computes_the_loss_and_its_gradients(results) -> None:
    computed = [r for (operation, _, dry), r in results.items() if operation != "adamw" and not dry]
    assert {"llmfast", "torch"} <= {r.job.way for r in computed}
    for result in computed:
        assert set(result.errors) >= {"loss"} and all(error < 0.05 for error in result.errors.values()), result
        assert result.seconds["H100 SXM"] > 0 and result.calls > 0


def test_dry_counts_are_the_same(results) -> None:
    for (operation, way, dry), result in results.items():
        if not dry and operation != "adamw":
            other = results[operation, way, True]
            assert result.dram == pytest.approx(other.dram, rel=0.01), (operation, way)
            assert result.dot_flops == other.dot_flops, (operation, way)
            assert other.errors == {}


def test_ours_is_counted_with_its_launches(results) -> None:
    linear = results["linear_cross_entropy", "llmfast", False]
    assert linear.dot_flops == 6 * math.prod(SIZE.values()) and linear.syncs == 0
    assert {"cross_entropy_kernel", "cross_entropy_backward_kernel"} <= {kind.name for kind in linear.kinds}
    assert linear.by_name.keys() >= {"mm", "cross_entropy_kernel", "cross_entropy_backward_kernel"}
    in_place = results["cross_entropy", "llmfast in place", False]
    assert 4 <= in_place.dram / (32 * 500) < 4.2  # a read and a write; the copy that stands for a layer does not count


def test_adamw(results) -> None:
    numel = sum(math.prod(shape) for shape in PARAMETERS["124M"])
    assert numel == 124_439_808
    for way in ("llmfast", "torch fused"):
        assert results["adamw", way, True].dram / numel == pytest.approx(14, rel=0.01)


def test_parameter_counts() -> None:
    numel = {name: sum(math.prod(shape) for shape in shapes) for name, shapes in PARAMETERS.items()}
    assert {name: round(n / 1e9, 2) for name, n in numel.items()} == {"124M": 0.12, "1B": 1.24, "8B": 8.03}


def test_a_job_that_fails_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)Job\(.*way='nobody'.*KeyError: 'nobody'"):
        count([Job("cross_entropy", "nobody", {"N": 1, "V": 1})])


def test_ways_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "llmfast.checkup.implementations.find_spec", lambda name: None if name == "liger_kernel" else object()
    )
    names = list(implementations("linear_cross_entropy", "counted"))
    assert names[0] == "llmfast" and not any("Liger" in name for name in names)
    assert "apex" in implementations("adamw", "gpu") and "apex" not in implementations("adamw", "counted")


def test_versions_are_those_installed() -> None:
    assert {"torch", "triton", "llmfast-torch"} <= versions().keys()
