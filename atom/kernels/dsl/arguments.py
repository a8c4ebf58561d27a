"""What stands for a kernel's tensors while it is compiled."""

from typing import Any

from cutlass.cute.runtime import make_fake_compact_tensor


def row_major(dtype: Any, shape: tuple[Any, ...], align: int) -> Any:
    """A tensor without gaps whose last axis is contiguous; sizes are numbers or symbols, `align` is in bytes."""
    order = tuple(reversed(range(len(shape))))
    return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=align)
