"""The order of training sequences: shares, epochs, and that nothing but (seed, i) decides it."""

import json
import math
import time
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfast.data.mixture import Curve, Mixture, continued_weights, permutation

ROWS = {"general": 500, "code": 90, "maths": 7}
WEIGHTS = {"general": "0.9->0.3", "code": "0.1->0.6", "maths": "0:0, 0.5:0, 1:0.1"}


def mixture(total: int = 20_000, weights: Any = WEIGHTS, seed: int = 3) -> Mixture:
    return Mixture(ROWS, weights, total=total, seed=seed)


def test_shares_follow_the_weights_in_every_window() -> None:
    total, width = 100_000, 5000
    source, _ = mixture(total).sequences(0, total)
    for first in range(0, total, width):
        progress = (first + np.arange(width)) / total
        weights = np.stack([Curve.parse(WEIGHTS[name])(progress) for name in ROWS])
        shares = weights / weights.sum(0)
        for d in range(len(ROWS)):
            sigma = math.sqrt((shares[d] * (1 - shares[d])).sum())
            found = np.count_nonzero(source[first : first + width] == d)
            assert abs(found - shares[d].sum()) <= min(3 * sigma, 10), (first, d)


@given(st.lists(st.integers(0, 2000), min_size=1, max_size=12))
def test_the_order_does_not_depend_on_how_it_is_read(cuts: list[int]) -> None:
    """Ranks, workers, micro-batches and resuming therefore do not change it."""
    whole = np.stack(mixture().sequences(0, 2000))
    asked = mixture()
    for start, stop in pairwise(cuts):
        start, stop = min(start, stop), max(start, stop)
        assert np.array_equal(np.stack(asked.sequences(start, stop)), whole[:, start:stop])
        assert list(asked.counts(stop).values()) == np.bincount(whole[0, :stop], minlength=3).tolist()


@pytest.mark.parametrize("world", [2, 3, 8, 64])
def test_each_rank_alone_gets_its_shares_too(world: int) -> None:
    source, _ = mixture(weights={"general": 0.5, "code": 0.4, "maths": 0.1}).sequences(0, 20_000)
    for rank in range(world):
        mine = source[rank::world]
        for d, share in enumerate((0.5, 0.4, 0.1)):
            assert abs(np.count_nonzero(mine == d) - share * len(mine)) <= 10


def test_ranks_and_steps_of_any_number_read_the_same_sequences() -> None:
    whole = np.stack(mixture().sequences(0, 960))
    for world, batch in ((1, 32), (2, 8), (3, 4), (4, 60)):
        ranks = [mixture() for _ in range(world)]
        found = np.empty_like(whole)
        for first in range(0, 960, world * batch):
            for rank, mine in enumerate(ranks):
                start = first + rank * batch
                found[:, start : start + batch] = mine.sequences(start, start + batch)
        assert np.array_equal(found, whole)


def test_every_row_comes_once_before_any_comes_twice() -> None:
    source, row = mixture().sequences(0, 20_000)
    orders = set()
    for d, rows in enumerate(ROWS.values()):
        mine = row[source == d]
        for epoch in range(len(mine) // rows):
            order = mine[epoch * rows : (epoch + 1) * rows]
            assert np.array_equal(np.sort(order), np.arange(rows))
            orders.add(tuple(order))
    assert len(orders) == sum(np.count_nonzero(source == d) // rows for d, rows in enumerate(ROWS.values()))


def test_without_weights_rows_count() -> None:
    counts = mixture(59_700, {}).counts(59_700)
    assert all(abs(counts[name] - 100 * rows) <= 5 for name, rows in ROWS.items())


def test_the_rest_is_what_others_leave() -> None:
    made = mixture(weights={"general": "rest", "code": "0.1->0.7", "maths": "rest"})
    for progress in (0.0, 0.5, 1.0):
        shares = made.shares(progress)
        assert shares["code"] == pytest.approx(0.1 + 0.6 * progress)
        assert shares["general"] / shares["maths"] == pytest.approx(500 / 7)
        assert sum(shares.values()) == pytest.approx(1)


def test_a_source_without_a_share_never_comes() -> None:
    for weights in ({"general": 0, "code": 1, "maths": 0}, {"general": 1, "code": 0, "maths": "0:0, 0.5:0, 1:1"}):
        source, _ = mixture(10_000, weights).sequences(0, 5000)
        assert len(set(source.tolist())) == 1
    assert Mixture({"seen": 10, "empty": 0}, {"seen": 1, "empty": 0}, total=50).counts(50) == {"seen": 50, "empty": 0}


@pytest.mark.parametrize("consumed", [0, 1, 7001, 19_999])
def test_editing_the_future_leaves_the_past_alone(consumed: int) -> None:
    before = mixture()
    was = np.stack(before.sequences(0, 20_000))
    state = json.loads(json.dumps(before.state()))  # as a checkpoint would keep it
    edited = mixture(30_000, {"general": 0.2, "code": 0.2, "maths": 0.6}).resumed(state, consumed)
    now = np.stack(edited.sequences(0, 30_000))
    assert np.array_equal(now[:, :consumed], was[:, :consumed])
    share = np.mean(now[0, consumed:] == 2)
    assert share == pytest.approx(0.6, abs=0.02)
    # Nothing is lost or comes twice at the seam either.
    for d, rows in enumerate(ROWS.values()):
        mine = now[1][now[0] == d]
        whole = mine[: len(mine) // rows * rows].reshape(-1, rows)
        assert np.array_equal(np.sort(whole, axis=1), np.broadcast_to(np.arange(rows), whole.shape))
    again = mixture().resumed(json.loads(json.dumps(edited.state())), min(consumed + 100, 30_000))
    stop = consumed + 100
    assert np.array_equal(np.stack(again.sequences(0, stop)), now[:, :stop])


@pytest.mark.parametrize("consumed", [0, 5000])
def test_shares_are_those_of_the_weights_in_force(consumed: int) -> None:
    """Earlier weights do not matter; the table shows both."""
    new = {"general": 0.2, "code": "0.5->0.1", "maths": "rest"}
    made = mixture(30_000, new)
    edited = made.resumed(mixture().state(), consumed)
    for progress in (0.0, 0.5, 1.0):
        assert edited.shares(progress) == made.shares(progress) != mixture().shares(progress)
    _, *lines = edited.table()
    first = [f"{x:.0%}" for x in (mixture() if consumed else made).shares(0.0).values()]
    last = [f"{x:.0%}" for x in made.shares(1.0).values()]
    assert [line[2] for line in lines] == [a if a == b else f"{a} -> {b}" for a, b in zip(first, last)]


@pytest.mark.parametrize("total", [15_000, 40_000])
def test_resuming_with_another_total_moves_the_points_of_the_weights(total: int) -> None:
    """Let them end at the new total, with the shares that a new mixture of that length ends with."""
    resumed, new = mixture(total).resumed(mixture(20_000).state(), 5000), mixture(total)
    window = 2000
    for stop in (total // 2, total):
        shares = [
            np.bincount(one.sequences(stop - window, stop)[0], minlength=len(ROWS)) / window for one in (resumed, new)
        ]
        assert shares[0] == pytest.approx(shares[1], abs=0.02), stop


def test_resuming_with_the_same_weights_changes_nothing() -> None:
    whole = np.stack(mixture().sequences(0, 20_000))
    resumed = mixture().resumed(mixture().state(), 5000)
    assert len(resumed.phases) == 1
    assert np.array_equal(np.stack(resumed.sequences(0, 20_000)), whole)


@pytest.mark.parametrize("consumed", [1, 700, 5000])
def test_a_resumed_mixture_keeps_its_seed(consumed: int) -> None:
    """Read the rest of an epoch by the seed that began it, for past and future sequences."""
    whole = np.stack(mixture(seed=3).sequences(0, 9000))
    resumed = mixture(seed=4).resumed(mixture(seed=3).state(), consumed)
    assert resumed.seed == 3 and resumed.state()["seed"] == 3
    assert np.array_equal(np.stack(resumed.sequences(0, 9000)), whole)
    assert not np.array_equal(np.stack(mixture(seed=4).sequences(0, consumed)), whole[:, :consumed])


def test_the_same_sources_in_another_order_are_refused() -> None:
    """Batches refer to sources by number, so another order would read the wrong ones."""
    turned = Mixture(dict(reversed(ROWS.items())), WEIGHTS, total=20_000)
    with pytest.raises(ValueError, match="rows have changed: they were"):
        turned.resumed(mixture().state(), 100)


def test_other_sources_are_refused() -> None:
    other = Mixture({**ROWS, "code": 91}, WEIGHTS, total=20_000)
    with pytest.raises(ValueError, match=r"rows have changed: they were .*'code': 90.* and are .*'code': 91"):
        other.resumed(mixture().state(), 100)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"general": 1, "code": 1}, "source 'maths' needs a weight: 0 to only validate, 'rest'"),
        ({"general": 1, "cod": 1, "maths": 1}, "no source 'cod' to give a weight; did you mean code?"),
        ({"general": -1, "code": 1, "maths": 1}, "weights must be finite and not negative; got -1"),
        ({"general": "nan", "code": 1, "maths": 1}, "weights must be finite and not negative; got 'nan'"),
        ({"general": "a lot", "code": 1, "maths": 1}, "a weight must be written like 0.3, .* got 'a lot'"),
        ({"general": "0.1,0.2", "code": 1, "maths": 1}, "a weight must be written like"),
        ({"general": "0:1, 0:2", "code": 1, "maths": 1}, "points must ascend; got '0:1, 0:2'"),
        ({"general": "0:1, 2:2", "code": 1, "maths": 1}, "points must be shares of the run, 0 to 1"),
        (
            {"general": "rest", "code": 0.7, "maths": "0->0.4"},
            "in addition to 'rest', weights must not sum to more than 1",
        ),
        ({"general": "1->0", "code": 0, "maths": 0}, "at every point of the run some source must have a weight"),
    ],
)
def test_wrong_weights_are_named(weights: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture(weights=weights)


@pytest.mark.parametrize("where", ["0", "0.3", "0.5", "1"])
@pytest.mark.parametrize(
    ("usual", "once", "others", "message"),
    [
        (0.2, 0.8, {"code": 0.5, "maths": 0.0, "none": 0.0}, "weights must not sum to more than 1; got 1.3"),
        (0.5, 0.0, {"code": 0.0, "maths": 0.0, "none": 0.0, "general": 0.0}, "some source must have a weight"),
        (0.0, 0.1, {"code": 0.5, "maths": 0.1}, "source 'none' has a weight but no rows"),
    ],
)
def test_a_wrong_weight_at_a_single_point_of_the_run_is_named(
    where: str, usual: float, once: float, others: dict[str, Any], message: str
) -> None:
    points = {"0": usual, "0.2": usual, "0.4": usual, "0.6": usual, "1": usual, where: once}
    curve = ", ".join(f"{at}:{points[at]}" for at in sorted(points, key=float))
    changing = "none" if "none" not in others else "maths"
    weights: dict[str, Any] = {"general": "rest", **others, changing: curve}
    with pytest.raises(ValueError, match=message):
        Mixture({**ROWS, "none": 0}, weights, total=100)
    Mixture({**ROWS, "none": 0}, weights | {changing: usual}, total=100)


def test_a_run_has_sequences_and_sources() -> None:
    assert sum(mixture(total=1).counts(1).values()) == 1
    with pytest.raises(ValueError, match="total must be positive; got 0"):
        mixture(total=0)
    with pytest.raises(ValueError, match="seed must not be negative; got -1"):
        mixture(seed=-1)
    with pytest.raises(ValueError, match="a mixture needs at least one source"):
        Mixture({}, {}, total=1)


def test_a_source_that_is_drawn_needs_rows() -> None:
    with pytest.raises(ValueError, match="source 'empty' has a weight but no rows"):
        Mixture({"seen": 10, "empty": 0}, {"seen": 1, "empty": "0->1"}, total=50)


def test_seeds_and_sources_have_orders_of_their_own() -> None:
    one, two = (np.stack(mixture(seed=s).sequences(0, 500)) for s in (0, 1))
    assert not np.array_equal(one[0], two[0]) and not np.array_equal(one[1], two[1])
    same = Mixture({"a": 50, "b": 50}, {}, total=1000)
    source, row = same.sequences(0, 1000)
    assert not np.array_equal(row[source == 0][:50], row[source == 1][:50])


def test_names_have_no_part_in_the_order() -> None:
    """Text that is moved is read in the same order: a source without a name is called by its path."""
    here, there = (Mixture({f"{place}/a": 50, f"{place}/b": 50}, {}, total=300, seed=1) for place in ("x", "y/z"))
    assert np.array_equal(np.stack(here.sequences(0, 300)), np.stack(there.sequences(0, 300)))


def test_checkpoints_of_earlier_versions_keep_their_order_by_name() -> None:
    state = mixture().state()
    assert not state.pop("by_name")
    resumed = mixture().resumed(state, 5000)
    assert resumed.state()["by_name"] and resumed.resumed(resumed.state(), 6000).state()["by_name"]
    source, row = resumed.sequences(0, 20_000)
    first = row[source == list(ROWS).index("code")][:90]
    assert np.array_equal(first, permutation(90, 3, 0, *b"code"))


def test_permutations_are_even() -> None:
    """Check that each row is equally frequent at each place, and that the stream never changes."""
    counts = np.zeros((10, 10))
    for epoch in range(2000):
        counts[np.arange(10), permutation(10, 0, epoch)] += 1
    chi2 = ((counts - 200) ** 2 / 200).sum()
    assert chi2 < 81 + 4 * math.sqrt(2 * 81)
    assert permutation(6, 1, 2).tolist() == [1, 3, 0, 4, 2, 5]
    assert permutation(0, 1).tolist() == []


def test_ten_million_sequences_are_planned_in_two_seconds() -> None:
    rows = {"a": 1_000_000, "b": 2_500_000, "c": 300_000}
    made = Mixture(rows, {"a": "0.9->0.3", "b": "0.1->0.6", "c": "0->0.1"}, total=10_000_000)
    start = time.process_time()
    counts = made.counts(10_000_000)
    assert time.process_time() - start < 2
    assert sum(counts.values()) == 10_000_000


def test_the_table_shows_shares_and_epochs() -> None:
    head, general, code, maths = mixture().table()
    assert head == ("source", "rows", "share", "rows read", "epochs")
    counts = mixture().counts(20_000)
    assert general == ("general", "500", "90% -> 30%", f"{counts['general']:,}", f"{counts['general'] / 500:.2f}")
    assert code[2] == "10% -> 60%" and maths[2] == "0% -> 10%"


def test_continued_pretraining_keeps_a_floor_of_what_was_before() -> None:
    made = Mixture(
        {"general": 500, "books": 100, "code": 90}, continued_weights(["code"], ["general", "books"]), total=9
    )
    assert made.shares(0.0) == pytest.approx({"general": 0.75, "books": 0.15, "code": 0.1})
    assert made.shares(1.0)["code"] == pytest.approx(0.7)
    assert continued_weights(["code"], ["general"], start=0.2, end=0.9, floor=0.1)["code"] == "0.2->0.9"
    two = continued_weights(["code", "maths"], ["general"])
    assert two == {"code": "0.05->0.35", "maths": "0.05->0.35", "general": "rest"}
    with pytest.raises(ValueError, match=r"end must be at most 0.9, to leave floor=0.1 for replay; got 0.95"):
        continued_weights(["code"], ["general"], end=0.95)
    assert continued_weights(["code"], ["general"], start=0, end=1, floor=0) == {"code": "0->1", "general": "rest"}
    for name, share in (("start", -0.1), ("start", 1.1), ("end", -0.1), ("end", 1.1)):
        with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\]; got {share}"):
            continued_weights(["code"], ["general"], floor=-1, **{name: share})
    for target, general, named in (([], ["general"], "target"), (["code"], [], "general")):
        with pytest.raises(ValueError, match=f"{named} must name at least one source"):
            continued_weights(target, general)
    assert continued_weights(["code"], ["general"], replay=False) == {"code": 1.0, "general": 0.0}


def test_a_run_too_long_to_be_counted_is_estimated() -> None:
    rows, weights = {"a": 100, "b": 300, "c": 50}, {"a": "0.9->0.3", "b": "rest", "c": "0:0.1, 0.5:0.3, 1:0.05"}
    counted = Mixture(rows, weights, total=10_000).table()
    total = 2**62
    estimated = Mixture(rows, weights, total=total).table()
    for few, many in zip(counted[1:], estimated[1:]):
        assert int(many[3].replace(",", "")) / total == pytest.approx(int(few[3].replace(",", "")) / 10_000, abs=1e-3)
    made = Mixture(rows, {"a": 1, "b": 0, "c": 0}, total=1000).from_here_on(600, {"a": 0, "b": 1, "c": 0}, total=total)
    assert [int(line[3].replace(",", "")) for line in made.table()[1:]] == [600, pytest.approx(total), 0]


@pytest.mark.parametrize("state", [None, [], {}, {"rows": {"a": 3}}, {"rows": {"a": 3}, "phases": [{}], "seed": 0}])
def test_what_is_no_state_of_a_mixture(state: Any) -> None:
    with pytest.raises(ValueError, match="this is not the state of a mixture"):
        Mixture({"a": 3}, {}, total=9).resumed(state, 3)


def test_weights_may_have_any_number_of_points() -> None:
    progress = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    for text, weights in (
        ("0.9->0.5->0.3", [0.9, 0.7, 0.5, 0.4, 0.3]),
        ("0.5:0.2, 0.75:0.6", [0.2, 0.2, 0.2, 0.6, 0.6]),
        ("0.25", [0.25] * 5),
        (3, [3.0] * 5),
    ):
        assert Curve.parse(text)(progress) == pytest.approx(weights)


def test_a_source_that_is_only_validated_has_no_passes() -> None:
    made = Mixture({"seen": 10, "held": 0, "off": 5}, {"seen": 2, "held": 0, "off": 0}, total=25)
    assert made.epochs() == {"seen": 2.5, "off": 0.0}
    assert made.table()[1:] == [
        *(("seen", "10", "100%", "25", "2.50"), ("held", "0", "0%", "0", "-"), ("off", "5", "0%", "0", "0.00"))
    ]


def test_a_name_that_is_near_none_is_told_all() -> None:
    with pytest.raises(ValueError, match=r"no source 'zzz' to give a weight; did you mean general, code, maths\?$"):
        mixture(weights={"zzz": 1})


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ({"general": "rest", "code": 0.7, "maths": 0.3}, (0, 0.7, 0.3)),  # which leaves nothing
        ({"general": "rest", "code": "0:1, 1:0", "maths": "0:0, 1:1"}, (0, 0.5, 0.5)),
        ({"general": "rest", "code": 0.7, "maths": 0.3 + 1e-10}, (0, 0.7, 0.3)),  # more than all, by rounding
        ({"general": 2, "code": 6, "maths": 0}, (0.25, 0.75, 0)),
        ({"general": "0->0.5", "code": "0.5->0", "maths": "0"}, (0.5, 0.5, 0)),
        ({"general": "rest", "code": "rest", "maths": "0.5:0.2"}, (0.8 * 500 / 590, 0.8 * 90 / 590, 0.2)),
    ],
)
def test_weights_that_just_go_together(weights: dict[str, Any], shares: tuple[float, ...]) -> None:
    found = tuple(mixture(weights=weights).shares(0.5).values())
    assert found == pytest.approx(shares) and min(found) >= 0


def test_what_is_just_out_of_range_is_refused() -> None:
    for weight in ("inf", math.inf, "0.5->inf"):
        with pytest.raises(ValueError, match="weights must be finite and not negative"):
            mixture(weights={"general": weight, "code": 1, "maths": 1})
    with pytest.raises(ValueError, match=r"weights must not sum to more than 1; got 1\.01"):
        mixture(weights={"general": "rest", "code": 0.71, "maths": 0.3})
    made = mixture()
    assert [len(part) for part in made.sequences(7, 7)] == [0, 0]
    for start, stop in ((-1, 3), (4, 3)):
        with pytest.raises(ValueError, match=rf"must satisfy 0 <= start <= stop; got {start} and {stop}$"):
            made.sequences(start, stop)


@pytest.mark.parametrize("start", [0, 1, 400, 990, 999])
def test_only_what_is_left_of_a_run_decides_whether_it_is_counted(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the last sequences of a long run one by one, and estimate more of them; both are near."""
    made = mixture(1000).from_here_on(start, {"general": 0.1, "code": 0.2, "maths": 0.7}, total=1000)
    exact = made.counts(1000)
    for counted in (1000 - start - 1, 1000 - start):
        monkeypatch.setattr("llmfast.data.mixture._COUNTED", counted)
        drawn: list[int] = []
        whole = made.counts
        with monkeypatch.context() as patch:
            patch.setattr(made, "counts", lambda stop, whole=whole, drawn=drawn: drawn.append(stop) or whole(stop))
            found = {name: int(line[3].replace(",", "")) for name, line in zip(ROWS, made.table()[1:])}
        assert {*drawn} == {1000 if counted == 1000 - start else start}
        assert all(abs(found[name] - exact[name]) <= (0 if counted == 1000 - start else 5) for name in ROWS)


def test_the_order_of_a_seed_is_always_the_same() -> None:
    """A run that is resumed by a later version must read on as it began."""
    source, row = Mixture({"a": 5, "b": 3}, {"a": "0.9->0.3", "b": "rest"}, total=20, seed=3).sequences(0, 20)
    assert source.tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 1, 1]
    assert row.tolist() == [0, 1, 2, 2, 4, 0, 3, 3, 0, 1, 1, 2, 4, 1, 2, 0, 2, 3, 1, 2]
    assert permutation(6, 3, 0, 1).tolist() == [4, 3, 2, 5, 0, 1]


def test_large_numbers_of_the_table_are_in_thousands() -> None:
    made = Mixture({"a": 12_345, "b": 2000}, {"a": 1, "b": 1}, total=3000)
    assert made.table()[1:] == [("a", "12,345", "50%", "1,499", "0.12"), ("b", "2,000", "50%", "1,501", "0.75")]


def test_what_a_caller_changes_later_does_not_change_a_mixture() -> None:
    rows, first, second = {"a": 5, "b": 3}, {"a": 1, "b": 0}, {"a": 0, "b": 1}
    made = Mixture(rows, first, total=20)
    later, kept = made.from_here_on(8, second, total=20), made.counts(20)
    for changed in (rows, first, second):
        changed.update(a=7, c=9)
    assert made.state()["phases"] == [{"start": 0, "total": 20, "weights": {"a": 1, "b": 0}}]
    assert later.state()["phases"][1:] == [{"start": 8, "total": 20, "weights": {"a": 0, "b": 1}}]
    assert made.state()["rows"] == later.state()["rows"] == {"a": 5, "b": 3}
    again = made.resumed(made.state(), 10)
    assert again.counts(20) == made.counts(20) == kept and later.counts(20) == {"a": 8, "b": 12}
