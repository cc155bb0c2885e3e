"""Create or complete the virtual environment used by the Makefile's commands.

An existing torch is kept: it may take several GB, or be a ROCm build or a nightly.

1. A compatible torch in the environment itself is kept.
2. Otherwise, a compatible torch that the interpreter running this script can import (from a conda environment, an
   active virtualenv, or the system) is made visible in the environment by a .pth file.
3. Otherwise, pip installs the versions of constraints.txt.

pip's own settings (PIP_* variables, pip.conf) apply as usual; they choose between CPU and CUDA builds, for example.
Everything above `PROBE` also runs on Python 3.6, so that an old Python prints a message instead of a traceback.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()
OLDEST_PYTHON = tuple(int(n) for n in re.findall(r'requires-python = ">=(\d+)\.(\d+)', PYPROJECT)[0])
OLDEST_TORCH = tuple(int(n) for n in re.findall(r'"torch>=(\d+)\.(\d+)', PYPROJECT)[0])

if sys.version_info[:2] < OLDEST_PYTHON:
    named = [f"python3.{minor}" for minor in range(30, OLDEST_PYTHON[1] - 1, -1)]
    newest = next(filter(shutil.which, named), "/path/to/" + named[-1])
    sys.exit(
        f"setup: {sys.executable} is Python {sys.version.split()[0]}, llmfast needs {named[-1][6:]} or newer. "
        f"Name another one: make PYTHON={newest} ..."
    )

# Run by any interpreter. It reads only metadata, so it is fast and does not depend on importing torch.
PROBE = """
import importlib.metadata as metadata, importlib.util as util, json, os, sys, sysconfig

def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

spec = util.find_spec("torch")
folders = []
if version("torch") and spec and spec.origin:
    folders = [os.path.dirname(os.path.dirname(spec.origin)), str(metadata.distribution("torch").locate_file(""))]
print(json.dumps({
    "python": sys.version_info[:2],
    "abi": sysconfig.get_config_var("EXT_SUFFIX"),
    "site": sysconfig.get_path("purelib"),
    "torch": version("torch") if folders else None,
    "torch_folders": list(dict.fromkeys(map(os.path.abspath, folders))),
    "triton": {name: version(name) for name in metadata.packages_distributions().get("triton", [])},
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Create or complete the virtual environment of this checkout.")
    parser.add_argument("--venv", type=Path, default=Path(".venv"))
    parser.add_argument("--extras", default="train", help="comma-separated extras of pyproject.toml")
    parser.add_argument("--constraints", type=Path, help="file with the tested versions; without it pip chooses")
    args = parser.parse_args()

    python = args.venv / "bin" / "python"
    if not os.path.lexists(python):
        make_venv(args.venv)
    env = check_venv(args.venv, python)
    if env["torch"] is None:
        env = borrow_torch(python, env)
    elif compatible(env["torch"]):
        say(f"keeping torch {env['torch']} of {env['torch_folders'][0]}")
    if compatible(env["torch"]):
        claim_triton(env)
    else:
        say(f"installing the tested versions of {args.constraints}" if args.constraints else "installing with pip")

    command = [str(python), "-m", "pip", "install", "-e", f"{ROOT}[{args.extras}]"]
    command += ["-c", str(write_constraints(args.venv, args.constraints, env))]
    if subprocess.run(command).returncode:
        sys.exit(
            "setup: pip failed, see above. The next make tries again. If the pinned versions do not fit here, "
            "let pip choose: make CONSTRAINTS= ..."
        )


def make_venv(venv: Path) -> None:
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        sys.exit(f"setup: {sys.executable} lacks the venv module. On Debian or Ubuntu: apt install {package}")
    say(f"making {venv} with Python {sys.version.split()[0]}")
    existed = venv.exists()
    try:
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    except BaseException as error:
        if not existed:
            shutil.rmtree(venv, ignore_errors=True)
        if isinstance(error, subprocess.CalledProcessError):
            sys.exit(f"setup: making {venv} failed, see above.")
        raise


def check_venv(venv: Path, python: Path) -> dict[str, Any]:
    """Return what the environment holds, after checking that its interpreter and its pip run."""
    try:
        env = probe(python)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"setup: {python} does not run ({error}); was its interpreter moved? Remove {venv} and try again.")
    if tuple(env["python"]) < OLDEST_PYTHON:
        sys.exit(f"setup: {venv} was made with Python {env['python']}, which is too old. Remove it and try again.")
    if subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode:  # as uv makes them
        say(f"adding pip to {venv}")
        if subprocess.run([str(python), "-m", "ensurepip"]).returncode:
            sys.exit(f"setup: {venv} has no pip, and ensurepip failed. Remove it and try again.")
    return env


def borrow_torch(python: Path, env: dict[str, Any]) -> dict[str, Any]:
    """Make the torch of the interpreter that runs this script visible in the environment, if it works there."""
    base = probe(Path(sys.executable))
    if not compatible(base["torch"]) or base["abi"] != env["abi"]:
        return env
    # Plain lines come after the environment's own packages on sys.path, so packages installed there take precedence.
    pth = Path(env["site"]) / "llmfast_borrowed_torch.pth"
    pth.write_text("".join(folder + "\n" for folder in base["torch_folders"]))
    trial = subprocess.run([str(python), "-c", "import torch"], stderr=subprocess.PIPE, text=True)
    # A requirement of torch in a third folder is not visible; pip will install it.
    if trial.returncode and not re.search(r"No module named '(?!torch)", trial.stderr):
        pth.unlink()
        say(f"not using torch {base['torch']} of {base['torch_folders'][0]}: {trial.stderr.strip().splitlines()[-1]}")
        return env
    say(f"using torch {base['torch']} of {base['torch_folders'][0]}")
    return probe(python)


def claim_triton(env: dict[str, Any]) -> None:
    """Tell pip that triton is installed if it was installed under another name.

    ROCm, XPU and nightly builds of torch bring it as pytorch-triton, triton-rocm and so on, in the same `triton/`
    folder. pip does not know that, and would overwrite it with the `triton` that pyproject.toml requires.
    """
    if "triton" in env["triton"] or not env["triton"]:
        return
    provider, version = next(iter(env["triton"].items()))
    info = Path(env["site"]) / f"triton-{version}.dist-info"
    info.mkdir(exist_ok=True)
    summary = f"Stands for {provider}, which holds the module. Written by llmfast's tools/setup_env.py."
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: triton\nVersion: {version}\nSummary: {summary}\n")
    (info / "INSTALLER").write_text("llmfast\n")
    (info / "RECORD").write_text("".join(f"{info.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")))
    say(f"keeping {provider} {version} as triton")


def write_constraints(venv: Path, constraints: Path | None, env: dict[str, Any]) -> Path:
    """Write the constraints with torch fixed to the kept version, and triton left to that version's own requirement."""
    lines = constraints.read_text().splitlines() if constraints else []
    if compatible(env["torch"]):
        tested = f"torch=={env['torch'].split('+')[0]}" in lines
        replaced = ("torch==",) if tested and not env["triton"] else ("torch==", "triton==")
        lines = [line for line in lines if not line.startswith(replaced)]
        lines.append(f"torch=={env['torch']}")
    path = venv / "llmfast-constraints.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def probe(python: Path) -> dict[str, Any]:
    output = subprocess.run([str(python), "-c", PROBE], check=True, stdout=subprocess.PIPE).stdout
    found: dict[str, Any] = json.loads(output)
    return found


def compatible(torch: str | None) -> bool:
    """Return True if this version satisfies pyproject.toml by pip's rules: 2.8.0a0 is older than 2.8."""
    found = re.match(r"(\d+)\.(\d+)(?:\.\d+)*(\.?dev|a|b|rc)?", torch or "")
    return found is not None and (int(found[1]), int(found[2]), not found[3]) >= (*OLDEST_TORCH, True)


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("setup: interrupted; the next make goes on.")
