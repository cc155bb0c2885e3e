"""How much each head counts in the loss, as pure functions of the share of training that is done.

All return K floats, head 0 (the next token) first and always 1. `mtp_cross_entropy` takes them as a device tensor, so
that they can change every step without a recompile.
"""

from llmfast._checks import expect

SCHEDULES = ("constant", "linear", "staged")


def constant_weights(K: int, weight: float, *, mean: bool = False) -> list[float]:
    """1 for the next token, `weight` for each of the others, or with `mean` for all of them together.

    Gloeckle 2024 is weight = 1; DeepSeek-V3's lambda / D is weight = lambda with `mean`.
    """
    _check(K, weight=weight)
    return [1.0] + [weight / max(1, K - 1) if mean else weight] * (K - 1)


def linear_weights(fraction: float, K: int, weight: float, final: float, *, mean: bool = False) -> list[float]:
    """As `constant_weights`, going from `weight` at the start to `final` at the end."""
    _check(K, fraction=fraction, weight=weight, final=final)
    return constant_weights(K, weight + fraction * (final - weight), mean=mean)


def staged_weights(fraction: float, K: int, weight: float = 0.5) -> list[float]:
    """weight**k, and one head after the other fades out, the furthest first: training ends on the next token alone.

    K stages of equal length. In each the furthest head left goes linearly to 0, except for the last, where there is
    only head 0. For K = 3 and weight = 0.5, as modded-nanogpt has it: [1, .5, .25 -> 0], [1, .5 -> 0, 0], [1, 0, 0].
    """
    _check(K, fraction=fraction, weight=weight)
    place = fraction * K
    stage = min(int(place), K - 1)
    last = K - 1 - stage  # the furthest head left
    weights = [weight**k if k <= last else 0.0 for k in range(K)]
    if last > 0:
        weights[last] *= 1.0 - (place - stage)
    return weights


def head_weights(
    fraction: float,  # of training, in [0, 1]
    K: int,
    *,
    schedule: str,  # "constant", "linear" or "staged"
    weight: float,
    final: float = 0.0,  # of "linear"
    mean: bool = False,  # not of "staged"
) -> list[float]:
    """The schedule of that name."""
    expect(schedule in SCHEDULES, f"schedule must be one of {str(SCHEDULES)[1:-1]}; got {schedule!r}")
    _check(K, fraction=fraction)
    if schedule == "constant":
        return constant_weights(K, weight, mean=mean)
    if schedule == "linear":
        return linear_weights(fraction, K, weight, final, mean=mean)
    return staged_weights(fraction, K, weight)


def _check(K: int, *, fraction: float = 0.0, weight: float = 0.0, final: float = 0.0) -> None:
    expect(K >= 1, f"K must be at least 1; got {K}")
    expect(0 <= fraction <= 1, f"fraction must be in [0, 1]; got {fraction}")
    for name, value in (("weight", weight), ("final", final)):
        expect(value >= 0, f"{name} must not be negative; got {value}")
