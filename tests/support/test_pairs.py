"""Every two values that can be together are together in a case."""

import itertools

from support.pairs import Case, covering

FACTORS = {"a": [1, 2, 3], "b": ["x", "y"], "c": [None, 0.5, 0.25, 1.0], "d": [False, True]}


def pairs(cases: list[Case]) -> set[tuple[str, object, str, object]]:
    return {(m, case[m], n, case[n]) for case in cases for m, n in itertools.combinations(FACTORS, 2)}


def test_every_pair_is_in_a_case() -> None:
    cases = covering(FACTORS)
    wanted = [
        (m, x, n, y)
        for m, n in itertools.combinations(FACTORS, 2)
        for x, y in itertools.product(FACTORS[m], FACTORS[n])
    ]
    assert pairs(cases) == set(wanted)
    assert 12 <= len(cases) <= 16
    assert all(case.keys() == FACTORS.keys() for case in cases)
    assert cases == covering(FACTORS)


def test_what_cannot_be_is_in_none() -> None:
    def allowed(case: Case) -> bool:
        return not (case.get("a") == 3 and case.get("b") == "y") and not (case.get("d") and case.get("c") is None)

    found = pairs(covering(FACTORS, allowed))
    assert pairs(covering(FACTORS)) - found == {("a", 3, "b", "y"), ("c", None, "d", True)}


def test_a_value_that_no_case_can_have_is_left_out() -> None:
    cases = covering(FACTORS, lambda case: case.get("a") != 2)
    assert {case["a"] for case in cases} == {1, 3}
