"""What the CuTe DSL says of where block scales lie. In a file of its own, because it imports the DSL."""

import cutlass.utils.blockscaled_layout as blockscaled
from cutlass import cute

_found: list[list[list[int]]] = []
SHAPE, GROUP_SIZE = (200, 320), 16


@cute.jit
def _evaluate():
    layout = blockscaled.tile_atom_to_shape_SF((*SHAPE, 1), GROUP_SIZE)
    rows, K = SHAPE
    _found.append([[layout((r, c, 0)) for c in range(0, K, GROUP_SIZE)] for r in range(rows)])


def scale_offsets() -> list[list[int]]:
    """Byte of the scale of [row, group] for tcgen05, of an operand of SHAPE with groups of GROUP_SIZE columns."""
    if not _found:
        _evaluate()
    return _found[0]
