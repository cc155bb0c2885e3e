"""Nothing depends on the order in which records declare their fields: a copy with all orders reversed steps alike."""

import ast
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from llmfast.optim import formats, reference
from llmfast_kernels import optimizer as kernels
from llmfast_kernels.optimizer import formats as kernel_formats

ROOT = Path(__file__).parents[2]
FOLDERS = ("kernels/llmfast_kernels/optimizer", "llmfast/optim")
FORKED = """
import os, sys
import torch._dynamo, triton

for root in sys.argv[1:]:
    if (child := os.fork()) == 0:
        break
    assert os.waitpid(child, 0)[1] == 0, root
else:
    sys.exit()
sys.path[:0] = [root, root + "/kernels"]
"""
STEPS = """
import hashlib, sys
import torch
from evidence import interpreter
from llmfast._dispatch import kernels_on_cpu
from llmfast.optim import FusedAdagrad, FusedAdamW, FusedLion, FusedRMSprop, FusedSGD
from llmfast_kernels import optimizer

interpreter.install()
F32, BF16 = torch.float32, torch.bfloat16
CASES = [
    (FusedAdamW, F32, {"amsgrad": True, "max_grad_norm": 0.5, "ema_decay": 0.9, "betas": (0.7, 0.8), "eps": 0.1}),
    (FusedAdamW, BF16, {"master_weights": "split8", "state_dtype": "8bit", "decay": "independent", "seed": 5}),
    (FusedAdamW, BF16, {"master_weights": "stochastic", "decay": "relative"}),
    (FusedSGD, F32, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True}),
    (FusedSGD, F32, {"momentum": 0.9, "nesterov": True}),
    (FusedRMSprop, F32, {"alpha": 0.7, "momentum": 0.6, "centered": True, "eps": 0.1}),
    (FusedAdagrad, F32, {"lr_decay": 0.2, "eps": 0.1}),
    (FusedLion, BF16, {"betas": (0.6, 0.8), "master_weights": "fp32"}),
]
print(optimizer.ROW.names[0], sys.modules["llmfast.optim"].__file__)
for make, dtype, options in CASES:
    torch.manual_seed(0)
    shapes = (3000,), (40, 5)
    params = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    made = make([{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": torch.tensor(0.2)}], **options)
    with kernels_on_cpu():
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape).to(dtype)
            made.step()
    hashed = hashlib.sha256()
    for p in params:
        for t in (p.detach(), *(t for _, t in sorted(made.state[p].items()))):
            hashed.update(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    print(make.__name__, hashed.hexdigest())
"""


class Reverse(ast.NodeTransformer):
    """Reverses the fields of NamedTuples and numpy records, and the entries of dicts and tuples of hyperparameters."""

    def __init__(self) -> None:
        self.reversed: list[str] = []
        self.left = {"Place", "Shard", "Bucket", "TorchCall"}

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
        is_record = [ast.unparse(base) for base in node.bases] == ["NamedTuple"] and node.name not in self.left
        if is_record and all(field.value is None for field in fields):  # defaults must come last
            self.reversed.append(node.name)
            turned = iter(fields[::-1])
            node.body = [next(turned) if isinstance(part, ast.AnnAssign) else part for part in node.body]
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "np.dtype":
            (fields,) = node.value.args
            if isinstance(fields, ast.List):
                self.reversed.append(ast.unparse(node.targets[0]))
                fields.elts.reverse()
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        if node.name in ("_rule_arguments", "_hyper"):
            self.reversed.append(node.name)
            for part in ast.walk(node):
                if isinstance(part, ast.Dict):
                    part.keys.reverse()
                    part.values.reverse()
                elif isinstance(part, ast.comprehension) and isinstance(part.iter, ast.Tuple):
                    part.iter.elts.reverse()
        return node


def results(*roots: Path) -> list[list[str]]:
    """Run each copy in a fork of one process that has imported what takes long."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FORKED + STEPS, *map(str, roots)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=roots[0].parent)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    each = len(lines) // len(roots)
    return [lines[i * each : (i + 1) * each] for i in range(len(roots))]


@pytest.mark.cpu("runs copies of the library in the interpreter")
def test_the_order_of_fields_does_not_matter(tmp_path: Path) -> None:
    for name in ("straight", "reversed"):
        for folder in ("kernels", "llmfast"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / folder, tmp_path / name / folder, ignore=ignored)
    reverse = Reverse()
    for folder in FOLDERS:
        for path in (tmp_path / "reversed" / folder).glob("*.py"):
            tree = reverse.visit(ast.parse(path.read_text()))
            path.write_text(ast.unparse(tree))
    found = reverse.reversed
    assert {"ROW", "GROUP", "COEFFICIENTS", "AdamNumbers", "AdamCoefficients", "Kind", "Rule"} <= set(found)
    assert found.count("_rule_arguments") >= 5 and "_hyper" in found
    straight, turned = results(tmp_path / "straight", tmp_path / "reversed")
    assert straight[0].startswith("param ") and turned[0].startswith("offset ")
    assert str(tmp_path) in straight[0] and str(tmp_path) in turned[0]
    assert turned[1:] == straight[1:] and len(straight) == 9


def test_both_sides_declare_the_same_rules_and_formats() -> None:
    assert {None, *formats.PARAM_FORMATS} == set(kernel_formats.PARAM_FORMATS)
    assert set(formats.PARAM_FORMATS) == set(get_args(formats.MasterWeights))
    for name, kept in formats.PARAM_FORMATS.items():
        assert kept.noisy == kernel_formats.PARAM_FORMATS[name].noisy
    for name, rule in kernels.RULES.items():
        assert {"lr", *rule.numbers} <= set(inspect.signature(getattr(reference, name)).parameters)
