"""Covering arrays: few cases, in which any two values of any two factors meet."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]
TRIES = 30  # to complete a case that begins with two given values


def covering(
    factors: Mapping[str, Sequence[Any]], allowed: Callable[[Case], bool] = lambda case: True, seed: int = 0
) -> list[Case]:
    """Choose cases greedily until every two values of two factors are together in one of them.

    Args:
        factors: The values of each factor.
        allowed: Returns False for a case that cannot be. It is asked about parts of cases too, and has to return True
            for a part that can be completed.
        seed: Of the choices among values that are equally good.
    """
    chance = random.Random(seed)
    sizes = {name: range(len(values)) for name, values in factors.items()}
    missing = {
        frozenset({(a, i), (b, j)}): None
        for a, b in itertools.combinations(factors, 2)
        for i, j in itertools.product(sizes[a], sizes[b])
    }
    cases: list[Case] = []

    def can_be(chosen: dict[str, int]) -> bool:
        return allowed({name: factors[name][i] for name, i in chosen.items()})

    def completed(chosen: dict[str, int]) -> dict[str, int] | None:
        rest = [name for name in factors if name not in chosen]
        chance.shuffle(rest)
        for name in rest:
            possible = [i for i in sizes[name] if can_be({**chosen, name: i})]
            if not possible:
                return None
            chance.shuffle(possible)
            new = {i: sum(frozenset({(name, i), pair}) in missing for pair in chosen.items()) for i in possible}
            chosen = {**chosen, name: max(possible, key=new.__getitem__)}
        return chosen

    while missing:
        first = dict(next(iter(missing)))
        tries = (completed(first) for _ in range(TRIES if can_be(first) else 0))
        chosen = next((found for found in tries if found is not None), None)
        if chosen is None:  # these two cannot be together
            del missing[frozenset(first.items())]
            continue
        for pair in itertools.combinations(chosen.items(), 2):
            missing.pop(frozenset(pair), None)
        cases.append({name: factors[name][chosen[name]] for name in factors})
    return cases
