"""The environment that `make` completes: which torch is kept or borrowed, what pip installs, and what goes wrong."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup_env() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class World:
    """Interpreters, what each holds, and processes, which are only noted."""

    def __init__(self, module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.venv, self.commands = folder / "venv", list[list[str]]()
        self.site = folder / "site"
        self.site.mkdir()
        self.here = {"python": [3, 11], "abi": "x", "site": str(self.site), "torch": None, "torch_folders": []}
        self.here["triton"] = {}
        self.base = {**self.here, "site": "elsewhere"}
        self.trial, self.pip, self.ensured, self.errors = "", 0, 0, {"pip": 0}
        monkeypatch.setattr(module, "probe", self.probe)
        monkeypatch.setattr(module, "make_venv", lambda venv: self.commands.append(["made", str(venv)]))
        monkeypatch.setattr(subprocess, "run", self.run)

    @property
    def borrowed(self) -> Path:
        return self.site / "llmfast_borrowed_torch.pth"

    def probe(self, python: Path) -> dict[str, Any]:
        if python == Path(sys.executable):
            return self.base
        found = {"torch": self.base["torch"], "torch_folders": self.base["torch_folders"]}
        return {**self.here, **found} if self.borrowed.exists() else self.here

    def run(self, command: list[str], **options: Any) -> Any:
        self.commands.append(command)
        if "import torch" in command:
            return SimpleNamespace(returncode=bool(self.trial), stderr=self.trial)
        if "install" in command:
            return SimpleNamespace(returncode=self.pip)
        return SimpleNamespace(returncode=self.ensured if "ensurepip" in command else self.errors["pip"])


@pytest.fixture
def world(setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(setup_env, tmp_path, monkeypatch)


def setup(module: ModuleType, world: World, monkeypatch: pytest.MonkeyPatch, *more: str) -> list[str]:
    """Set up, and return the constraints that pip is given."""
    world.venv.mkdir(exist_ok=True)
    monkeypatch.setattr(sys, "argv", ["setup_env", "--venv", str(world.venv), *more])
    module.main()
    *_, command = world.commands
    extras = more[more.index("--extras") + 1] if "--extras" in more else "train"
    assert command[:6] == [str(world.venv / "bin" / "python"), "-m", "pip", "install", "-e", f"{ROOT}[{extras}]"]
    assert command[6:] == ["-c", str(world.venv / "llmfast-constraints.txt")]
    return Path(command[7]).read_text().split()


def test_without_any_torch_pip_installs_the_tested_versions(
    setup_env: ModuleType, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    tested = tmp_path / "constraints.txt"
    tested.write_text("torch==2.13.0\n")
    given = ["--extras", "train,test", "--constraints", str(tested)]
    assert setup(setup_env, world, monkeypatch, *given) == ["torch==2.13.0"]
    assert world.commands[0] == ["made", str(world.venv)] and not world.borrowed.exists()
    assert f"setup: installing the tested versions of {tested}\n" in capsys.readouterr().out
    assert setup(setup_env, world, monkeypatch) == []
    assert "setup: installing with pip\n" in capsys.readouterr().out


def test_a_torch_that_is_there_is_kept_and_not_asked_for_elsewhere(
    setup_env: ModuleType, world: World, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    world.here |= {"torch": "2.12.0+rocm6.4", "torch_folders": ["/here"], "triton": {"triton-rocm": "3.5.0"}}
    world.base |= {"torch": "2.13.0", "torch_folders": ["/base"]}
    assert setup(setup_env, world, monkeypatch) == ["torch==2.12.0+rocm6.4"]
    out = capsys.readouterr().out
    assert "setup: keeping torch 2.12.0+rocm6.4 of /here\n" in out and "keeping triton-rocm 3.5.0 as triton" in out
    assert (world.site / "triton-3.5.0.dist-info" / "METADATA").is_file() and not world.borrowed.exists()


def test_one_that_is_too_old_is_replaced(
    setup_env: ModuleType, world: World, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    world.here |= {"torch": "2.1.0", "torch_folders": ["/here"], "triton": {"triton-rocm": "3.5.0"}}
    assert setup(setup_env, world, monkeypatch) == []
    out = capsys.readouterr().out
    assert "keeping" not in out and "installing with pip" in out and [*world.site.iterdir()] == []


@pytest.mark.parametrize("trial", ["", "ModuleNotFoundError: No module named 'numpy'"])
def test_a_torch_of_the_interpreter_is_borrowed(
    setup_env: ModuleType, world: World, trial: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Leave to pip what torch requires and is elsewhere."""
    world.base |= {"torch": "2.13.0", "torch_folders": ["/base", "/more"]}
    world.trial = trial
    assert setup(setup_env, world, monkeypatch) == ["torch==2.13.0"]
    assert world.borrowed.read_text() == "/base\n/more\n"
    assert "setup: using torch 2.13.0 of /base\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "trial", "says"),
    [
        ({"abi": "y"}, "", ""),
        ({"torch": "2.1.0"}, "", ""),
        ({"torch": None}, "", ""),
        ({}, "x\nImportError: libcudart\n", "setup: not using torch 2.13.0 of /base: ImportError: libcudart\n"),
        ({}, "No module named 'torch._C'", "setup: not using torch 2.13.0 of /base: No module named 'torch._C'\n"),
    ],
)
def test_one_that_does_not_fit_is_left(
    setup_env: ModuleType,
    world: World,
    change: dict[str, Any],
    trial: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    world.base |= {"torch": "2.13.0", "torch_folders": ["/base"], **change}
    world.trial = trial
    assert setup(setup_env, world, monkeypatch) == [] and not world.borrowed.exists()
    out = capsys.readouterr().out
    assert says in out and "using torch" in out if says else "using torch" not in out


def test_what_goes_wrong_says_what_to_do(
    setup_env: ModuleType, world: World, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    world.pip = 1
    with pytest.raises(SystemExit, match=r"pip failed, see above\. .* let pip choose: make CONSTRAINTS= \.\.\."):
        setup(setup_env, world, monkeypatch)
    world.pip, world.errors["pip"] = 0, 1
    assert setup(setup_env, world, monkeypatch) == [] and "setup: adding pip to" in capsys.readouterr().out
    world.ensured = 1
    with pytest.raises(SystemExit, match=r"has no pip, and ensurepip failed\. Remove it and try again\."):
        setup(setup_env, world, monkeypatch)
    world.here["python"] = [3, 9]
    with pytest.raises(SystemExit, match=r"was made with Python \[3, 9\], which is too old"):
        setup(setup_env, world, monkeypatch)

    def broken(python: Path) -> dict[str, Any]:
        raise OSError("no such file")

    monkeypatch.setattr(setup_env, "probe", broken)
    with pytest.raises(SystemExit, match=r"does not run \(no such file\); was its interpreter moved\? Remove"):
        setup(setup_env, world, monkeypatch)


def test_an_interpreter_is_asked_what_it_holds(setup_env: ModuleType) -> None:
    found = setup_env.probe(Path(sys.executable))
    assert found["python"] == [*sys.version_info[:2]] and Path(found["site"]).is_dir()
    assert setup_env.compatible(found["torch"]) and all(Path(f, "torch").is_dir() for f in found["torch_folders"])


@pytest.mark.parametrize("lacking", ["venv", "ensurepip"])
def test_a_python_without_venv_is_told_its_package(
    setup_env: ModuleType, lacking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == lacking else object())
    package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    with pytest.raises(SystemExit, match=rf"lacks the venv module\. On Debian or Ubuntu: apt install {package}"):
        setup_env.make_venv(tmp_path / "venv")


@pytest.mark.parametrize("existed", [False, True])
def test_half_of_a_new_environment_is_removed(
    setup_env: ModuleType, existed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv = tmp_path / "venv"
    if existed:
        venv.mkdir()

    def failing(command: list[str], check: bool) -> None:
        assert command == [sys.executable, "-m", "venv", str(venv)] and check
        (venv / "bin").mkdir(parents=True)
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", failing)
    with pytest.raises(SystemExit, match=f"making {venv} failed, see above"):
        setup_env.make_venv(venv)
    assert venv.exists() is existed
