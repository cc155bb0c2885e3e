"""The command `llmfast compile`: binaries of kernels for a GPU that need not be here.

Triton compiles a kernel when it is first launched, which takes a second or more, again on every machine. This command
fills a folder such as Triton keeps for itself: a process that has its path in `TRITON_CACHE_DIR` compiles nothing.
"""

import argparse
import json
import os
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmfast import optim
from llmfast._commands import fail
from llmfast._dispatch import kernels_on_cpu
from llmfast._gpus import ARCHITECTURES
from llmfast.optim.formats import PARAM_FORMATS

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OPTIMIZERS: dict[str, Any] = {
    "adamw": optim.FusedAdamW,
    "adam": optim.FusedAdam,
    "sgd": optim.FusedSGD,
    "rmsprop": optim.FusedRMSprop,
    "adagrad": optim.FusedAdagrad,
    "lion": optim.FusedLion,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments to the parser of `llmfast compile`; `run` takes the parsed result."""
    parser.description = (
        "Compile the kernels of losses and optimizers for a GPU, here or elsewhere, so that no process has to compile "
        "them at its first step. Triton must have the same version in both places."
    )
    parser.add_argument("--gpu", required=True, choices=sorted(ARCHITECTURES), help="the GPU to compile for")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a folder for the binaries")
    parser.add_argument("--at", type=Path, metavar="DIR", help="where that folder will be used (default: --out)")
    parser.add_argument("--vocab", type=int, default=128256, help="classes of the loss (default: %(default)s)")
    parser.add_argument("--softcap", action="store_true", help="also for a loss whose logits are capped")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=["bfloat16"],
        help="dtypes of logits and parameters (default: bfloat16)",
    )
    parser.add_argument(
        "--optimizers",
        nargs="*",
        choices=OPTIMIZERS,
        default=["adamw"],
        help="with and without clipping (default: adamw)",
    )
    parser.add_argument(
        "--master-weights", choices=[name for name in PARAM_FORMATS if name], help="extra bits of 16-bit parameters"
    )
    parser.add_argument(
        "--state-dtype", choices=["8bit", *DTYPES], help="dtype of the states (default: the parameters')"
    )


def run(args: argparse.Namespace) -> int:
    """Compile what the arguments say; return the exit code, 2 for a user's mistake."""
    try:
        from llmfast_kernels.ahead import compiled_ahead
    except ImportError as e:
        return fail(f"compiling needs Triton: {e}")
    if args.vocab < 1:
        return fail(f"--vocab must be at least 1; got {args.vocab}")
    options = {"master_weights": args.master_weights, "state_dtype": DTYPES.get(args.state_dtype, args.state_dtype)}
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with compiled_ahead(ARCHITECTURES[args.gpu], args.out) as binaries:
            for name in args.dtypes:
                launch_losses(DTYPES[name], args.vocab, softcap=None)
                if args.softcap:
                    launch_losses(DTYPES[name], args.vocab, softcap=30.0)
                for optimizer in args.optimizers:
                    launch_optimizers(OPTIMIZERS[optimizer], DTYPES[name], **options)
        at = (args.at or args.out).absolute()
        settle(args.out, at)
    except (ValueError, TypeError, RuntimeError, OSError) as e:
        return fail(str(e))
    print(f"{len(binaries)} binaries for {args.gpu} ({ARCHITECTURES[args.gpu]}) in {args.out}")
    print(f"use them with TRITON_CACHE_DIR={at}")
    return 0


def launch_losses(dtype: torch.dtype, V: int, *, softcap: float | None) -> None:
    """Launch the kernels of losses without options, on logits of `V` columns and on the linear loss's own slab."""
    from llmfast_kernels import cross_entropy as rows
    from llmfast_kernels.scale import scale
    from llmfast_kernels.terms import Targets, Terms, Upstream

    N, factor = 16, _empty((), torch.float32)
    targets, terms = Targets(_empty((N, 1), torch.int64)), Terms(V, softcap=softcap)
    for width in {V, -(-V // 64) * 64}:
        logits = _empty((N, width), dtype)
        for d_logits, grad_scale in product((None, logits), (None, factor)):
            rows.cross_entropy(logits, targets, terms, V=V, d_logits=d_logits, grad_scale=grad_scale)
        made = rows.cross_entropy(logits, targets, terms, V=V)
        rows.cross_entropy_backward(logits, targets, terms, made.softmax, Upstream(made.loss), V=V, d_logits=logits)
        scale(logits, factor)
    summed = _empty((4096,), torch.float32)
    scale(summed, factor)
    scale(summed, factor, out=_empty((4096,), dtype))


def launch_optimizers(cls: Any, dtype: torch.dtype, **options: Any) -> None:
    """Launch steps of an optimizer with and without clipping."""
    given = {name: value for name, value in options.items() if value is not None}
    if dtype == torch.float32:
        given.pop("master_weights", None)
    for clipping in ({}, {"max_grad_norm": 1.0}):
        params = [_empty((64, 64), dtype).requires_grad_() for _ in range(2)]
        for p in params:
            p.grad = _empty((64, 64), dtype)
        with kernels_on_cpu():
            cls(params, lr=1e-3, **clipping, **given).step()


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="cpu")


def settle(folder: Path, at: Path) -> None:
    """Let Triton find the files of `folder` where it will be: it notes the absolute path of each."""
    for group in folder.glob("*/__grp__*.json"):
        noted = json.loads(group.read_text(encoding="utf-8"))
        noted["child_paths"] = {name: str(at / group.parent.name / name) for name in noted["child_paths"]}
        beside = group.with_name(group.name + ".tmp")
        beside.write_text(json.dumps(noted), encoding="utf-8")
        os.replace(beside, group)
