"""Weights of the heads in the loss, as pure functions of the completed fraction of training.

All return K floats, of which head 0 (the next token) is first and always 1. `mtp_cross_entropy` takes them as a device
tensor, so that they can change every step without a recompile.
"""

from llmfast._checks import expect
from llmfast._kinds import expect_kinds, kind_of

_KINDS = {"K": kind_of(int), "fraction": kind_of(float), "weight": kind_of(float), "final": kind_of(float)}
SCHEDULES = ("constant", "linear", "staged")


def constant_weights(K: int, weight: float, *, mean: bool = False) -> list[float]:
    """Return 1 for the next token and `weight` for each of the others, or with `mean` for all of them together.

    Gloeckle 2024 uses weight = 1; DeepSeek-V3's lambda / D is weight = lambda with `mean`.
    """
    _check(K, weight=weight)
    return [1.0] + [weight / max(1, K - 1) if mean else weight] * (K - 1)


def linear_weights(fraction: float, K: int, weight: float, final: float, *, mean: bool = False) -> list[float]:
    """Return `constant_weights` with a weight that changes linearly from `weight` to `final` during the run."""
    _check(K, fraction=fraction, weight=weight, final=final)
    return constant_weights(K, weight + fraction * (final - weight), mean=mean)


def staged_weights(fraction: float, K: int, weight: float = 0.5) -> list[float]:
    """Return weight**k, and fade out one head after another, the furthest first, until only the next token remains.

    There are K stages of equal length. In each but the last, the furthest remaining head goes linearly to 0; in the
    last only head 0 is left. For K = 3 and weight = 0.5, as in modded-nanogpt: [1, .5, .25 -> 0], [1, .5 -> 0, 0], [1,
    0, 0].
    """
    _check(K, fraction=fraction, weight=weight)
    place = fraction * K
    stage = min(int(place), K - 1)
    last = K - 1 - stage  # the furthest remaining head
    weights = [weight**k if k <= last else 0.0 for k in range(K)]
    if last > 0:
        weights[last] *= 1.0 - (place - stage)
    return weights


def head_weights(
    fraction: float,  # completed fraction of training, in [0, 1]
    K: int,
    *,
    schedule: str,  # "constant", "linear" or "staged"
    weight: float,
    final: float = 0.0,  # for "linear"
    mean: bool = False,  # not for "staged"
) -> list[float]:
    """Return the weights of the named schedule."""
    expect(schedule in SCHEDULES, f"schedule must be one of {str(SCHEDULES)[1:-1]}; got {schedule!r}")
    _check(K, fraction=fraction)
    if schedule == "constant":
        return constant_weights(K, weight, mean=mean)
    if schedule == "linear":
        return linear_weights(fraction, K, weight, final, mean=mean)
    return staged_weights(fraction, K, weight)


def _check(K: int, *, fraction: float = 0.0, weight: float = 0.0, final: float = 0.0) -> None:
    expect_kinds(_KINDS, {"K": K, "fraction": fraction, "weight": weight, "final": final})
    expect(K >= 1, f"K must be at least 1; got {K}")
    expect(0 <= fraction <= 1, f"fraction must be in [0, 1]; got {fraction}")
    for name, value in (("weight", weight), ("final", final)):
        expect(value >= 0, f"{name} must not be negative; got {value}")
