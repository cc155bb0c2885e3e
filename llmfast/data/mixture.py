"""Choose the source and row of every training sequence while the sources' shares change during the run.

    >>> from llmfast.data import Mixture
    >>> mixture = Mixture({"prose": 4000, "code": 9000}, {"prose": "rest", "code": "0.1->0.7"}, total=20_000, seed=0)
    >>> source, row = mixture.sequences(1000, 1032)  # 32 sequences, starting with number 1000
    >>> source.shape, row.shape
    ((32,), (32,))

The source and row of sequence i are a pure function of (seed, i) and of the sources' rows and weights, not of their
names. The order therefore does not depend on ranks, workers or micro-batches, nor on where the text is, and a
checkpoint stores one integer, the number of consumed sequences. Every row of a source is used once before any is used
twice. Future sequences can be changed: `from_here_on` leaves past ones unchanged.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llmfast._checks import expect

REST = "rest"
_CHUNK = 1 << 20  # sequences drawn at a time
_COUNTED = 1 << 24  # sequences drawn only to count them: about a second
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 times the fractional part of the golden ratio

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Weight = str | float


class Curve(NamedTuple):
    """Weight over the run, linear between its points."""

    at: tuple[float, ...]  # fractions of the run, ascending
    weight: tuple[float, ...]

    @classmethod
    def parse(cls, text: str | float) -> "Curve":
        """Parse 0.3, "0.3", "0.9->0.3" (evenly spaced over the run) or "0:0.9, 0.5:0.9, 1:0.3".

        Raises:
            ValueError: The text has none of these forms, a weight is negative, or the points do not ascend within 0..1.
        """
        parts = str(text).split("->") if "->" in str(text) else str(text).split(",")
        try:
            if ":" in str(text):
                at, weight = zip(*(map(float, part.split(":")) for part in parts))
            else:
                weight = tuple(map(float, parts))
                expect(len(weight) == 1 or "->" in str(text), "")
                at = tuple(np.linspace(0, 1, len(weight)).tolist())
        except ValueError:
            examples = "0.3, '0.9->0.3', '0:0.9, 0.5:0.9, 1:0.3' or 'rest'"
            raise ValueError(f"a weight must be written like {examples}; got {text!r}") from None
        expect(all(0 <= w < float("inf") for w in weight), f"weights must be finite and not negative; got {text!r}")
        expect(all(0 <= x <= 1 for x in at), f"points must be shares of the run, 0 to 1; got {text!r}")
        expect(all(a < b for a, b in pairwise(at)), f"points must ascend; got {text!r}")
        return cls(at, weight)

    def __call__(self, progress: Floats) -> Floats:
        return np.interp(progress, self.at, self.weight)


class Phase(NamedTuple):
    """Weights that apply from one sequence on."""

    start: int  # first sequence
    total: int  # sequences of the whole run; the points of the weights are fractions of it
    weights: Mapping[str, Weight]  # by source; "rest" takes what others leave of 1, split by rows if several have it


class Mixture:
    """Sources of rows, and the weights they are drawn with.

    Args:
        rows: The number of rows of each source; positive if the source is ever drawn.
        weights: The weight of each source; {} weights all by their rows. Without a "rest", weights are normalised.
        total: Sequences of the whole run.
        seed: Seed of the order.

    Raises:
        ValueError: A weight is invalid or belongs to no source, or at some point all weights are zero.
    """

    def __init__(self, rows: Mapping[str, int], weights: Mapping[str, Weight], *, total: int, seed: int = 0) -> None:
        self._set(rows, [Phase(0, total, dict(weights))], seed, by_name=False)

    def _set(self, rows: Mapping[str, int], phases: list[Phase], seed: int, *, by_name: bool) -> None:
        expect(len(rows) > 0, "a mixture needs at least one source")
        expect(phases[-1].total > 0, f"total must be positive; got {phases[-1].total}")
        expect(seed >= 0, f"seed must not be negative; got {seed}")
        self.rows, self.phases, self.seed = dict(rows), phases, seed
        self.sources, self._by_name = list(rows), by_name
        self._shares = [_Shares(rows, phase) for phase in phases]
        self._known = 0, np.zeros(len(rows), np.int64)  # sequences each source had given before some sequence
        self._offset = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
        self._order = lru_cache(maxsize=2 * len(rows))(self._new_order)  # two epochs per source: a batch may span both

    @classmethod
    def _of(cls, rows: Mapping[str, int], phases: list[Phase], seed: int, *, by_name: bool) -> "Mixture":
        made = cls.__new__(cls)
        made._set(rows, phases, seed, by_name=by_name)
        return made

    def _with(self, phases: list[Phase]) -> "Mixture":
        return self._of(self.rows, phases, self.seed, by_name=self._by_name)

    def sequences(self, start: int, stop: int) -> tuple[Ints, Ints]:
        """Return source (an index into `sources`) and row of sequences `start` to `stop`, each (stop - start,)."""
        expect(0 <= start <= stop, f"start and stop must satisfy 0 <= start <= stop; got {start} and {stop}")
        before = self._counts_before(start)
        source = np.concatenate([np.empty(0, np.int64), *self._drawn(start, stop)])
        row = np.empty_like(source)
        for d, name in enumerate(self.sources):
            mine = np.flatnonzero(source == d)
            if len(mine):
                epochs, places = np.divmod(before[d] + np.arange(len(mine)), self.rows[name])
                for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
                    now = slice(*np.searchsorted(epochs, [epoch, epoch + 1]))
                    row[mine[now]] = self._order(d, epoch)[places[now]]
        self._known = stop, before + np.bincount(source, minlength=len(self.sources))
        return source, row

    def counts(self, stop: int) -> dict[str, int]:
        """Count how many of the first `stop` sequences come from each source."""
        return dict(zip(self.sources, self._counts_before(stop).tolist()))

    def shares(self, progress: float) -> dict[str, float]:
        """Return each source's share under the current weights, at a fraction of the run."""
        weights = self._shares[-1](np.array([progress]))[:, 0]
        return dict(zip(self.sources, (weights / weights.sum()).tolist()))

    def from_here_on(self, start: int, weights: Mapping[str, Weight], *, total: int) -> "Mixture":
        """Return a copy that uses these weights from sequence `start` on; their points are fractions of `total`."""
        past = [phase for phase in self.phases if phase.start < start]
        if past and (past[-1].weights, past[-1].total) == (weights, total):
            return self._with(past)
        return self._with([*past, Phase(start if past else 0, total, dict(weights))])

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores with the number of consumed sequences, so that the past stays unchanged."""
        phases = [phase._asdict() for phase in self.phases]
        return {"rows": self.rows, "seed": self.seed, "by_name": self._by_name, "phases": phases}

    def resumed(self, state: Mapping[str, Any], consumed: int) -> "Mixture":
        """Return this mixture's weights from sequence `consumed` on, after the past in `state` and with its seed.

        Raises:
            ValueError: The sources differ from those of the past, or `state` is invalid.
        """
        try:
            then = state["rows"]
            # The order must match too: a batch refers to sources by number.
            same = [*then.items()] == [*self.rows.items()]
            expect(same, f"the sources' rows have changed: they were {then}, and are {self.rows}")
            by_name = state.get("by_name", True)  # earlier versions did not say it
            past = self._of(then, [Phase(**phase) for phase in state["phases"]], state["seed"], by_name=by_name)
        except (LookupError, TypeError, AttributeError) as e:
            raise ValueError(f"this is not the state of a mixture: {state!r:.200}") from e
        return past.from_here_on(consumed, self.phases[-1].weights, total=self.phases[-1].total)

    def epochs(self) -> dict[str, float]:
        """Return how many times the whole run reads each source that has rows."""
        given = self._given()
        return {name: given[name] / rows for name, rows in self.rows.items() if rows}

    def table(self) -> list[tuple[str, ...]]:
        """Return a line per source: rows, share at the start and at the end, rows read and epochs of the whole run."""
        first, last = self._with(self.phases[:1]).shares(0.0), self.shares(1.0)
        given, epochs = self._given(), self.epochs()
        lines: list[tuple[str, ...]] = [("source", "rows", "share", "rows read", "epochs")]
        for name, rows in self.rows.items():
            ends = list(dict.fromkeys(f"{share[name]:.0%}" for share in (first, last)))
            times = f"{epochs[name]:.2f}" if rows else "-"
            lines.append((name, f"{rows:,}", " -> ".join(ends), f"{given[name]:,}", times))
        return lines

    def _given(self) -> dict[str, int]:
        """Count the sequences per source in the whole run; for a very long run, approximate them from the shares."""
        start, total = self.phases[-1].start, self.phases[-1].total
        if total - start <= _COUNTED:
            return self.counts(total)
        weights = self._shares[-1]((start + (np.arange(1000) + 0.5) / 1000 * (total - start)) / total)
        shares = (weights / weights.sum(axis=0)).mean(axis=1)
        return {
            name: n + round(share * (total - start)) for (name, n), share in zip(self.counts(start).items(), shares)
        }

    def _new_order(self, source: int, epoch: int) -> Ints:
        """Order a source's rows by its number, because its name may be a path, which changes if text is moved."""
        name = self.sources[source]
        key = name.encode("utf-8", "surrogateescape") if self._by_name else (source,)
        return permutation(self.rows[name], self.seed, epoch, *key)

    def _counts_before(self, stop: int) -> Ints:
        at, counts = self._known if self._known[0] <= stop else (0, np.zeros(len(self.rows), np.int64))
        for source in self._drawn(at, stop):
            counts = counts + np.bincount(source, minlength=len(counts))
        self._known = stop, counts
        return counts

    def _drawn(self, start: int, stop: int) -> Iterator[Ints]:
        """Yield the source of each sequence, one chunk at a time."""
        ends = [*(phase.start for phase in self.phases[1:]), stop]
        for phase, shares, end in zip(self.phases, self._shares, ends):
            while start < min(end, stop):
                upto = min(start + _CHUNK, end, stop)
                edges = np.cumsum(shares(np.arange(start, upto) / phase.total), axis=0)  # (sources, n)
                uniform = self._uniform(start, upto) * edges[-1]  # never below the edge of a source without a share
                yield np.sum(uniform >= edges[:-1], axis=0)
                start = upto

    def _uniform(self, start: int, stop: int) -> Floats:
        """Return elements `start` to `stop` of an endless sequence in [0, 1): golden ratio steps from a seeded offset.

        The numbers are spread as evenly as possible over any stretch, and over every k-th number, so that shares are
        exact to a few sequences in any window; independent random numbers would be off by the square root of its
        length.
        """
        at = np.arange(start, stop, dtype=np.uint64) * _GOLDEN + self._offset  # modulo 2**64
        uniform: Floats = (at >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return uniform


def permutation(rows: int, *key: int) -> Ints:
    """Permute 0..rows - 1 and return it, (rows,), identical on every machine.

    Sorts raw Philox output, because NumPy keeps that stream stable but not how its own `permutation` uses it. Each
    number's position is in its low bits, so that there are no ties and no argsort is needed.
    """
    drawn = np.random.Philox(np.random.SeedSequence(key)).random_raw(rows)
    places = np.uint64((1 << rows.bit_length()) - 1)
    drawn = (drawn & ~places) | np.arange(rows, dtype=np.uint64)
    drawn.sort()
    return (drawn & places).astype(np.int64)


class _Shares:
    """Weight of each source at some points of the run: (n,) to (sources, n)."""

    def __init__(self, rows: Mapping[str, int], phase: Phase) -> None:
        weights = dict.fromkeys(rows, REST) if not phase.weights else phase.weights
        for name in weights:
            if name not in rows:
                near = difflib.get_close_matches(name, rows, n=1) or [", ".join(rows)]
                raise ValueError(f"there is no source {name!r} to give a weight; did you mean {near[0]}?")
        for name in rows:
            expect(name in weights, f"source {name!r} needs a weight: 0 to only validate, 'rest' for what is left")
        self._rest = np.array([[rows[name] if weights[name] == REST else 0] for name in rows], np.float64)
        self._curves = [None if weights[name] == REST else Curve.parse(weights[name]) for name in rows]
        points = sorted({0.0, 1.0, *(x for curve in self._curves if curve for x in curve.at)})
        at = np.array(points)
        given = self._given(at)
        if any(curve is None for curve in self._curves):
            over = given.sum(axis=0).max()
            expect(over <= 1 + 1e-9, f"in addition to 'rest', weights must not sum to more than 1; got {over:.3g}")
        shares = self(at)
        expect(bool((shares.sum(axis=0) > 0).all()), "at every point of the run some source must have a weight")
        for name, share in zip(rows, shares):
            expect(rows[name] > 0 or share.max() == 0, f"source {name!r} has a weight but no rows")

    def _given(self, progress: Floats) -> Floats:
        return np.stack([np.zeros_like(progress) if curve is None else curve(progress) for curve in self._curves])

    def __call__(self, progress: Floats) -> Floats:
        shares: Floats = self._given(progress)
        if self._rest.any():
            rest: Floats = np.maximum(1 - shares.sum(axis=0), 0)
            shares += self._rest / self._rest.sum() * rest
        return shares


def continued_weights(
    target: Sequence[str],
    general: Sequence[str],
    *,
    start: float = 0.1,
    end: float = 0.7,
    floor: float = 0.1,
    replay: bool = True,
) -> dict[str, Weight]:
    """Compute weights for continued pretraining: the share of the new sources grows, the old ones are replayed.

    Args:
        target: The new sources; they split their share evenly.
        general: The earlier sources; they split the remaining share by their rows.
        start, end: The new sources' share at the first and at the last sequence.
        floor: The minimum share of the old sources at any time.
        replay: False gives the old sources no weight: they are only used for validation.

    Raises:
        ValueError: A share is not between 0 and 1, or `end` or `start` leaves less than the floor.
    """
    expect(len(target) > 0, "target must name at least one source; got none")
    if not replay:
        return {**{name: 1.0 for name in target}, **{name: 0.0 for name in general}}
    expect(len(general) > 0, "general must name at least one source to replay; got none")
    for name, part in (("start", start), ("end", end)):
        expect(0 <= part <= 1, f"{name} must be in [0, 1]; got {part}")
        expect(
            part <= 1 - floor + 1e-9,
            f"{name} must be at most {1 - floor:g}, to leave floor={floor:g} for replay; got {part:g}",
        )
    each = f"{start / len(target):g}->{end / len(target):g}"
    return {**{name: each for name in target}, **{name: REST for name in general}}
