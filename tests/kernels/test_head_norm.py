"""The norm of heads, operation by operation in numpy, whose roots are rounded correctly."""

import numpy as np
import pytest
import torch

from atom.kernels.head_norm import normalize_heads


@pytest.mark.parametrize("dim", [16, 80, 128])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_every_operation_is_rounded_once(dim: int, offset: float) -> None:
    x = torch.randn(3000, dim, generator=torch.Generator().manual_seed(dim))
    weight = torch.randn(dim, generator=torch.Generator().manual_seed(1))
    squares = (x * x).numpy()
    sums = squares[:, : dim // 2] + squares[:, dim // 2 :]
    octets = sums.reshape(3000, -1, 8)
    for width in (4, 2, 1):
        octets = octets[..., :width] + octets[..., width : 2 * width]
    total = np.zeros((3000, 1 << (dim // 16 - 1).bit_length()), dtype=np.float32)
    total[:, : dim // 16] = octets[..., 0]
    while total.shape[1] > 1:
        total = total[:, : total.shape[1] // 2] + total[:, total.shape[1] // 2 :]
    root = np.sqrt(total * np.float32(1 / dim) + np.float32(1e-6))
    assert root.dtype == np.float32
    wanted = x.numpy() * (np.float32(1) / root) * (weight.numpy() + np.float32(offset))
    found = normalize_heads(x, weight, 1e-6, offset)
    assert np.array_equal(found.numpy(), wanted)
    torch.testing.assert_close(
        found, x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (weight + offset), rtol=1e-5, atol=1e-6
    )
