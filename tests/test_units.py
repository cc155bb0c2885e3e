"""Numbers as people read them, on both sides of each unit's bound."""

import pytest

from llmfast._units import duration, in_bytes, parse_bytes, short


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 * 1024, "1.5 MiB"),
        (1024**2 - 1024, "1023.0 KiB"),
        (1024**2, "1.0 MiB"),
        (1024**3 - 1024**2, "1023.0 MiB"),
        (1024**3, "1.00 GiB"),
        (24 * 1024**3, "24.00 GiB"),
        (80e9, "74.51 GiB"),
        (2048 * 1024**3, "2048.00 GiB"),
    ],
)
def test_bytes_in_the_largest_unit_that_they_fill(n: float, text: str) -> None:
    assert in_bytes(n) == text


@pytest.mark.parametrize("unit", ["k", "M", "G", "T"])
def test_units_with_an_i_are_of_1024(unit: str) -> None:
    power = "kMGT".index(unit) + 1
    for text in (f"3{unit}", f"3{unit}B", f" 3 {unit.lower()}b "):
        assert parse_bytes(text) == 3 * 1000**power
    for text in (f"1.5{unit}i", f"1.5 {unit}iB"):
        assert parse_bytes(text) == 1536 * 1024 ** (power - 1)
    assert in_bytes(parse_bytes("1.5GiB")) == "1.50 GiB"


@pytest.mark.parametrize(
    ("x", "text"),
    [(999, "999"), (999.4, "999"), (999.5, "1.00 k"), (4_030_000, "4.03 M"), (2.8e9, "2.80 B"), (1e12, "1.00 T")],
)
def test_three_digits_and_a_unit(x: float, text: str) -> None:
    assert short(x) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12.3 ms"),
        (0.9996, "1e+03 ms"),
        (1, "1 s"),
        (119, "119 s"),
        (120, "2 minutes"),
        (7199, "120 minutes"),
        (7200, "2 hours"),
        (172_799, "48 hours"),
        (172_800, "2 days"),
    ],
)
def test_a_time_in_the_largest_unit_of_which_there_are_two(seconds: float, text: str) -> None:
    assert duration(seconds) == text
