"""What the CuTe DSL says of layouts that packing relies on. In a file of its own, because it imports the DSL."""

import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Float32, Int8, Int32, cute
from cutlass.cute.nvgpu import OperandMajorMode
from cutlass.cute.nvgpu import warpgroup as wg

_found: dict[str, list[list[int]]] = {}


@cute.jit
def _fragments():
    major, source = OperandMajorMode.K, wg.OperandSource.RMEM
    bf16 = sm90.make_trivial_tiled_mma(BFloat16, BFloat16, major, major, Float32, (1, 1, 1), (64, 64), source)
    int8 = sm90.make_trivial_tiled_mma(Int8, Int8, major, major, Int32, (1, 1, 1), (64, 64), source)
    a, b = bf16.tv_layout_A, int8.tv_layout_A
    _found["bf16"] = [[a((t, v)) for v in range(8)] for t in range(128)]
    _found["int8"] = [[b((t, v)) for v in range(16)] for t in range(128)]


@cute.jit
def _swizzle():
    atom = wg.make_smem_layout_atom(wg.SmemLayoutAtomKind.K_SW128, Int8)
    layout = cute.tile_to_shape(atom, (64, 128, 4), order=(0, 1, 2))
    _found["swizzle"] = [[layout((r, c, 0)) for c in range(128)] for r in range(64)]


def fragment_of_a(operand: str) -> list[list[tuple[int, int]]]:
    """(row, column) of each value of each thread in one wgmma's A."""
    if operand not in _found:
        _fragments()
    return [[(offset % 64, offset // 64) for offset in row] for row in _found[operand]]


def swizzled_offsets() -> list[list[int]]:
    """Byte offset of [row, column] in a tile of 64 x 128 bytes with the 128-byte swizzle."""
    _swizzle()
    return _found["swizzle"]
