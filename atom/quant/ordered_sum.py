"""A sum over the channels of a head in an order of additions that every device can keep.

torch.sum adds in an order that depends on the device; here halves are added to halves, so that a kernel computes the
same bits.
"""

import torch
from torch import Tensor


def sum_in_order(x: Tensor) -> Tensor:
    """float32 x [..., head_dim] -> [..., 1]: halves of a head (of an odd one with a zero), within octets, octets."""
    first, second = torch.nn.functional.pad(x, (0, x.shape[-1] % 2)).chunk(2, -1)
    x = first + second
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % 8)).unflatten(-1, (-1, 8))
    for width in (4, 2, 1):
        x = x[..., :width] + x[..., width:]
    x = x[..., 0]
    full = 1 << (x.shape[-1] - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, full - x.shape[-1]))
    while x.shape[-1] > 1:
        first, second = x.chunk(2, -1)
        x = first + second
    return x
