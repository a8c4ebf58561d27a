"""What the append kernel may do to a head besides turning it: the RMS norm before; Hadamard transform, mirror after.

A head of head_dim channels lies in the registers of several lanes: octet `share` (8 neighbouring channels) of its first
half and the same octet of its second half, as [.., 2]. Sums run in a fixed order that atom/kernels/head_norm.py and the
cache's reference repeat in torch, each operation rounded by itself, so results are theirs bit for bit.
"""

import cutlass
from cutlass import Float32, cute

from .dsl.arithmetic import reciprocal
from .dsl.memory import pack_bf16x2
from .dsl.packed_bf16 import high_float, low_float, multiply_pairs
from .dsl.rounded_float import add_exactly, multiply_add, multiply_exactly, square_root
from .dsl.wide_access import load_floats


@cute.jit
def expand_pairs(x):
    """Pairs of bfloat16 [4, 2] -> float32 [8, 2]."""
    values = cute.make_rmem_tensor((8, 2), Float32)
    for h in cutlass.range_constexpr(2):
        for w in cutlass.range_constexpr(4):
            values[2 * w, h] = low_float(x[w, h])
            values[2 * w + 1, h] = high_float(x[w, h])
    return values


@cute.jit
def round_pairs(values, x):
    """float32 [8, 2] -> pairs of bfloat16 x [4, 2]."""
    for h in cutlass.range_constexpr(2):
        for w in cutlass.range_constexpr(4):
            x[w, h] = pack_bf16x2(values[2 * w, h], values[2 * w + 1, h])


@cute.jit
def normalize(config: cutlass.Constexpr, x, weights, eps, share):
    """head_norm.normalize_heads in place: x and weights are pairs of bfloat16 [4, 2]."""
    values = expand_pairs(x)
    squares = cute.make_rmem_tensor((8, 2), Float32)
    for h in cutlass.range_constexpr(2):
        for i in cutlass.range_constexpr(8):
            squares[i, h] = multiply_exactly(values[i, h], values[i, h])
    total = sum_in_order(config, squares, share)
    mean = multiply_exactly(total, Float32(1.0 / config.head_dim))
    factor = reciprocal(square_root(add_exactly(mean, eps)))
    for h in cutlass.range_constexpr(2):
        for w in cutlass.range_constexpr(4):
            low = multiply_exactly(values[2 * w, h], factor)
            high = multiply_exactly(values[2 * w + 1, h], factor)
            if cutlass.const_expr(config.norm == "shifted"):
                low = multiply_exactly(low, add_exactly(low_float(weights[w, h]), Float32(1.0)))
                high = multiply_exactly(high, add_exactly(high_float(weights[w, h]), Float32(1.0)))
                x[w, h] = pack_bf16x2(low, high)
            else:
                x[w, h] = multiply_pairs(pack_bf16x2(low, high), weights[w, h])


@cute.jit
def sum_in_order(config: cutlass.Constexpr, values, share):
    """atom/quant/ordered_sum.py of a head, float32 [8, 2] in each of its lanes; all of them have it."""
    sums = cute.make_rmem_tensor((8,), Float32)
    for i in cutlass.range_constexpr(8):
        sums[i] = add_exactly(values[i, 0], values[i, 1])
    for width in (4, 2, 1):
        for i in cutlass.range_constexpr(width):
            sums[i] = add_exactly(sums[i], sums[i + width])
    return sum_lanes(config, sums[0], share)


@cute.jit
def sum_lanes(config: cutlass.Constexpr, own, share):
    """What the lanes of a head have, added in the order of sum_in_order."""
    total = own
    if cutlass.const_expr(config.head_dim != 16 * config.lanes):  # noqa: SIM102  one is for the compiler
        if share >= config.head_dim // 16:  # lanes past the end repeat the last
            total = Float32(0.0)
    for step in reversed(range(config.lanes.bit_length() - 1)):
        total = add_exactly(total, cute.arch.shuffle_sync_bfly(total, offset=1 << step))
    return total


@cute.jit
def reflect(config: cutlass.Constexpr, values, address, share):
    """keys.reflect_head in place; the mirror's float32 of the lane's first octet lie at `address`."""
    mirror = cute.make_rmem_tensor((8, 2), Float32)
    products = cute.make_rmem_tensor((8, 2), Float32)
    for h in cutlass.range_constexpr(2):
        for part in cutlass.range_constexpr(2):
            found = load_floats(address + 2 * h * config.head_dim + 16 * part)
            for i in cutlass.range_constexpr(4):
                mirror[4 * part + i, h] = found[i]
                products[4 * part + i, h] = multiply_exactly(values[4 * part + i, h], found[i])
    along = sum_in_order(config, products, share)
    for h in cutlass.range_constexpr(2):
        for i in cutlass.range_constexpr(8):
            values[i, h] = add_exactly(values[i, h], -multiply_exactly(along, mirror[i, h]))


@cute.jit
def hadamard(config: cutlass.Constexpr, values, lane):
    """Every block of config.hadamard channels by the normalised Sylvester matrix, in place: strides 1, 2, 4, ..."""
    for stride in (1, 2, 4):
        if cutlass.const_expr(stride < config.hadamard):
            for h in cutlass.range_constexpr(2):
                for i in cutlass.range_constexpr(8):
                    if cutlass.const_expr(i & stride == 0):
                        a = values[i, h]
                        values[i, h] = a + values[i + stride, h]
                        values[i + stride, h] = a - values[i + stride, h]
    octets = config.head_dim // 16  # of half a head
    share = lane % config.lanes
    for step in config.octet_steps:
        if cutlass.const_expr(step == octets):  # the partner is the other half
            for i in cutlass.range_constexpr(8):
                a = values[i, 0]
                values[i, 0] = a + values[i, 1]
                values[i, 1] = a - values[i, 1]
        elif cutlass.const_expr(octets == config.lanes):
            sign = Float32(1.0)
            if share & step:
                sign = Float32(-1.0)
            for h in cutlass.range_constexpr(2):
                for i in cutlass.range_constexpr(8):
                    partner = cute.arch.shuffle_sync_bfly(values[i, h], offset=step)
                    values[i, h] = multiply_add(values[i, h], sign, partner)
        else:
            exchange(values, lane, share, octets, step)
    for h in cutlass.range_constexpr(2):
        for i in cutlass.range_constexpr(8):
            values[i, h] = values[i, h] * Float32(config.hadamard_scale)


@cute.jit
def exchange(values, lane, share, octets: cutlass.Constexpr, step: cutlass.Constexpr):
    """A butterfly between octets where halves are no power of two: an octet's partner may lie in the other half."""
    old = cute.make_rmem_tensor((8, 2), Float32)
    for h in cutlass.range_constexpr(2):
        for i in cutlass.range_constexpr(8):
            old[i, h] = values[i, h]
    for h in cutlass.range_constexpr(2):
        own = cutlass.min(share, octets - 1) + h * octets
        other = own ^ step
        is_second = other >= octets
        source = lane - share + other
        if is_second:
            source = source - octets
        sign = Float32(1.0)
        if own & step:
            sign = Float32(-1.0)
        for i in cutlass.range_constexpr(8):
            first = cute.arch.shuffle_sync(old[i, 0], source)
            second = cute.arch.shuffle_sync(old[i, 1], source)
            partner = first
            if is_second:
                partner = second
            values[i, h] = multiply_add(old[i, h], sign, partner)
