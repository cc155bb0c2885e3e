"""The command `llmfast examples`. tests/examples runs what it copies, tests/test_packaging.py copies from a wheel."""

from pathlib import Path

import pytest

from llmfast.cli import main

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_a_copy_of_all_programs_and_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "deep" / "examples"
    assert main(["examples", str(to)]) == 0
    assert capsys.readouterr().out == f"{to / 'README.md'}\n"
    programs = [*EXAMPLES.glob("*.*"), *(EXAMPLES / "chapter").glob("*.toml")]
    assert len(programs) > 20
    assert {path.relative_to(to) for path in to.rglob("*.*")} == {path.relative_to(EXAMPLES) for path in programs}
    for path in programs:
        assert (to / path.relative_to(EXAMPLES)).read_bytes() == path.read_bytes()


def test_a_link_to_no_folder_yet_is_kept(tmp_path: Path) -> None:
    (tmp_path / "to").symlink_to(tmp_path / "disk" / "to")
    assert main(["examples", str(tmp_path / "to")]) == 0
    assert (tmp_path / "to").is_symlink() and (tmp_path / "disk" / "to" / "README.md").exists()


def test_what_is_there_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text("mine")
    for to in (tmp_path, tmp_path / "mine.py"):
        assert main(["examples", str(to)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.endswith(
            f"{to} exists and is not an empty folder: remove it first, or choose another DIR\n"
        )
        assert captured.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]
    (tmp_path / "empty").mkdir()
    assert main(["examples", str(tmp_path / "empty")]) == 0
    assert (tmp_path / "empty" / "tiny_gpt.py").exists()
