"""The losses as operators of torch, which is how `torch.compile` takes them whole.

Imported only while `torch.compile` traces: outside, the way through torch's dispatcher would cost more host time than
the launches. An operator takes and returns tensors and numbers, so a loss is laid out flat, field by field, with the
schema that the fields' types spell out. A result that a call does not have is an empty tensor. Operators write over
nothing and alias nothing, so the compiler may plan memory around them; `inplace=True` therefore means nothing here.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmfast.losses.from_hidden import LinearCrossEntropy
from llmfast.losses.from_logits import CrossEntropy
from llmfast.losses.loss import Loss, Returned
from llmfast.losses.options import Reduction
from llmfast.losses.plain import times
from llmfast.losses.targets import NO_STATS
from llmfast_kernels.teaching import TAUGHT
from llmfast_kernels.terms import Softmax


def _revision(folder: Path) -> str:
    """Return a name for the code of the losses.

    torch keeps compiled graphs on disk, and finds them by the graph of the forward pass. What `_differentiate` adds is
    not part of that: a graph that an earlier llmfast compiled, or one that divides elsewhere, would be taken for the
    present one. So every operator takes this name, and where gradients are divided, as an argument.
    """
    code = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return hashlib.sha256(code).hexdigest()[:12]


REVISION = _revision(Path(__file__).parent)

# What the schema calls a type. Integers may be symbols while tracing.
_KINDS: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    int | None: "SymInt?",
    float | None: "float?",
    bool: "bool",
    Reduction: "str",
    torch.dtype: "ScalarType",
}
# Not laid out: a bias is one of the inputs, and the others do not exist inside torch.compile.
_LEFT_OUT = ("bias", "group", "inplace", "accumulate_into", "functional")


def _layout(record: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield path and schema type of each field of a dataclass, in order, those of records within it included."""
    for field in fields(record):
        if is_dataclass(field.type):
            yield from (((field.name, *path), kind) for path, kind in _layout(field.type))
        elif field.name not in _LEFT_OUT:
            yield (field.name,), _KINDS[field.type]


def _built(record: Any, values: Iterator[Any]) -> Any:
    """Make a record from the values of its layout."""
    given = {}
    for field in fields(record):
        if is_dataclass(field.type):
            given[field.name] = _built(field.type, values)
        elif field.name not in _LEFT_OUT:
            given[field.name] = next(values)
    return record(**given)


class Operators:
    """The forward and backward operator of a loss, `llmfast::<name>` and `llmfast::<name>_backward`.

    Both take the inputs, the loss laid out flat, and which gradients are wanted. Forward returns the loss's value, the
    rows' results, and the gradients of the inputs as far as they are made there.
    """

    def __init__(self, name: str, loss: type[Loss], inputs: dict[str, str], changes: dict[str, Any]) -> None:
        """Register both operators.

        Args:
            name: What the operators are called.
            loss: The loss they compute.
            inputs: Names of the inputs, and their schema types.
            changes: Fields of the loss that are different in an operator.
        """
        self._loss, self._count, self._changes = loss, len(inputs), changes
        layout = list(_layout(loss))
        self._paths = [path for path, _ in layout]
        arguments = [*inputs.items(), *(("_".join(path), kind) for path, kind in layout)]
        arguments += [("revision", "str"), ("wants", "bool[]")]
        self._tensors = [kind.startswith("Tensor") for _, kind in arguments]
        taken = ", ".join(f"{kind} {name}" for name, kind in arguments)
        rows = "Tensor peak, Tensor total, Tensor entropy, Tensor taught"
        made = ", ".join(["Tensor"] * len(inputs))
        self.forward = torch.library.custom_op(
            f"llmfast::{name}",
            self._forward,
            mutates_args=(),
            schema=f"({taken}) -> (Tensor, Tensor, {rows}, Tensor, Tensor, Tensor, {made})",
        )
        self.backward = torch.library.custom_op(
            f"llmfast::{name}_backward",
            self._backward,
            mutates_args=(),
            schema=f"({taken}, {rows}, Tensor? d_loss, Tensor? d_lse, Tensor? d_entropy) -> ({made})",
        )
        self.forward.register_fake(self._fake_forward)
        self.backward.register_fake(self._fake_backward)
        self.forward.register_autograd(self._differentiate, setup_context=self._save)

    def flatten(self, loss: Loss) -> list[Any]:
        """Return the fields of a loss, and the revision, in the order of the operators' arguments."""
        values = []
        for path in self._paths:
            value: Any = loss
            for name in path:
                value = getattr(value, name)
            values.append(value)
        return [*values, f"{REVISION} {'early' if loss.divides_early else 'late'}"]

    def _split(self, arguments: Sequence[Any]) -> tuple[tuple[Tensor | None, ...], Loss, tuple[bool, ...]]:
        """Return inputs, loss and wanted gradients."""
        *flat, wants = arguments
        given = iter(flat[self._count :])
        loss = _built(self._loss, given)
        return tuple(flat[: self._count]), replace(loss, **self._changes), tuple(wants)

    def _forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        inputs, loss, wants = self._split(arguments)
        rows, lse, kept = loss.forward(inputs, wants)
        value = loss.value(rows)
        made = None if kept is None else kept.made
        gradients = (None,) * self._count if made is None else made
        return (
            value.clone() if value is rows.loss else value,
            rows.loss,
            *(rows.loss.new_empty(0) if t is None else t for t in (rows.peak, rows.total, rows.entropy, rows.taught)),
            rows.loss.new_empty(0, dtype=torch.int64) if rows.argmax is None else rows.argmax,
            rows.loss.new_empty(0) if lse is None else lse,
            rows.loss.new_empty(0, dtype=torch.int64) if rows.places is None else rows.places,
            *(
                rows.loss.new_empty(0) if g is None else g.to(dtype)
                for g, dtype in zip(gradients, self._made_dtypes(inputs, loss))
            ),
        )

    def _fake_forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        inputs, loss, wants = self._split(arguments)
        N = loss.targets.classes.shape[0]
        value = loss.targets.classes.shape if loss.logprobs else (N,) if loss.reduction == "none" else ()
        some = N if loss.stats else 0
        empty = loss.targets.classes.new_empty
        wide = torch.promote_types(loss.dtype, torch.float32)
        makes = loss.makes_gradients(inputs, wants)
        return (
            empty(value, dtype=wide),
            *(empty(size, dtype=wide) for size in (N, N, N, some)),
            empty(0 if loss.targets.probabilities is None else (N, TAUGHT), dtype=wide),
            empty(some, dtype=torch.int64),
            empty(some, dtype=wide),
            empty(loss.targets.classes.shape if loss.places else 0, dtype=torch.int64),
            *(
                empty(t.shape, dtype=dtype) if makes and want and t is not None else empty(0, dtype=wide)
                for t, want, dtype in zip(inputs, wants, self._made_dtypes(inputs, loss))
            ),
        )

    def _made_dtypes(self, inputs: Sequence[Tensor | None], loss: Loss) -> list[torch.dtype]:
        """Return the dtypes of gradients made in forward: sums over chunks are float32, the first input has none."""
        first, wide = inputs[0], torch.promote_types(loss.dtype, torch.float32)
        return [loss.dtype if first is None else first.dtype] + [wide] * (self._count - 1)

    def _backward(self, *arguments: Any) -> Any:
        *flat, peak, total, entropy, taught, d_loss, d_lse, d_entropy = arguments
        inputs, loss, wants = self._split(flat)
        loss, returned = loss.weighted(Returned(d_loss, d_lse, d_entropy))
        softmax = Softmax(peak, total, entropy, None if loss.targets.probabilities is None else taught)
        found = loss.backward(inputs, wants, softmax, returned, None)
        return _outputs([peak.new_empty(0) if g is None else g for g in found])

    def _fake_backward(self, *arguments: Any) -> Any:
        *flat, peak, _, _, _, _, _, _ = arguments
        inputs, _, wants = self._split(flat)
        return _outputs(
            [t.new_empty(t.shape) if want and t is not None else peak.new_empty(0) for t, want in zip(inputs, wants)]
        )

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, token_loss, peak, total, entropy, taught, argmax, _, places, *made = output
        ctx.save_for_backward(
            peak,
            total,
            entropy,
            taught,
            *made,
            *(value for value, is_tensor in zip(inputs, self._tensors) if is_tensor),
        )
        ctx.others = [value for value, is_tensor in zip(inputs, self._tensors) if not is_tensor]
        ctx.mark_non_differentiable(token_loss, peak, total, taught, argmax, places, *made)
        ctx.set_materialize_grads(False)

    def _differentiate(self, ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        d_loss, _, _, _, d_entropy, _, _, d_lse, *_ = upstream
        rows, saved = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        made, tensors, others = saved[: self._count], iter(saved[self._count :]), iter(ctx.others)
        arguments = [next(tensors if is_tensor else others) for is_tensor in self._tensors]
        inputs, loss, wants = self._split(arguments)
        if not loss.stats:  # what comes back then belongs to an empty tensor
            d_lse = d_entropy = None
        found: Any
        if loss.makes_gradients(inputs, wants) and d_loss is not None and d_lse is d_entropy is None:
            factor = loss.late_factor(d_loss)
            wide = torch.promote_types(factor.dtype, torch.float32)
            found = [times(g.to(wide), factor).to(t.dtype) if t is not None else None for g, t in zip(made, inputs)]
        else:
            found = self.backward(*arguments, *rows, d_loss, d_lse, d_entropy)
            found = [found] if isinstance(found, Tensor) else found
        gradients = [g if want else None for g, want in zip(found, wants)]
        return (*gradients, *(None for _ in arguments[self._count :]))


def _outputs(tensors: list[Tensor]) -> Any:
    """Return tensors as an operator must return them: one by itself, several as a tuple."""
    return tuple(tensors) if len(tensors) > 1 else tensors[0]


OPERATORS: dict[type[Loss], Operators] = {
    CrossEntropy: Operators("cross_entropy", CrossEntropy, {"logits": "Tensor"}, {}),
    LinearCrossEntropy: Operators(
        "linear_cross_entropy",
        LinearCrossEntropy,
        {"hidden": "Tensor", "weight": "Tensor", "bias": "Tensor?"},
        {"functional": True},
    ),
}


def apply(loss: Loss, grad_enabled: bool, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """Compute a loss as `EagerLoss.apply` does, by its operator."""
    operators = OPERATORS[type(loss)]
    wants = [grad_enabled and t is not None and t.requires_grad for t in inputs]
    value, token_loss, _, _, entropy, _, argmax, lse, places, *_ = operators.forward(
        *inputs, *operators.flatten(loss), wants
    )
    stats = token_loss, lse, entropy, argmax, places if loss.places else None
    return (value, *(stats if loss.stats else NO_STATS))
