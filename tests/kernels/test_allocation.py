"""Outputs of launches are ordinary tensors, wherever they lie."""

import pytest
import torch

from atom.kernels.allocation import allocator


@pytest.mark.parametrize(
    "device",
    ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cuda:0", marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("shape", [(3, 8), (0, 8), (1, 1)])
def test_what_is_allocated(device: str, shape: tuple[int, int]) -> None:
    """Shape, strides, dtype and device are those asked for; two calls do not share memory."""
    place = torch.device(device)
    allocate = allocator(place)
    with torch.inference_mode():
        tensor, other = (allocate(shape, (shape[1], 1), torch.bfloat16) for _ in range(2))
    assert tensor.shape == shape and tensor.is_contiguous() and tensor.dtype == torch.bfloat16
    assert tensor.device.type == place.type and tensor.is_inference()
    assert 0 in shape or place.type == "meta" or tensor.data_ptr() != other.data_ptr()
