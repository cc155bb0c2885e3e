"""The page of results, from rows that are made up."""

import json
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from benchmarks import report, store
from llmfast.checkup.shapes import MODELS, TOKENS

GPU_SECONDS = {gpu.name: 0.01 for gpu in report.GPUS}


def rows() -> list[dict[str, Any]]:
    counted = dict(dtype="bfloat16", moved=3e9, calls=9, syncs=1, peak_bytes=3 << 30, seconds=GPU_SECONDS)
    loss = counted | dict(operation="linear_cross_entropy", dot_flops=6e12, by_name={"mm": 2e9, "x_kernel": 1e9})
    found: list[dict[str, Any]] = []
    for way in ("llmfast", "Liger"):
        found.append(
            dict(
                section="compared",
                way=way,
                size={"N": 1024, "D": 256, "V": 16384},
                dram=22.5 * 1024 * 16384,
                errors={"loss": 1e-6, "hidden": 2e-3, "weight": 3e-3},
            )
            | loss
        )
        for D, V in MODELS.values():
            for N in TOKENS:
                found.append(dict(section="real sizes", way=way, size={"N": N, "D": D, "V": V}, dram=3e9) | loss)
        for size in ("124M", "8B"):
            adamw = counted | dict(operation="adamw", by_name={}, dot_flops=0, dtype="float32")
            found.append(dict(section="optimizers", way=way, size={"parameters": size}, dram=28 * 8030261248) | adamw)
    for way, seconds in (("llmfast", 0.5), ("torch", 1.0)):
        found.append(
            dict(
                section="clock",
                operation="adamw",
                shape="10M",
                dtype="torch.float32",
                way=way,
                seconds=seconds,
                ratio=0.5 / seconds,
                spread=0.01,
            )
        )
    found.append(dict(section="clock", operation="adamw", shape="8B", way="torch", failure="out of memory"))
    found.append(dict(section="kernels", kernel="rows", shape="N=1", seconds=2e-5, bandwidth=2e12, share=0.913))
    for launch in ("f(x=1)", "f(x=2)"):  # look the same
        for target in ("sm_80", "sm_90"):
            found.append(
                dict(
                    section="machine code",
                    kernel="f",
                    launch=launch,
                    target=target,
                    ways=["Liger, float32 sums"],
                    registers=40,
                    spill_bytes=0,
                    shared_bytes=64,
                    warps=4,
                    occupancy=0.5,
                    access_bits=[32, 128],
                    loops=[{"instructions": 9, "access_bits": [128], "tensor_cores": 0}],
                )
            )
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    store.write(folder, rows())
    return folder


def test_the_page_says_what_was_found(folder: Path) -> None:
    page = (folder / "README.md").read_text()
    assert "| llmfast | 22.50 |" in page
    columns = ("Llama-3", 16384), ("Llama-3", 8192), ("Gemma-2", 16384), ("Qwen-3", 16384)
    sizes = [(N, *MODELS[model]) for model, N in columns]
    held = [f"{3 - 2 * D * (N + V) / 2**30:.2f}" for N, D, V in sizes]
    assert f"| llmfast | {' | '.join(held)} | 10.0 | 0.3 | 3 | 2.0e-3 | 3.0e-3 |" in page
    assert "| llmfast | 10.0 | 10.0 | 10.0 | 10.0 |" in page
    assert "| torch | 10M, float32" not in page and "| 10M, float32 | torch | 1 s | 0.50 ± 0.01 |" in page
    assert "| 8B | torch | out of memory |" in page
    assert "| rows | N=1 | 20 µs | 2,000 | 91% |" in page
    assert page.count("| `f` | Liger | 40 40 | 0 0 | 64 | 50% | 32/128 | 9 of 128 bits |") == 1
    assert "modelled seconds = sum over launches" in page and "*modelled*" in page
    assert "NaN" not in page and "nan" not in page


def test_every_figure_of_a_comparison(tmp_path: Path) -> None:
    """N V logits, K heads of them; products of matrices over 2 N D V of each."""
    counted = dict(
        section="compared",
        way="ours",
        dram=3.2e6,
        moved=6.4e6,
        dot_flops=9.6e7,
        peak_bytes=5 << 19,
        syncs=7,
        errors={"loss": 1e-6, "hidden": 2e-3, "weight": 3e-3, "logits": 4e-3},
    )
    N_V, errors = {"N": 400, "V": 2000}, "2.5 | 7 | 1.0e-06 | 2.0e-03 | 3.0e-03"
    for operation, size, cells in (
        ("linear_cross_entropy", N_V | {"D": 10}, f"4.00 | 8.00 | 6.00 | {errors}"),
        ("mtp_cross_entropy", N_V | {"D": 10, "K": 4}, f"1.00 | 2.00 | 1.50 | {errors}"),
        ("cross_entropy", N_V, "4.00 | 8.00 | 2.5 | 7 | 1.0e-06 | 4.0e-03"),
    ):
        page = report.compared([counted | {"operation": operation, "size": size}], tmp_path)
        assert f"| ours | {cells} |" in page, operation


def test_its_pictures_are_there_and_reproducible(folder: Path) -> None:
    page = (folder / "README.md").read_text()
    pictures = {name: (folder / name).read_bytes() for name in ("time.svg", "memory.svg", "optimizers.svg")}
    for name, content in pictures.items():
        assert f"]({name})" in page and content.startswith(b"<?xml")
    report.draw(folder)
    assert pictures == {name: (folder / name).read_bytes() for name in pictures}
    assert page == (folder / "README.md").read_text()


def test_the_page_in_the_repository_is_of_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generate the page again and compare every figure."""
    folder = Path(report.__file__).parent / "results"
    for name in ("results.json", "mtp.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    monkeypatch.setattr(report, "picture", lambda *args: None)
    report.draw(tmp_path)
    found, wanted = ((f / "README.md").read_text().splitlines() for f in (folder, tmp_path))
    assert len(wanted) > 300
    for line, (mine, again) in enumerate(zip_longest(found, wanted), 1):
        assert mine == again, f"line {line} of {folder / 'README.md'}: run python -m benchmarks.report"


def test_results_are_data_a_line_a_row(folder: Path) -> None:
    text = (folder / "results.json").read_text()
    results = json.loads(text)
    assert results["rows"] == rows() and len(text.splitlines()) == len(rows()) + 3
    about = results["about"]
    assert about["versions"]["torch"] and about["cpu"] and len(about["date"]) == 10


def test_a_page_of_a_part_of_the_suite(tmp_path: Path) -> None:
    store.write(tmp_path, [row for row in rows() if row["section"] == "clock"])
    page = (tmp_path / "README.md").read_text()
    assert "Measured time" in page and "Machine code" not in page and ".svg" not in page


def test_a_part_replaces_its_own_rows(tmp_path: Path) -> None:
    store.write(tmp_path, rows())
    clock = [row | {"seconds": 0.25} for row in rows() if row["section"] == "clock" and "seconds" in row]
    for _ in range(2):
        store.write(tmp_path, clock, part=True)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row for row in results["rows"] if row["section"] == "clock"] == clock
    assert [row for row in results["rows"] if row["section"] != "clock"] == [
        r for r in rows() if r["section"] != "clock"
    ]
    assert [again["what"] for again in results["about"]["again"]] == [["clock: adamw"]]
    assert "clock: adamw: run again on" in (tmp_path / "README.md").read_text()


def test_a_part_writes_results_only_where_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    conftest = pytest.importorskip(
        "benchmarks.conftest", reason="needs pytest-benchmark: make bench", exc_type=ImportError
    )
    written: list[Any] = []
    monkeypatch.setattr(store, "write", lambda folder, rows, part: written.append((folder, part)))
    for keyword, folder in (("kernels", None), ("kernels", tmp_path), ("", None)):
        chosen = dict(keyword=keyword, markexpr="", deselect=None, collectonly=False, benchmark_disable=False)
        config = mock.Mock(stash={conftest.RESULTS: [{}]}, args=[str(Path(conftest.__file__).parent)])
        config.option = SimpleNamespace(results=folder, **chosen)
        conftest.pytest_sessionfinish(SimpleNamespace(config=config), 0)
    assert written == [(tmp_path, True), (store.default_folder(), False)]
