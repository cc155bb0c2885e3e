"""The command `llmfast compile`: binaries of kernels for a GPU that need not be here.

Triton compiles a kernel when it is first launched, which takes a second or more, again on every machine. This command
fills a folder like Triton's own cache: a process with `TRITON_CACHE_DIR` set to it need not compile these kernels.
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
        "them at its first step. Both machines need the same versions of llmfast and Triton."
    )
    parser.add_argument("--gpu", required=True, choices=sorted(ARCHITECTURES), help="the GPU to compile for")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a folder for the binaries")
    parser.add_argument("--at", type=Path, metavar="DIR", help="where that folder will be used (default: --out)")
    parser.add_argument("--vocab", type=int, default=128256, help="size of the vocabulary (default: %(default)s)")
    parser.add_argument("--softcap", action="store_true", help="also compile the loss with capped logits")
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
        help="optimizers to compile, each with and without clipping (default: adamw)",
    )
    parser.add_argument(
        "--master-weights",
        choices=[name for name in PARAM_FORMATS if name],
        help="how 16-bit parameters keep their precision, as in the optimizers (default: not at all)",
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
                compile_losses(DTYPES[name], args.vocab, softcap=None)
                if args.softcap:
                    compile_losses(DTYPES[name], args.vocab, softcap=30.0)
                for optimizer in args.optimizers:
                    compile_optimizers(OPTIMIZERS[optimizer], DTYPES[name], **options)
        at = (args.at or args.out).absolute()
        settle(args.out, at)
    except (ValueError, TypeError, RuntimeError, OSError) as e:
        return fail(str(e))
    print(f"{len(binaries)} binaries for {args.gpu} ({ARCHITECTURES[args.gpu]}) in {args.out}")
    print(f"use them with TRITON_CACHE_DIR={at}")
    return 0


def compile_losses(dtype: torch.dtype, V: int, *, softcap: float | None) -> None:
    """Call the launchers of losses with no option but `softcap`; inside `compiled_ahead` they only compile.

    The logits have `V` columns, as a user's have, or a multiple of 64, as the linear loss pads its own.
    """
    from llmfast_kernels import cross_entropy as row_kernels
    from llmfast_kernels.scale import scale
    from llmfast_kernels.terms import Targets, Terms, Upstream

    N, factor = 16, _zeros((), torch.float32)
    targets, terms = Targets(_zeros((N, 1), torch.int64)), Terms(V, softcap=softcap)
    for width in {V, -(-V // 64) * 64}:
        logits = _zeros((N, width), dtype)
        for d_logits, grad_scale in product((None, logits), (None, factor)):
            row_kernels.cross_entropy(logits, targets, terms, V=V, d_logits=d_logits, grad_scale=grad_scale)
        made = row_kernels.cross_entropy(logits, targets, terms, V=V)
        upstream = Upstream(made.loss)
        row_kernels.cross_entropy_backward(logits, targets, terms, made.softmax, upstream, V=V, d_logits=logits)
        scale(logits, factor)
    summed = _zeros((4096,), torch.float32)  # a gradient that was summed in float32, scaled where it is or when rounded
    scale(summed, factor)
    scale(summed, factor, out=_zeros((4096,), dtype))


def compile_optimizers(cls: Any, dtype: torch.dtype, **options: Any) -> None:
    """Call an optimizer's step with and without clipping; inside `compiled_ahead` its kernels are only compiled."""
    given = {name: value for name, value in options.items() if value is not None}
    if dtype == torch.float32:  # such parameters keep their precision
        given.pop("master_weights", None)
    for clipping in ({}, {"max_grad_norm": 1.0}):
        params = [_zeros((64, 64), dtype).requires_grad_() for _ in range(2)]
        for p in params:
            p.grad = _zeros((64, 64), dtype)
        with kernels_on_cpu():
            cls(params, lr=1e-3, **clipping, **given).step()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="cpu")


def settle(folder: Path, at: Path) -> None:
    """Rewrite the absolute paths in Triton's group files, so that the folder works at `at`."""
    for group in folder.glob("*/__grp__*.json"):
        noted = json.loads(group.read_text(encoding="utf-8"))
        noted["child_paths"] = {name: str(at / group.parent.name / name) for name in noted["child_paths"]}
        beside = group.with_name(group.name + ".tmp")
        beside.write_text(json.dumps(noted), encoding="utf-8")
        os.replace(beside, group)
