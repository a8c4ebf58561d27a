"""How a quantized linear lies in a checkpoint: names, dtypes and shapes of its tensors.

One table, used by the calibrator that writes, the loader that validates, and `atom check` that only counts bytes.
docs/checkpoint.md describes the same for readers.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .formats import get_format
from .granularity import Channel
from .mixed import MixedWeight
from .packing import pack, packed_columns, packed_dtype, unpack
from .rounding import Quantized, Scale
from .scales import STORAGE_DTYPES, load_scale, store_scale
from .schemes import LinearScheme

OUTER_NAMES = {"tensor": "weight_tensor_scale", "channel": "weight_channel_scale", "token": "weight_channel_scale"}


@dataclass(frozen=True)
class StoredTensor:
    """dtype and shape of one tensor in a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def stored_tensors(N: int, K: int, linear: LinearScheme, has_input_perm: bool = False) -> dict[str, StoredTensor]:
    """What a linear [N, K] stores, by name without the layer's prefix; the bias is not among them."""
    spec = linear.weight
    assert spec is not None
    normal, outliers = linear.split(K)
    fmt = get_format(spec.format)
    scale_shape = spec.granularity.scale_shape((N, normal))
    dtype = packed_dtype(fmt) if spec.symmetric or fmt.is_packed else torch.uint8
    tensors = {
        "weight_packed": StoredTensor(dtype, (N, packed_columns(normal, fmt))),
        "weight_scale": StoredTensor(STORAGE_DTYPES[spec.scale_format], scale_shape),
    }
    if not spec.symmetric:
        tensors["weight_zero_point"] = StoredTensor(torch.uint8, scale_shape)
    if spec.outer is not None:
        shape = (1, 1) if spec.outer == "tensor" else (N, 1)
        tensors[OUTER_NAMES[spec.outer]] = StoredTensor(torch.float32, shape)
    if outliers:
        tensors["outlier_weight"] = StoredTensor(get_format(linear.outliers.format).dtype, (N, outliers))
        if linear.outliers.format != "bf16":
            tensors["outlier_scale"] = StoredTensor(torch.bfloat16, (N, 1))
    if has_input_perm:
        tensors["input_perm"] = StoredTensor(torch.int32, (K,))
    return tensors


def store_weight(weight: MixedWeight, linear: LinearScheme) -> dict[str, Tensor]:
    """The checkpoint tensors of a quantized weight, by name without prefix."""
    spec = linear.weight
    assert spec is not None
    scale = weight.normal.scale
    tensors = {
        "weight_packed": pack(weight.normal.codes, get_format(spec.format)),
        "weight_scale": store_scale(scale.scale, spec.scale_format),
    }
    if scale.zero_point is not None:
        tensors["weight_zero_point"] = scale.zero_point.to(torch.uint8)
    if scale.outer is not None:
        assert spec.outer is not None
        tensors[OUTER_NAMES[spec.outer]] = scale.outer
    if isinstance(weight.outlier, Quantized):
        tensors["outlier_weight"] = weight.outlier.codes
        tensors["outlier_scale"] = store_scale(weight.outlier.scale.scale, "bf16")
    elif weight.outlier is not None:
        tensors["outlier_weight"] = weight.outlier
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def load_weight(tensors: dict[str, Tensor], K: int, linear: LinearScheme) -> MixedWeight:
    """The quantized weight that `store_weight` stored."""
    spec = linear.weight
    assert spec is not None
    normal, outliers = linear.split(K)
    zero = tensors.get("weight_zero_point")
    scale = Scale(
        load_scale(tensors["weight_scale"], spec.scale_format),
        None if zero is None else zero.float(),
        None if spec.outer is None else tensors[OUTER_NAMES[spec.outer]],
    )
    codes = unpack(tensors["weight_packed"], get_format(spec.format), normal)
    if not spec.symmetric:
        codes = codes.view(torch.uint8) & (2 ** get_format(spec.format).bits - 1)
    if not outliers:
        return MixedWeight(Quantized(codes, scale))
    outlier: Quantized | Tensor = tensors["outlier_weight"]
    if linear.outliers.spec(Channel(), dynamic=False) is not None:
        outlier = Quantized(tensors["outlier_weight"], Scale(load_scale(tensors["outlier_scale"], "bf16")))
    return MixedWeight(Quantized(codes, scale), outlier)
