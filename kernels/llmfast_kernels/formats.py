"""How weights and optimizer states are kept in fewer bits than they are computed with.

Everything here turns float32 registers into what is stored, or back. `llmfast/optim/formats.py` says the same in plain
torch, bit for bit. See `kernels/README.md` for how to read a kernel.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(128)  # elements that share the scale of an 8-bit state


@triton.jit
def scrambled(x):
    """A permutation of 32 bits in which every input bit reaches every output bit (Wellons' lowbias32)."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_keys(seed, step, tensor):
    """Two 32-bit keys for the noise of one tensor at one step. `seed` is int64, the others uint32."""
    k = scrambled(scrambled(scrambled(seed.to(tl.uint32)) + (seed >> 32).to(tl.uint32)) + step)
    return scrambled(k + tensor), scrambled(scrambled(k ^ 0x85EBCA6B) + tensor)


@triton.jit
def noise(element, key0, key1):
    """32 random bits an element: of its place in the whole tensor (int64), whoever computes it, and of the keys."""
    x = element.to(tl.uint32) ^ key0
    x += (element >> 32).to(tl.uint32) * 0x9E3779B9
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= key1
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def is_finite_bf16(high):
    return (high & 0x7F80) != 0x7F80


@triton.jit
def split(x, LOW_BITS: tl.constexpr):
    """float32 -> the nearest bfloat16, and the `LOW_BITS` bits (16: all, 8: rounded) by which it misses, as integers.

    Adding half a unit before cutting would turn the NaN of all ones into -0.0: what is not finite goes its own way.
    """
    SHIFT: tl.constexpr = 16 - LOW_BITS
    bits = x.to(tl.int32, bitcast=True)
    kept = (bits + ((1 << SHIFT) >> 1)) >> SHIFT
    high = (kept + (1 << (LOW_BITS - 1))) >> LOW_BITS
    low = kept - (high << LOW_BITS)
    high = tl.where(x != x, (bits >> 16) | 0x40, high)
    low = tl.where(is_finite_bf16(high), low, 0)
    return high.to(tl.int16).to(tl.bfloat16, bitcast=True), low


@triton.jit
def joined(high, low, LOW_BITS: tl.constexpr):
    """What `split` split. Somebody may have written inf or NaN into the high half since: it stays what it is."""
    high = high.to(tl.int16, bitcast=True).to(tl.int32)
    low = tl.where(is_finite_bf16(high), low.to(tl.int32), 0)
    return ((high << 16) + (low << (16 - LOW_BITS))).to(tl.float32, bitcast=True)


@triton.jit
def rounded_stochastically(x, random):
    """float32 -> bfloat16, up or down with the odds that make it right on average; takes the low 16 random bits."""
    bits = x.to(tl.int32, bitcast=True)
    high = (bits + (random & 0xFFFF).to(tl.int32)) >> 16
    finite = is_finite_bf16(bits >> 16)
    high = tl.where(finite, high, tl.where(x != x, (bits >> 16) | 0x40, bits >> 16))
    return high.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def spread(scale, BLOCK: tl.constexpr):
    """A number a group (BLOCK / GROUP,) -> the same for each of its elements (BLOCK,)."""
    return tl.reshape(tl.broadcast_to(scale[:, None], (BLOCK // GROUP, GROUP)), (BLOCK,))


@triton.jit
def decoded(code, scale, SIGNED: tl.constexpr):
    """8-bit codes (BLOCK,) and each group's largest magnitude (BLOCK / GROUP,) -> float32.

    Codes are dense near zero, where most values are: magnitude (code / 127)^2 with a sign, (code / 255)^4 without. A
    second moment without sign is a square, so that both reach down to 1/16000 of a gradient.
    """
    scales = spread(scale, code.shape[0])
    if SIGNED:
        r = code.to(tl.float32) * (1.0 / 127.0)
        x = r * tl.abs(r) * scales
    else:
        r = code.to(tl.float32) * (1.0 / 255.0)
        x = r * r * (r * r) * scales
    return x


@triton.jit
def encoded(x, random, SIGNED: tl.constexpr):
    """float32 (BLOCK,) -> codes of 8 bits, and the scale of each group (BLOCK / GROUP,); takes 16 random bits.

    Rounded up or down with the odds that make the decoded value right on average: rounded to nearest, an average that
    moves by less than half a code a step would never move. Only what is not zero and has no sign never becomes zero,
    since an update is divided by its root. NaN and inf become their group's scale, and make the group NaN and inf.
    """
    magnitude = tl.abs(x)
    # As integers, magnitudes keep their order, and NaN comes out on top.
    bits = tl.reshape(magnitude.to(tl.int32, bitcast=True), (x.shape[0] // GROUP, GROUP))
    scale = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
    y = magnitude * spread(tl.where(scale > 0.0, 1.0 / scale, 0.0), x.shape[0])
    chance = (random & 0xFFFF).to(tl.float32) * (1.0 / 65536.0)
    if SIGNED:
        y *= 127.0 * 127.0
        below = tl.floor(tl.sqrt(y))
        up = (y - below * below) > chance * (2.0 * below + 1.0)
        code = tl.minimum(below + tl.where(up, 1.0, 0.0), 127.0)
        stored = tl.where(x < 0.0, -code, code).to(tl.int8)
    else:
        y *= 255.0 * 255.0 * 255.0 * 255.0
        below = tl.floor(tl.sqrt(tl.sqrt(y)))
        square, next_square = below * below, (below + 1.0) * (below + 1.0)
        up = (y - square * square) > chance * (next_square * next_square - square * square)
        code = tl.minimum(below + tl.where(up, 1.0, 0.0), 255.0)
        stored = tl.where(x > 0.0, tl.maximum(code, 1.0), 0.0).to(tl.int32).to(tl.uint8)
    return stored, scale
