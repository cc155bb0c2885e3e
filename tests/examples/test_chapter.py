"""The chapter's experiments run, and its page says what their numbers say."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from docs.figures import INK, PLOT_WIDTH, digest_of, drawn_from, paint
from examples.chapter import runs as chapter_runs
from examples.chapter.__main__ import main
from examples.chapter.batch import BASE, RATES, ended
from examples.chapter.dirt import counted, dirtied, sentences
from examples.chapter.measures import GAP, MOST_FILLED, TIMED, filled, step_time
from examples.chapter.mtp import PLAIN, TOKENS, WAYS
from examples.chapter.optimizers import WAYS as OPTIMIZERS
from examples.chapter.optimizers import repeated, sweep
from examples.chapter.page import PAGE, PICTURES, RESULTS, finished, minutes, page, read, section
from examples.chapter.parts import Part, parts
from examples.chapter.runs import HERE, SEEDS, Run
from examples.chapter.scaling import LARGE, predicted
from examples.chapter.told import Found, as_good_as_best, compared, differ, found, verdict
from llmfast.data import ByteTokenizer, fim_prompt
from llmfast.data.sources import python_prose
from llmfast.plan import fit_chinchilla
from llmfast.train import FurtherTokens, Trainer, load_config
from llmfast.train.trainer import NonFinite
from support.datatrove import quickly

FINISHED = finished()
NUMBER = r"-?\d+\.\d{3}"
TRIPLE = rf"({NUMBER}) \(({NUMBER}) to ({NUMBER})\)"
CLAIM = re.compile(
    rf"{TRIPLE}[^()\n]*?{TRIPLE}(?: \||:) (no difference was seen|[^|()\n]*? is (?:lower|higher) by ({NUMBER}))"
)


@pytest.fixture(autouse=True, scope="module")
def _fitted_once() -> Iterator[None]:
    """Fit a law to the same numbers once, however many tests tell it."""
    fit = cache(lambda *numbers, **options: fit_chinchilla(*map(list, numbers), **options))
    with pytest.MonkeyPatch.context() as patch:
        name = "examples.chapter.scaling.fit_chinchilla"
        patch.setattr(name, lambda *numbers, **options: fit(*map(tuple, numbers), **options))
        yield


# The experiments.


@pytest.mark.usefixtures("unpictured")
def test_every_part_runs_a_few_steps_and_none_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clean a few texts of those that are read first; all others would take most of the time to parse."""
    monkeypatch.setattr("examples.chapter.dirt.load", lambda name: islice(python_prose(), 40))
    monkeypatch.setattr("examples.chapter.dirty.FEW", 20)
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--quick", "--jobs", "1"]
    with quickly():
        main(folders)
    written, seconds = {}, 0.0
    for name, part in parts().items():
        written[name] = (tmp_path / "results" / f"{name}.json").read_text()
        rows = json.loads(written[name])["rows"]
        assert [row.items() >= run.labels.items() for row, run in zip(rows, part.few(), strict=True)] == [True] * len(
            rows
        )
        seconds += sum(row["seconds"] for row in rows)
        for row in rows:
            assert 1 < row["loss"] < 10 and row["tokens"] > 50 and 0 <= row["seconds"] < 60 and row["parameters"] > 1000
            assert all(0 < value < 20 for value in row.get("loss by group", []) if value is not None)
            assert name != "dirty" or 0 <= row["dirt kept"] < row["dirt"] < row["documents"]
    assert seconds > 0
    assert not list((tmp_path / "runs").rglob("*/checkpoint-*")) or {
        place.parent.parent.name for place in (tmp_path / "runs").rglob("checkpoint-*")
    } == {"continued"}
    monkeypatch.setattr(chapter_runs, "train", None)
    main(folders)
    assert written == {name: (tmp_path / "results" / f"{name}.json").read_text() for name in written}


def test_other_settings_are_another_run(tmp_path: Path) -> None:
    part = parts()["continued"]
    tasks = [chapter_runs.Task("continued", run, seed, tmp_path) for run in part.runs() for seed in SEEDS]
    assert len({task.place for task in tasks}) == len(tasks)
    assert len({task.before.place for task in tasks if task.before}) == len(SEEDS)


def test_a_run_that_diverges_has_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = chapter_runs.Task("fim", chapter_runs.Run({"way": "wild"}), 0, tmp_path, measure=parts()["fim"].measure)

    def diverge(config: Any, **options: Any) -> None:
        task.place.mkdir(parents=True)
        (task.place / "metrics.jsonl").write_text('{"step": 0, "tokens": 0, "validation": {"prose": NaN}}\n')
        raise NonFinite

    monkeypatch.setattr(chapter_runs, "train", diverge)
    row = chapter_runs.execute(task)
    assert 0 <= row.pop("seconds") < 10
    assert row == {"way": "wild", "seed": 0, "loss": None, "tokens": 0}


def test_parts_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["decoy"])
    assert "PART must be one of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["decay", "--quick"])
    assert "numbers mean nothing" in capsys.readouterr().err


def test_each_part_has_its_settings() -> None:
    assert {file.stem for file in HERE.glob("*.toml")} == set(parts())
    for name, part in parts().items():
        load_config(HERE / f"{name}.toml")
        for run in part.runs():
            load_config(HERE / f"{name}.toml", run.settings)


SENTENCE = "A source is a folder or file of text with one document in each of its files, and it is read in order."


def test_only_sentences_are_text() -> None:
    code = "    for row in rows.batch(np.arange(4)): print(row.tokens, row.labels, row.positions, row.document_ids, 1)"
    table = "| .txt | .md | .rst | .py | and any other suffix | the file | one document | of a source | is this | row."
    assert sentences("\n\n".join(["Heading", SENTENCE, code, "- " + SENTENCE, table, SENTENCE])) == "\n\n".join(
        [SENTENCE] * 2
    )
    assert sentences("\n\n".join([SENTENCE] * 1000)).count(SENTENCE) == 3000 // (len(SENTENCE) + 2)


def test_dirt_is_named_and_counted() -> None:
    plain = [(f"{i}.py", f"{i}. {SENTENCE}\n\n{SENTENCE}") for i in range(15)]
    dirty = list(dirtied(plain))
    names = [name for name, _ in dirty]
    assert len(set(names)) == len(names)
    kept = {name: text for name, text in dirty if not name.startswith("dirt/")}
    assert kept.keys() == dict(plain).keys()
    assert all(text in kept[name] for name, text in plain)
    kinds = Counter(name.split("/")[1] for name in names if name not in kept)
    assert kinds == {"copy 1": 3, "copy 2": 3, "table": 5, "line": 3}
    assert counted(dirty, " kept") == {
        "documents kept": 29,
        "dirt kept": 14,
        "characters kept": sum(len(text) for _, text in dirty),
    }


def test_a_gap_is_filled_up_to_the_end_of_text() -> None:
    tokenizer, config = ByteTokenizer(), load_config(HERE / "fim.toml")
    seen = []

    def generate(prompts: list[torch.Tensor], count: int, **options: Any) -> list[torch.Tensor]:
        seen.append((prompts[0].tolist(), count, options["stop"], options["generator"].initial_seed()))
        return [torch.cat([prompts[0], torch.tensor([*b"last item", tokenizer.eot_id])])]

    assert filled(SimpleNamespace(generate_batch=generate), tokenizer, config) == "last item"
    assert seen == [(fim_prompt(tokenizer, *GAP).tolist(), MOST_FILLED, tokenizer.eot_id, config.train.seed)]


# What is told.


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((1.0, 1.1, 1.2), (1.3, 1.4, 1.5), "a is lower by 0.300"),
        ((1.3, 1.4, 1.5), (1.0, 1.1, 1.2), "a is higher by 0.300"),
        ((1.0, 1.1, 1.4), (1.3, 1.4, 1.5), "no difference was seen"),
        ((1.0, 1.0), (1.0, 1.0), "no difference was seen"),
        ((1.0, float("inf")), (1.0, 1.0), "a diverged"),
        ((float("inf"),), (float("inf"),), "no difference was seen"),
    ],
)
def test_differences_are_larger_than_the_spread(a: tuple[float, ...], b: tuple[float, ...], expected: str) -> None:
    first, second = Found("a", a), Found("b", b)
    assert verdict(first, second) == expected
    assert compared(first, second).endswith(f": {expected}.")
    assert differ(first, second) == differ(second, first) == (expected != "no difference was seen")


def test_what_cannot_be_told_from_the_best() -> None:
    tried = [Found("a", (1.0, 1.2)), Found("b", (1.1, 1.25)), Found("c", (2.0, 2.1))]
    assert as_good_as_best(tried) == tried[:2]


def test_labels_must_be_those_of_a_run() -> None:
    with pytest.raises(ValueError, match=r"labels must be those of a run; got \{'way': 'b'\}"):
        found([{"way": "a", "loss": 1.0}], way="b")


def made_up(part: Part) -> list[dict[str, Any]]:
    """Make rows of all runs of a part, with random losses."""
    drawn = np.random.default_rng(0)

    def row(run: Run, seed: int) -> dict[str, Any]:
        x = [3.0 + float(value) for value in drawn.uniform(size=12)]
        return (
            run.labels
            | {"seed": seed, "loss": x[0], "tokens": 480_000, "parameters": 41_000, "tokens_per_s": 9_000}
            | {"by source": [{"prose": x[1], "code": x[2]}, {"prose": x[3], "code": x[4]}]}
            | {"curve": [[10, 5.0], [20, 4.0]], "acceptance": [x[0] / 8], "tokens_per_pass": 1.5}
            | {"middle, PSM": x[5], "middle, SPM": x[6], "filled": "a `name`\n"}
            | {"loss by group": x[:5], "tokens by group": [1, 2, 4, 8, 16]}
            | {"all held out": x[9], "kept held out": x[10]}
            | {"documents": 500, "dirt": 250, "characters": 10**6}
            | {"documents kept": 100, "dirt kept": 10, "characters kept": 10**5}
            | {"unigram": x[7], "bigram": x[8], "held out": [[10, 5.0], [20, x[0]]]}
            | {"step_s": x[11]}
        )

    rows = [row(*wanted) for wanted in part.first()]
    return rows + [row(*wanted) for wanted in part.further(rows)]


@pytest.mark.parametrize("part", parts().values(), ids=lambda part: part.name)
def test_every_part_can_be_told_and_drawn(part: Part, tmp_path: Path) -> None:
    results = {"about": {"python": "3.12.1", "torch": "2.13.0"}, "rows": made_up(part)}
    text = section(part, results)
    assert text.startswith(f"## {part.title}\n\n**The statement.** {part.claim}\n\n**Where it is from.** ")
    assert re.search(TRIPLE, text) and CLAIM.search(text)
    paint(part.draw, results["rows"], tmp_path / part.name, (PLOT_WIDTH, part.height))
    assert {file.name for file in tmp_path.iterdir()} == {f"{part.name}-{theme}.svg" for theme in INK}
    for row in results["rows"]:
        kept = {label: row[label] for label in part.runs()[0].labels}
        row.update({key: alike(value, row["seed"]) for key, value in row.items()} | kept)
    same = section(part, results)
    assert "no difference was seen" in same
    assert not re.search(r"is (lower|higher) by", same)


def test_a_law_that_holds_predicts_the_larger_run() -> None:
    rows = made_up(parts()["scaling"])
    for row in rows:
        N, D = 40.0 * row["width"] ** 2, 1024.0 * row["steps"]
        row |= {"parameters": N, "tokens": D, "loss": (1.0 + 40 / N**0.5 + 300 / D**0.5) * (1 + row["seed"] * 1e-5)}
    assert predicted(rows).endswith(": within that range.")
    for row in rows:
        row["loss"] *= 2.0 if (row["width"], row["steps"]) == LARGE else 1.0
    assert predicted(rows).endswith(": outside that range.")
    for row in rows:
        row["loss"] = 1.0 + row["width"]
    assert predicted(rows).startswith("No law could be fitted")


def test_a_rule_for_larger_batches_holds_as_long_as_it_keeps_the_loss() -> None:
    part = parts()["batch"]
    rows = made_up(part)
    for row in rows:
        kept = {("SGD", "times k"): (2,), ("SGD", "unchanged"): (4,)}
        worse = row["k"] > 1 and row["k"] not in kept.get((row["way"], row["rule"]), ())
        row["loss"] = 2.0 + worse + 0.1 * row["seed"]
    holds, _, lowest, *_ = part.told(rows)
    assert "- SGD, from lr 1: the rate times k holds at 2 times the batch and breaks at 4 and 8 times" in holds
    assert "- Adam, from lr 0.003: the rate times sqrt(k) breaks at 2, 4 and 8 times the batch." in holds
    assert "- SGD: unchanged." in lowest
    assert "- Adam: unchanged, times sqrt(k) and times k." in lowest


@pytest.mark.parametrize("way", RATES)
def test_larger_batches_begin_with_the_best_rate_of_the_small_one(way: str) -> None:
    rows = read(parts()["batch"])["rows"]
    low, best, high = (ended(rows, way, lr).mean for lr in RATES[way])
    assert best < min(low, high)
    assert BASE[way] == RATES[way][1]


def test_slower_ways_take_fewer_steps_at_equal_time() -> None:
    part = parts()["mtp"]
    assert part.again is not None
    rows = made_up(part)
    for row in rows:
        row["loss"] = 3.0 + 0.1 * row["seed"]
        row["step_s"] = {PLAIN: 0.01, "4 parallel heads": 0.05}.get(row["way"], 0.02) * (1 + row["seed"])
    steps = {run.labels["way"]: run.labels["steps"] for run, _ in part.again(rows)}
    assert steps == {way: 96 if way == "4 parallel heads" else 240 for way in WAYS if way != PLAIN}
    assert all(f"train.steps={run.labels['steps']}" in run.settings for run, _ in part.again(rows))
    assert [seed for _, seed in part.again(rows)] == [*SEEDS] * 4
    again = [run.labels | {"seed": seed, "loss": 3.5, "step_s": 1.0} for run, seed in part.again(rows)]
    first = [row for row in rows if row["at"] == TOKENS]
    assert "| - | 2.00 |" in part.told(first)[1]
    assert "| 3.500 (3.500 to 3.500) | 5.00 |" in part.told(first + again)[2]


def test_the_time_of_a_step_is_the_least_processor_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fit(trainer: Trainer) -> bool:
        (clock,) = trainer.hooks
        seen.append((trainer.config.train.steps, type(trainer.objective)))
        for start, end in ((1.0, 1.5), (2.0, 2.25), (3.0, 4.0)):
            times = iter((start, end))
            monkeypatch.setattr("time.process_time", lambda times=times: next(times))
            clock.before_step(trainer)
            clock.after_step(trainer)
        return True

    task = chapter_runs.Task("mtp", parts()["mtp"].runs()[1], 0, tmp_path, quick=True)
    chapter_runs.execute(task)
    monkeypatch.setattr(Trainer, "fit", fit)
    assert step_time(task.place, chapter_runs.config_of(task)) == {"step_s": 0.25}
    assert seen == [(TIMED, FurtherTokens)]


def alike(value: Any, seed: int) -> Any:
    """Replace the losses in a row by numbers that only the seed changes."""
    if isinstance(value, dict):
        return {key: alike(each, seed) for key, each in value.items()}
    if isinstance(value, list):
        return [alike(each, seed) for each in value]
    return 3.0 + 0.01 * seed if isinstance(value, float) else value


# The page.


def groups(rows: list[dict[str, Any]], part: Part) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each kind of run."""
    further = [run for run, _ in part.further(rows[: len(part.first())])]
    for run in {chapter_runs.Task(part.name, run, 0, HERE).name: run for run in [*part.runs(), *further]}.values():
        yield [row for row in rows if row.items() >= run.labels.items()]


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """Return every number of a row that a sentence may be about."""
    flat = {key: value for key, value in row.items() if isinstance(value, float) and key not in ("seconds", "step_s")}
    flat |= {f"group {g}": value for g, value in enumerate(row.get("loss by group", []))}
    first, last = row["by source"]
    flat |= {f"{source} at the end": loss for source, loss in last.items()}
    return flat | {f"{source} risen": loss - first[source] for source, loss in last.items()}


@pytest.mark.parametrize("part", FINISHED, ids=lambda part: part.name)
def test_results_are_of_all_runs(part: Part) -> None:
    rows = read(part)["rows"]
    wanted = [*part.first(), *part.further(rows[: len(part.first())])]
    expected = [run.labels | {"seed": seed} for run, seed in wanted]
    assert [{label: row[label] for label in each} for row, each in zip(rows, expected, strict=True)] == expected


@pytest.mark.parametrize("part", FINISHED, ids=lambda part: part.name)
def test_numbers_of_the_page_are_those_of_the_results(part: Part) -> None:
    results = read(part)
    kinds = [[*map(numbers, mine)] for mine in groups(results["rows"], part) if None not in [r["loss"] for r in mine]]
    columns = [[each[key] for each in mine] for mine in kinds for key in mine[0]]
    for one, other in product(kinds, kinds):  # and by how much one is above the other with each seed
        columns += [[a[key] - b[key] for a, b in zip(one, other)] for key in one[0].keys() & other[0].keys()]
    known = {tuple(f"{x:.3f}" for x in (sum(c) / len(c), min(c), max(c))) for c in columns}
    shown = re.findall(TRIPLE, section(part, results))
    assert shown
    assert set(shown) <= known


@pytest.mark.parametrize("part", FINISHED, ids=lambda part: part.name)
def test_claims_of_the_page_are_larger_than_the_spread(part: Part) -> None:
    claims = CLAIM.findall(section(part, read(part)))
    assert claims
    for *triples, _, said in claims:
        (a, low_a, high_a), (b, low_b, high_b) = (map(float, triples[i : i + 3]) for i in (0, 3))
        if said:
            assert abs(a - b) > max(high_a - low_a, high_b - low_b) - 0.002
            assert float(said) == pytest.approx(abs(a - b), abs=0.0015)
        else:
            assert abs(a - b) < max(high_a - low_a, high_b - low_b) + 0.002


@pytest.mark.parametrize("way", OPTIMIZERS)
def test_no_optimizer_is_best_at_an_end_of_its_sweep(way: str) -> None:
    rows = read(parts()["optimizers"])["rows"]
    tried, ended = sweep(rows, way), repeated(rows, way)
    assert min(ended, key=lambda lr: ended[lr].mean) not in (min(tried), max(tried))


def test_the_best_rates_are_repeated_with_the_other_seeds() -> None:
    part = parts()["optimizers"]
    again = part.further([run.labels | {"loss": abs(run.labels["lr"] - 0.01)} for run, _ in part.first()])
    rates = {way: [(run.labels["lr"], seed) for run, seed in again if run.labels["way"] == way] for way in OPTIMIZERS}
    assert rates["Adam"] == [(0.01, 1), (0.01, 2)]
    assert rates["SGD"] == [(0.1, 1), (0.1, 2)]


def test_the_parts_take_less_than_90_minutes() -> None:
    fast, slow = {"tokens": 12_000, "tokens_per_s": 2_000}, {"tokens": 12_000, "tokens_per_s": 2, "seconds": 6.5}
    assert minutes([fast, slow, {"loss": None, "tokens": 5000}]) == pytest.approx((2 + 6 + 6.5 + 2) / 2 / 60)
    taken = {part.name: minutes(read(part)["rows"]) for part in FINISHED}
    assert sum(taken.values()) < 90
    assert f"take about {sum(taken.values()):.0f} minutes on 2 cores" in PAGE.read_text(encoding="utf-8")


def test_the_page_is_of_these_results() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m examples.chapter"


@pytest.mark.parametrize("part", FINISHED, ids=lambda part: part.name)
def test_pictures_are_of_these_results_and_have_words(part: Part) -> None:
    for theme in INK:
        picture = (PICTURES / f"{part.name}-{theme}.svg").read_text(encoding="utf-8")
        assert drawn_from(picture) == digest_of(read(part)["rows"]), "run python -m examples.chapter"
    assert len(part.picture.split()) > 5
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"(chapter/{part.name}-{theme}.svg#only-{theme})" in text for theme in INK)
    assert len(list(PICTURES.iterdir())) == len(FINISHED) * len(INK)
    assert {file.stem for file in RESULTS.iterdir()} == {each.name for each in FINISHED}
