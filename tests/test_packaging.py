"""Tests of imports, of the contents of wheel and sdist, of file reading, and of how `make` treats torch."""

import ast
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from support.sources import tree_of

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = ("", ".losses", ".optim", ".models", ".mtp", ".data", ".train", ".plan", ".clean", ".integrations", ".cli")


def run_python(code: str, *argv: str) -> str:
    """Return the output of `code` in a new interpreter that finds this checkout first."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def parsed(folder: str) -> dict[Path, ast.Module]:
    files = {path: tree_of(path) for path in sorted((ROOT / folder).rglob("*.py"))}
    assert len(files) > 1, f"no source found in {folder}"
    return files


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [node.module or ""]
    return []


def dotted(node: ast.AST) -> str:
    """Return a.b.c as it is written, and nothing for what is no name."""
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return owner and f"{owner}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def at_import(node: ast.AST) -> list[ast.AST]:
    """Return the nodes below that run at import: everything except function bodies."""
    found = []
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            found += [child, *at_import(child)]
    return found


def test_kernels_folder_is_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s and s.origin else '')"
    origin = run_python(code).strip()  # empty, or Hugging Face's where that is installed
    assert not origin.startswith(str(ROOT / "kernels"))


def test_kernels_never_import_llmfast():
    for path, tree in parsed("kernels/llmfast_kernels").items():
        for node in ast.walk(tree):
            for name in imported(node):
                assert name.split(".")[0] != "llmfast", f"{path}:{node.lineno} imports {name}"


def test_llmfast_has_no_kernels_and_imports_no_triton():
    for path, tree in parsed("llmfast").items():
        for node in at_import(tree):
            for name in imported(node):
                assert name.split(".")[0] != "triton", f"{path}:{node.lineno} imports {name} at module level"
        for node in ast.walk(tree):
            attribute = dotted(node) == "triton.jit"
            name = (
                isinstance(node, ast.ImportFrom) and node.module == "triton" and "jit" in [a.name for a in node.names]
            )
            assert not (attribute or name), f"{path}:{node.lineno} uses triton.jit"


def test_imports_without_triton_and_without_starting_cuda():
    """Import each module in its own process, which has torch and nothing else."""
    code = """if True:
        import importlib, os, sys
        sys.modules["triton"] = None
        import torch
        for name in sys.argv[1:]:
            child = os.fork()
            if child == 0:
                importlib.import_module(name)
                os._exit(torch.cuda.is_initialized())
            assert os.waitpid(child, 0)[1] == 0, name
            print(name)"""
    modules = [f"llmfast{name}" for name in PUBLIC]
    assert run_python(code, *modules).split() == modules


def test_import_is_quick():
    code = """if True:
        import torch, time
        start = time.process_time()  # other processes' time is not ours
        import llmfast, llmfast.losses, llmfast.optim
        print(time.process_time() - start)"""
    limit, seconds = 0.1, []
    while len(seconds) < 5 and min(seconds, default=limit) >= limit:  # the best of five, without trying on in vain
        seconds.append(float(run_python(code)))
    assert min(seconds) < limit, seconds


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build the sdist of this checkout, and the wheel from that sdist."""
    for needed in ("build", "hatchling", "hatch_vcs"):
        pytest.importorskip(needed, reason=f"{needed} builds the packages; it is in the `test` extra")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def copied_examples() -> list[Path]:
    """Return the files of examples/ that a package contains: of the chapter, only its settings."""
    files = [path for path in (ROOT / "examples").iterdir() if path.is_file()]
    return [*files, *(ROOT / "examples" / "chapter").glob("*.toml")]


def test_wheel_holds_the_two_packages_only(built: dict[str, Path]) -> None:
    wheel = zipfile.ZipFile(built["wheel"])
    names = wheel.namelist()
    top = {name.split("/")[0] for name in names}
    (info,) = [name for name in top if name.endswith(".dist-info")]
    assert top == {"llmfast", "llmfast_kernels", info}
    assert {"llmfast/py.typed", "llmfast_kernels/py.typed", f"{info}/licenses/LICENSE"} <= set(names)
    assert b"License-Expression: Apache-2.0" in wheel.read(f"{info}/METADATA").splitlines()
    sources = {str(path.relative_to(ROOT)) for path in parsed("llmfast")}
    sources |= {str(path.relative_to(ROOT / "kernels")) for path in parsed("kernels/llmfast_kernels")}
    examples = {f"llmfast/_examples/{path.relative_to(ROOT / 'examples')}" for path in copied_examples()}
    assert {name for name in names if name.startswith("llmfast/_examples/")} == examples
    assert {name for name in names if name.endswith(".py") and name not in examples} == sources


def test_sdist_holds_what_builds_the_wheel_only(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    files = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md", "PKG-INFO", ".gitignore"}
    assert {name for name in names if "/" not in name} == files
    assert {"/".join(name.split("/")[:2]) for name in names if name.startswith("kernels/")} == {
        "kernels/README.md",
        "kernels/llmfast_kernels",
    }
    assert {name.split("/")[0] for name in names if "/" in name} == {"llmfast", "kernels", "examples"}
    examples = {str(path.relative_to(ROOT)) for path in copied_examples()}
    assert {name for name in names if name.startswith("examples/") and Path(name).suffix} == examples
    sources = {str(path.relative_to(ROOT)) for folder in ("llmfast", "kernels") for path in parsed(folder)}
    assert {name for name in names if name.endswith(".py") and name not in examples} == sources


A_STEP = """if True:
    import importlib.metadata, sys
    from pathlib import Path
    import torch, llmfast, llmfast.losses, llmfast.optim, llmfast_kernels.terms
    site = Path(sys.prefix).resolve()
    for module in (llmfast, llmfast_kernels.terms):
        assert site in Path(module.__file__).resolve().parents, module.__file__
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(10, 4, requires_grad=True)
    optimizer = llmfast.optim.FusedAdamW([hidden, weight])
    loss = llmfast.losses.linear_cross_entropy(hidden, weight, torch.arange(6))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(hidden @ weight.T, torch.arange(6)))
    loss.backward()
    optimizer.step()
    from llmfast.cli import main
    assert main(["examples", "copies"]) == 0
    sys.path[:0] = ["copies"]
    import tiny_gpt
    print(llmfast.__version__)"""


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_installs_into_an_empty_environment(built: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Provide torch and other requirements by a .pth file, so that nothing is downloaded."""
    env = tmp_path / "env"
    venv.create(env, symlinks=True)
    (site,) = env.glob("lib/python*/site-packages")
    assert not list(site.iterdir())
    flags = ["--no-deps", "--no-index", "--no-build-isolation", "--no-cache-dir", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *flags, "--target", str(site), str(built[kind])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    version = built["wheel"].name.split("-")[1]
    info = f"llmfast_torch-{version}.dist-info"
    assert {path.name for path in site.iterdir()} - {"bin"} == {"llmfast", "llmfast_kernels", info}
    others = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    (site / "others.pth").write_text("\n".join(others))
    done = subprocess.run([env / "bin" / "python", "-I", "-c", A_STEP], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["copies/README.md", version]
    copies = {path.relative_to(tmp_path / "copies") for path in (tmp_path / "copies").rglob("*.*")}
    assert {path.relative_to(ROOT / "examples") for path in copied_examples()} <= copies


def test_the_version_is_the_tag(tmp_path: Path) -> None:
    pytest.importorskip("hatch_vcs", reason="it reads the version; it is in the `test` extra")
    if shutil.which("git") is None:
        pytest.skip("no git")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    # Nothing of the caller's may reach it, neither a repository nor a version.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "SETUPTOOLS_SCM", "VCS_"))}

    def version() -> str:
        command = [sys.executable, "-m", "hatchling", "version"]
        return subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True).stdout.strip()

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, env=env, check=True, capture_output=True)

    assert version() == "0.1.dev0"  # a tarball
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    assert version().startswith("0.1.dev1+g")  # no tag in sight
    git("-c", "tag.gpgsign=false", "tag", "-a", "v1.2.3", "-m", "1.2.3")
    assert version() == "1.2.3"
    git("commit", "--allow-empty", "-m", "second")
    assert version().startswith("1.2.4.dev1+g")


def test_a_folder_on_the_path_has_a_version_too() -> None:
    code = """if True:
        import importlib.metadata
        def version(name):
            raise importlib.metadata.PackageNotFoundError(name)
        importlib.metadata.version = version
        import llmfast
        print(llmfast.__version__)"""
    assert run_python(code).strip() == "0+unknown"


# What runs whatever a file says. torch.load is looked at by itself: it takes tensors alone if it is told to.
RUNS_WHAT_IT_READS = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads", "joblib.load", "marshal.load"),
    *("marshal.loads", "shelve.open", "yaml.load", "yaml.unsafe_load", "eval", "exec", "os.system", "pd.read_pickle"),
}


@pytest.mark.parametrize("folder", ["llmfast", "kernels/llmfast_kernels", "examples"])
def test_no_file_that_is_read_can_run_code(folder: str) -> None:
    """SECURITY.md names the exception: what torch.distributed.checkpoint itself does."""
    told = ("weights_only", "allow_pickle", "trust_remote_code")
    for path, tree in parsed(folder).items():
        nodes = list(ast.walk(tree))
        calls = [node for node in nodes if isinstance(node, ast.Call)]
        for call in calls:
            name, where = dotted(call.func), f"{path}:{call.lineno}"
            assert name not in RUNS_WHAT_IT_READS, f"{where} calls {name}"
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg in told}
            if name == "torch.load":
                assert given.get("weights_only") == "True", f"{where}: torch.load without weights_only=True"
            assert given.get("allow_pickle", "False") == "False", f"{where}: allow_pickle"
            assert given.get("trust_remote_code", "False") == "False", f"{where}: trust_remote_code"
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.serialization", "pickle"):
                names = {alias.name for alias in node.names} & {"load", "loads", "Unpickler"}
                assert not names, f"{path}:{node.lineno} hides where {names} comes from"


NETWORK = {"aiohttp", "asyncio", "ftplib", "http", "httpx", "huggingface_hub", "requests", "smtplib", "socket"}
NETWORK |= {"socketserver", "ssl", "telnetlib", "urllib", "urllib3", "webbrowser", "websockets", "xmlrpc"}


@pytest.mark.parametrize("folder", ["llmfast", "kernels/llmfast_kernels"])
def test_nothing_of_ours_uses_the_network(folder: str) -> None:
    for path, tree in parsed(folder).items():
        for node in ast.walk(tree):
            for name in imported(node):
                assert name.split(".")[0] not in NETWORK, f"{path}:{node.lineno} imports {name}"
            assert dotted(node) not in ("torch.hub", "torch.distributed.TCPStore"), path


@pytest.fixture
def setup_env() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        (None, False),
        ("1.13.1", False),
        ("2.7.1+cu126", False),
        ("2.8.0a0+34c6371d24.nv25.08", False),  # before 2.8 for pip, so pip would replace it whatever we say
        ("2.8.0", True),
        ("2.13.0+cpu", True),
        ("2.14.0.dev20260601+rocm7.0", True),
        ("3.0.0", True),
    ],
)
def test_setup_knows_which_torch_fits(setup_env, version, fits):
    assert setup_env.compatible(version) is fits


@pytest.mark.parametrize(
    ("torch", "triton", "expected"),
    [
        (None, {}, ["torch==2.13.0", "triton==3.7.1  # why", "rich==15.0.0"]),
        ("2.7.0", {"triton": "3.3.0"}, ["torch==2.13.0", "triton==3.7.1  # why", "rich==15.0.0"]),
        ("2.13.0+cpu", {}, ["triton==3.7.1  # why", "rich==15.0.0", "torch==2.13.0+cpu"]),
        ("2.13.0+cpu", {"triton": "3.9.0"}, ["rich==15.0.0", "torch==2.13.0+cpu"]),
        ("2.12.0+rocm6.4", {}, ["rich==15.0.0", "torch==2.12.0+rocm6.4"]),
    ],
)
def test_setup_fixes_torch_to_the_one_that_is_kept(setup_env, tmp_path, torch, triton, expected):
    tested = tmp_path / "constraints.txt"
    tested.write_text("torch==2.13.0\ntriton==3.7.1  # why\nrich==15.0.0\n")
    written = setup_env.write_constraints(tmp_path, tested, {"torch": torch, "triton": triton})
    assert written.read_text().splitlines() == expected


def test_setup_lets_pip_find_triton_under_another_name(setup_env, tmp_path):
    setup_env.claim_triton({"site": str(tmp_path), "torch": "2.9.0", "triton": {"triton-rocm": "3.5.0+git1"}})
    (found,) = importlib.metadata.distributions(name="triton", path=[str(tmp_path)])
    assert found.version == "3.5.0+git1"
    assert found.files is not None
    assert {file.name for file in found.files} == {"INSTALLER", "METADATA", "RECORD"}
