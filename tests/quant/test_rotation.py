"""Hadamard rotations: orthogonal, exactly undone up to rounding, at every size that the real models need."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atom.quant.mixed import dequantize_weight, quantize_weight
from atom.quant.rotation import hadamard, rotate, unrotate
from atom.quant.schemes import RotationSpec

from .cases import LINEARS

# hidden and intermediate sizes of the models at hand and of Llama 3 8B; some less the outliers of w4a4
SIZES = [448, 576, 640, 896, 1408, 1536, 1920, 2048, 4736, 4864, 5632, 8960, 14336]
WHOLE = RotationSpec("hadamard")


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 28, 36, 44, 60, 76, 140, 148, 448, 576, 640, 896])
def test_matrix_is_hadamard(n: int) -> None:
    H = hadamard(n).double() * n**0.5
    assert torch.allclose(H.abs(), torch.ones_like(H), atol=1e-5)
    assert torch.equal(H.round() @ H.round().T, n * torch.eye(n, dtype=torch.float64))
    x = torch.randn(2, n)
    assert torch.allclose(rotate(x, WHOLE), x @ hadamard(n), atol=1e-5)
    assert torch.allclose(unrotate(x, WHOLE), x @ hadamard(n).T, atol=1e-5)


@pytest.mark.parametrize("n", SIZES)
def test_real_sizes_are_orthogonal(n: int) -> None:
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n))
    y = rotate(x, WHOLE)
    assert torch.allclose(unrotate(y, WHOLE), x, atol=1e-5)
    assert torch.allclose(y @ y.T, x @ x.T, rtol=1e-4, atol=1e-2)  # inner products survive: that is orthogonality
    spike = torch.zeros(1, n)
    spike[0, n // 3] = n**0.5
    assert torch.allclose(rotate(spike, WHOLE).abs(), torch.ones(1, n), atol=1e-4)  # an outlier is spread evenly


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 100), st.sampled_from([2, 4, 16, 32]))
def test_block_rotation_leaves_a_tail(columns: int, block: int) -> None:
    spec = RotationSpec("block_hadamard", block)
    x = torch.randn(2, columns, generator=torch.Generator().manual_seed(columns))
    y = rotate(x, spec)
    whole = columns // block * block
    assert torch.equal(y[:, whole:], x[:, whole:])
    for start in range(0, whole, block):
        assert torch.allclose(y[:, start : start + block], x[:, start : start + block] @ hadamard(block), atol=1e-5)
    assert torch.allclose(unrotate(y, spec), x, atol=1e-5)


def test_product_is_unchanged_by_rotating_both() -> None:
    """x H (w H)^T = x w^T; the rotated weight dequantizes to w H up to its rounding."""
    linear = LINEARS["rotated"]
    assert linear.rotation is not None
    w, x = torch.randn(5, 37), torch.randn(4, 37)
    assert torch.allclose(rotate(x, linear.rotation) @ rotate(w, linear.rotation).T, x @ w.T, atol=1e-4)
    rounded = dequantize_weight(quantize_weight(w, linear), linear)
    assert (rounded - rotate(w, linear.rotation)).abs().max() < 0.5
    assert (rounded - w).abs().max() > 0.5


def test_bfloat16_input_is_rotated_in_float32() -> None:
    x = torch.randn(2, 64).bfloat16()
    assert torch.equal(rotate(x, WHOLE), rotate(x.float(), WHOLE))


@pytest.mark.parametrize("n", [3, 37, 172])
def test_unknown_order_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"order {n} .*block_hadamard"):
        rotate(torch.randn(1, n), WHOLE)


def test_what_inference_mode_leaves_behind_serves_gradients() -> None:
    spec = RotationSpec("block_hadamard", 64)
    with torch.inference_mode():
        rotate(torch.ones(2, 64), spec)  # the first use of this order in this process
    x = torch.ones(2, 64, requires_grad=True)
    rotate(x, spec).sum().backward()
    assert x.grad is not None
