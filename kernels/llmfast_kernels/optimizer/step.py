"""The update itself: one launch for every tensor of a table, in which each program updates one chunk of one tensor."""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from llmfast_kernels.launch import FP_FUSION, Choice, Tile, warps
from llmfast_kernels.optimizer.formats import (
    LARGEST,
    PARAM_FORMATS,
    PER_SCALE,
    decoded,
    encoded,
    noise,
    scrambled,
)
from llmfast_kernels.optimizer.rules import Rule
from llmfast_kernels.optimizer.table import (
    CHUNK,
    COEFFICIENTS,
    COEFFICIENTS_WIDTH,
    FIRST_CHUNK,
    NUMEL,
    ROW,
    ROW_WIDTH,
    TRITON_TYPES,
    column,
    elements,
    load_columns,
    load_grad,
    pointer,
    store_grad,
)

PARAM, LOW, EMA = column(ROW, "param"), column(ROW, "low"), column(ROW, "ema")
STATE0, STATE1, STATE2 = column(ROW, "state0"), column(ROW, "state1"), column(ROW, "state2")
SCALE0, SCALE1 = column(ROW, "scale0"), column(ROW, "scale1")
RUN, STRIDE, OFFSET = column(ROW, "run"), column(ROW, "stride"), column(ROW, "offset")
ACTIVE, GRAD_FACTOR = column(COEFFICIENTS, "active"), column(COEFFICIENTS, "grad_factor")
DECAY, L2, EMA_RATE = column(COEFFICIENTS, "decay"), column(COEFFICIENTS, "l2"), column(COEFFICIENTS, "ema_rate")
KEY0, KEY1 = column(COEFFICIENTS, "key0"), column(COEFFICIENTS, "key1")


class Tensors(NamedTuple):
    """Pointers to the first elements of one row's tensors, or None."""

    param: Any
    grad: Any
    state0: Any
    state1: Any
    state2: Any
    scale0: Any
    scale1: Any
    low: Any
    ema: Any


class Scalars(NamedTuple):
    """Coefficients of one row."""

    grad_factor: Any
    decay: Any
    l2: Any
    ema_rate: Any
    own: Any  # the rule's


class Place(NamedTuple):
    """Keys of one row's noise, and where its elements lie in the whole tensor."""

    key0: Any
    key1: Any
    run: Any
    stride: Any
    offset: Any


# Bytes are loaded and stored for two tiles at a time, 16 per thread: these are the pair's functions. HALF says which
# tile of the pair this is; it is None where tiles go alone.


@triton.jit
def load_pair(ptr, start, BLOCK: tl.constexpr):
    """Load the bytes of two consecutive tiles; return something unused for a wider tensor, or for None."""
    pair = 0, 0
    if ptr is not None:
        if ptr.dtype.element_ty.primitive_bitwidth == 8:
            both = tl.load(elements(ptr, start, tl.arange(0, 2 * BLOCK), True))
            pair = tl.split(tl.permute(tl.reshape(both, (2, BLOCK)), (1, 0)))
    return pair


@triton.jit
def store_pair(ptr, start, first, second, BLOCK: tl.constexpr):
    """Store the bytes of two consecutive tiles; do nothing for a wider tensor, or for None."""
    if ptr is not None:
        if ptr.dtype.element_ty.primitive_bitwidth == 8:
            both = tl.reshape(tl.permute(tl.join(first, second), (1, 0)), (2 * BLOCK,))
            tl.store(elements(ptr, start, tl.arange(0, 2 * BLOCK), True), both)


@triton.jit
def load(ptr, pair, HALF: tl.constexpr, mask):
    """Load this tile; of bytes that were loaded as a pair, return this tile's half."""
    if ptr is None:
        x = None
    elif HALF is None or ptr.dtype.element_ty.primitive_bitwidth != 8:
        x = tl.load(ptr, mask=mask)
    else:
        x = pair[HALF]
    return x


@triton.jit
def store(ptr, x, HALF: tl.constexpr, mask):
    """Store this tile, except for bytes that will be stored as a pair."""
    if ptr is not None:
        if HALF is None or ptr.dtype.element_ty.primitive_bitwidth != 8:
            tl.store(ptr, x, mask=mask)


@triton.jit
def read_state(ptr, pair, scale_ptr, HALF: tl.constexpr, mask, group_mask):
    """Load a state as float32; return None if there is no pointer."""
    x = load(ptr, pair, HALF, mask)
    state = None
    if ptr is not None:
        if ptr.dtype.element_ty.is_int():
            state = decoded(x, tl.load(scale_ptr, mask=group_mask), ptr.dtype.element_ty.is_int_signed())
        else:
            state = x.to(tl.float32)
    return state


@triton.jit
def write_state(ptr, x, scale_ptr, random, HALF: tl.constexpr, mask, group_mask):
    """Store a state and its scales, except for bytes that will be stored as a pair; return it as it is stored."""
    if ptr is not None:
        if ptr.dtype.element_ty.is_int():
            x = x if mask is None else tl.where(mask, x, 0.0)
            x, scale = encoded(x, random, ptr.dtype.element_ty.is_int_signed())
            store(ptr, x, HALF, mask)
            tl.store(scale_ptr, scale, mask=group_mask)
        else:
            x = x.to(ptr.dtype.element_ty)
            store(ptr, x, HALF, mask)
    return x


@triton.jit
def update_tile(
    at,
    start,
    count,
    grad_aligned,
    scalars,
    place,
    pairs,
    RULE: tl.constexpr,
    READ: tl.constexpr,
    WRITE: tl.constexpr,
    NOISE: tl.constexpr,
    STRIDED: tl.constexpr,
    ZERO: tl.constexpr,
    UNSCALE: tl.constexpr,
    HALF: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update BLOCK elements from `start` on: all of them if ALIGNED, else the first `count`.

    The gradient may lie anywhere even if ALIGNED, unless `grad_aligned` is true, or None.

    If this is one tile of a pair, `pairs` holds the bytes of both. The new states 0 and 1 and the new low bits are
    returned as they are to be stored; the caller stores those that are bytes of a pair.
    """
    group = tl.arange(0, BLOCK // PER_SCALE)
    i = tl.arange(0, BLOCK)
    mask = None if ALIGNED else i < count
    group_mask = None if ALIGNED else group * PER_SCALE < count

    p_ptr = elements(at.param, start, i, ALIGNED)
    s0_ptr = elements(at.state0, start, i, ALIGNED)
    s1_ptr = elements(at.state1, start, i, ALIGNED)
    s2_ptr = elements(at.state2, start, i, ALIGNED)
    low_ptr = elements(at.low, start, i, ALIGNED)
    scale0_ptr = elements(at.scale0, start // PER_SCALE, group, False)
    scale1_ptr = elements(at.scale1, start // PER_SCALE, group, False)
    grad_type: tl.constexpr = at.grad.dtype.element_ty

    raw = load_grad(at.grad, start, i, mask, grad_aligned, ALIGNED)
    g = raw.to(tl.float32) * scalars.grad_factor
    p = READ(p_ptr, mask, load(low_ptr, pairs[2], HALF, mask))
    s0 = read_state(s0_ptr, pairs[0], scale0_ptr, HALF, mask, group_mask)
    s1 = read_state(s1_ptr, pairs[1], scale1_ptr, HALF, mask, group_mask)
    s2 = read_state(s2_ptr, None, None, None, mask, None)
    bounded = tl.clamp(p, -LARGEST, LARGEST)  # an infinite weight, less its decay, is infinite and not NaN
    g += scalars.l2 * bounded
    change, s0, s1, s2 = RULE(g, s0, s1, s2, scalars.own)
    p -= scalars.decay * bounded + change  # one rounding at p's own size

    bits = None
    more = None
    more_for_s1 = None
    if NOISE:
        e = start + i
        e = e // place.run * place.stride + e % place.run if STRIDED else e
        bits = noise(e + place.offset, place.key0, place.key1)
        more = scrambled(bits ^ 0x68E31DA4)
        more_for_s1 = more >> 16
    stored, low = WRITE(p, bits, at.param.dtype.element_ty)
    tl.store(p_ptr, stored, mask=mask)
    if low_ptr is not None:
        low = low.to(at.low.dtype.element_ty)
        store(low_ptr, low, HALF, mask)
    s0 = write_state(s0_ptr, s0, scale0_ptr, more, HALF, mask, group_mask)
    s1 = write_state(s1_ptr, s1, scale1_ptr, more_for_s1, HALF, mask, group_mask)
    write_state(s2_ptr, s2, None, None, None, mask, None)
    ema_ptr = elements(at.ema, start, i, ALIGNED)
    if ema_ptr is not None:
        ema = tl.load(ema_ptr, mask=mask)
        tl.store(ema_ptr, ema + scalars.ema_rate * (p - ema), mask=mask)
    if UNSCALE:
        # grad_factor is negative to maximize, but the stored gradient keeps its sign. If it is stored earlier, SGD on
        # bfloat16 spills a register for sm_90.
        unscaled = (raw.to(tl.float32) * tl.abs(scalars.grad_factor)).to(grad_type)
        store_grad(at.grad, start, i, unscaled, mask, grad_aligned, ALIGNED)
    if ZERO:
        store_grad(at.grad, start, i, tl.zeros_like(i).to(grad_type), mask, grad_aligned, ALIGNED)
    return s0, s1, low


@triton.jit
def update_chunk(
    at,
    start,
    count,
    aligned,
    grad_aligned,
    scalars,
    place,
    RULE: tl.constexpr,
    READ: tl.constexpr,
    WRITE: tl.constexpr,
    NOISE: tl.constexpr,
    STRIDED: tl.constexpr,
    ZERO: tl.constexpr,
    UNSCALE: tl.constexpr,
    PAIRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update `count` elements from `start` on.

    Whole tiles go 16 bytes at a time. The end of a tensor, and parameters and states that do not lie on 16 bytes, go
    masked. Gradients are often views into a buffer of all gradients, anywhere: they have a branch of their own.
    """
    # Tiles that are updated one after the other, and share accesses to bytes.
    TILES: tl.constexpr = 2 if PAIRED else 1  # pyright: ignore[reportAssignmentType]
    whole = tl.where(aligned, count // (TILES * BLOCK) * (TILES * BLOCK), 0)
    none = None, None, None
    for offset in range(0, whole, TILES * BLOCK):
        here = start + offset
        pairs = none
        if PAIRED:
            pairs = load_pair(at.state0, here, BLOCK), load_pair(at.state1, here, BLOCK), load_pair(at.low, here, BLOCK)
        made = ()
        for i in tl.static_range(TILES):
            made += (  # type: ignore[assignment]
                update_tile(
                    at,
                    here + i * BLOCK,
                    BLOCK,
                    grad_aligned,
                    scalars,
                    place,
                    pairs,
                    RULE=RULE,
                    READ=READ,
                    WRITE=WRITE,
                    NOISE=NOISE,
                    STRIDED=STRIDED,
                    ZERO=ZERO,
                    UNSCALE=UNSCALE,
                    HALF=i if PAIRED else None,
                    ALIGNED=True,
                    BLOCK=BLOCK,
                ),
            )
        if PAIRED:
            first, second = made  # type: ignore[misc]
            store_pair(at.state0, here, first[0], second[0], BLOCK)
            store_pair(at.state1, here, first[1], second[1], BLOCK)
            store_pair(at.low, here, first[2], second[2], BLOCK)
    for offset in range(whole, count, BLOCK):
        update_tile(
            at,
            start + offset,
            count - offset,
            grad_aligned,
            scalars,
            place,
            none,
            RULE=RULE,
            READ=READ,
            WRITE=WRITE,
            NOISE=NOISE,
            STRIDED=STRIDED,
            ZERO=ZERO,
            UNSCALE=UNSCALE,
            HALF=None,
            ALIGNED=False,
            BLOCK=BLOCK,
        )


@triton.jit
def update_kernel(
    # in
    table_ptr,  # (T, ROW_WIDTH) int64
    grads_ptr,  # (T,) int64 addresses
    coefficients_ptr,  # (T, COEFFICIENTS_WIDTH + OWN_COEFFICIENTS) f32
    chunk_tensor_ptr,  # (programs,) int32: the row of the table whose tensor a program works on
    # flags
    RULE: tl.constexpr,  # the rule's function
    OWN_COEFFICIENTS: tl.constexpr,  # how many coefficients the rule has of its own
    READ: tl.constexpr,  # functions of the parameter's format
    WRITE: tl.constexpr,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    STATE0_TYPE: tl.constexpr,  # None for a state that does not exist
    STATE1_TYPE: tl.constexpr,
    STATE2_TYPE: tl.constexpr,
    LOW_TYPE: tl.constexpr,  # of what the format keeps besides the parameter, or None
    NOISE: tl.constexpr,  # whether something is rounded stochastically
    STRIDED: tl.constexpr,  # whether tensors are pieces whose elements are not consecutive in the whole tensor
    AVERAGED: tl.constexpr,  # whether an average of the parameter is kept
    ZERO: tl.constexpr,  # whether to leave zeros in the gradient
    UNSCALE: tl.constexpr,  # whether to leave in the gradient what the update took of it
    PAIRED: tl.constexpr,  # whether some elements are bytes, which go 16 at a time only with two tiles together
    # tile
    BLOCK: tl.constexpr,
):
    """Update one chunk."""
    chunk = tl.program_id(0)
    t = tl.load(chunk_tensor_ptr + chunk)
    row = table_ptr + t * ROW_WIDTH
    g = tl.load(grads_ptr + t)
    start = (chunk - tl.load(row + FIRST_CHUNK)) * CHUNK  # int64: a tensor can pass 2**31 elements
    count = tl.minimum(tl.load(row + NUMEL) - start, CHUNK).to(tl.int32)
    c = coefficients_ptr + t * (COEFFICIENTS_WIDTH + OWN_COEFFICIENTS)
    if tl.load(c + ACTIVE) == 0.0:
        if ZERO:
            if g != 0:
                for offset in range(0, count, BLOCK):
                    i = offset + tl.arange(0, BLOCK)
                    tl.store(
                        elements(pointer(g, GRAD_TYPE), start, i, False), tl.zeros_like(i).to(GRAD_TYPE), mask=i < count
                    )
        return

    scalars = Scalars(
        grad_factor=tl.load(c + GRAD_FACTOR),
        decay=tl.load(c + DECAY),
        l2=tl.load(c + L2),
        ema_rate=tl.load(c + EMA_RATE),
        own=load_columns(c + COEFFICIENTS_WIDTH, None, None, OWN_COEFFICIENTS),
    )
    keys = c.to(tl.pointer_type(tl.uint32))
    place = Place(
        key0=tl.load(keys + KEY0),
        key1=tl.load(keys + KEY1),
        run=tl.load(row + RUN),
        stride=tl.load(row + STRIDE),
        offset=tl.load(row + OFFSET),
    )
    p = tl.load(row + PARAM)
    s0, s1, s2 = tl.load(row + STATE0), tl.load(row + STATE1), tl.load(row + STATE2)
    scale0, scale1 = tl.load(row + SCALE0), tl.load(row + SCALE1)
    low, ema = tl.load(row + LOW), tl.load(row + EMA)
    at = Tensors(
        param=pointer(p, PARAM_TYPE),
        grad=pointer(g, GRAD_TYPE),
        state0=pointer(s0, STATE0_TYPE),
        state1=pointer(s1, STATE1_TYPE),
        state2=pointer(s2, STATE2_TYPE),
        scale0=pointer(scale0, tl.float32),
        scale1=pointer(scale1, tl.float32),
        low=pointer(low, LOW_TYPE),
        ema=pointer(ema, tl.float32) if AVERAGED else None,
    )
    aligned = ((p | s0 | s1 | s2 | low | ema) & 15) == 0
    grad_aligned = (g & 15) == 0
    update_chunk(
        at,
        start,
        count,
        # Unaligned, threads would exchange unscaled gradients in order to store them one by one.
        aligned & grad_aligned if UNSCALE else aligned,
        None if UNSCALE else grad_aligned,
        scalars,
        place,
        RULE=RULE,
        READ=READ,
        WRITE=WRITE,
        NOISE=NOISE,
        STRIDED=STRIDED,
        ZERO=ZERO,
        UNSCALE=UNSCALE,
        PAIRED=PAIRED,
        BLOCK=BLOCK,
    )


# 8 elements per thread keep two 16-byte loads of each float32 tensor in flight, for all tensors at once. With 16, for
# the sake of bytes, registers spill: so two tiles share the accesses to bytes and are updated one after the other.
# Tensors of different widths are loaded by different threads, which exchange values inside the loop and wait for each
# other there: so few threads.
TILE = Choice(Tile(8, 128), Tile(8, 64), Tile(8, 256))
PAIRED_TILE = Choice(Tile(8, 128), Tile(8, 64), Tile(8, 256))


def tile(chosen: Tile) -> dict[str, int]:
    """Return block and warps."""
    return {"BLOCK": chosen.elements * chosen.threads, "num_warps": warps(chosen.threads)}


BYTES = torch.int8, torch.uint8


class Kind(NamedTuple):
    """Properties shared by all tensors of one launch."""

    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    state_dtypes: tuple[torch.dtype | None, ...]  # three; None for a state that does not exist
    master: str | None  # a key of PARAM_FORMATS
    low_dtype: torch.dtype | None  # of what that format keeps besides the parameter
    averaged: bool
    strided: bool

    @property
    def coded(self) -> bool:
        """Return True if some states are 8-bit codes."""
        return any(dtype in BYTES for dtype in self.state_dtypes)

    @property
    def paired(self) -> bool:
        """Return True if some elements are bytes, for which two tiles are updated together."""
        return self.coded or self.low_dtype in BYTES


@cache
def _constants(rule: Rule, kind: Kind, chosen: Tile) -> dict[str, Any]:
    param = PARAM_FORMATS[kind.master]
    state0, state1, state2 = (TRITON_TYPES[dtype] for dtype in kind.state_dtypes)
    return {
        "RULE": rule.update,
        "OWN_COEFFICIENTS": len(rule.coefficients),
        "READ": param.read,
        "WRITE": param.write,
        "PARAM_TYPE": TRITON_TYPES[kind.param_dtype],
        "GRAD_TYPE": TRITON_TYPES[kind.grad_dtype],
        "STATE0_TYPE": state0,
        "STATE1_TYPE": state1,
        "STATE2_TYPE": state2,
        "LOW_TYPE": TRITON_TYPES[kind.low_dtype],
        "NOISE": kind.coded or param.noisy,
        "STRIDED": kind.strided,
        "AVERAGED": kind.averaged,
        "PAIRED": kind.paired,
        **tile(chosen),
        **FP_FUSION,
    }


def update(
    table: Tensor,  # (T, columns of ROW) int64
    grads: Tensor,  # (T,) int64
    coefficients: Tensor,  # (T, columns of coefficients_record) f32
    chunk_tensor: Tensor,  # (programs,) int32
    *,
    rule: Rule,
    kind: Kind,
    zero: bool,
    unscale: bool,
) -> None:
    """Take one step with every tensor of the table, in one launch whatever T is."""
    if chunk_tensor.shape[0] > 0:
        flags = {"ZERO": zero, "UNSCALE": unscale and not zero}
        constants = _constants(rule, kind, (PAIRED_TILE if kind.paired else TILE).chosen)
        with device_of(table):
            update_kernel[(chunk_tensor.shape[0],)](table, grads, coefficients, chunk_tensor, **flags, **constants)
