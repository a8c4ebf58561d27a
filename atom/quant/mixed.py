"""Mixed precision along the channels of one linear: normal columns first, outlier columns last.

This is what a quantized linear multiplies: weights [N, K] and activations [T, K], both already permuted, whose last
`outliers.count` columns are rounded to the outlier format under a scale of their own per row, and whose normal columns
are rotated (if the scheme says so) and rounded by the scheme's weight or activation spec.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .granularity import Channel, Token
from .rotation import rotate
from .rounding import Quantized, dequantize, fake_quantize, quantize, refuse_nonfinite
from .schemes import LinearScheme


@dataclass(frozen=True)
class MixedWeight:
    """A quantized weight: normal columns [N, K - outliers] and outlier columns (bf16 values where they stay so)."""

    normal: Quantized
    outlier: Quantized | Tensor | None = None


def quantize_weight(weight: Tensor, linear: LinearScheme, name: str = "weight") -> MixedWeight:
    """Round-to-nearest of a permuted weight [N, K]; raises ValueError naming the tensor on NaN or infinity."""
    assert linear.weight is not None
    normal, _ = linear.split(weight.shape[1])
    columns = weight[:, :normal]
    if linear.rotation is not None:
        columns = rotate(columns, linear.rotation)
    return MixedWeight(quantize(columns, linear.weight, name), quantize_outliers(weight[:, normal:], linear, name))


def quantize_outliers(columns: Tensor, linear: LinearScheme, name: str = "weight") -> Quantized | Tensor | None:
    """The outlier columns [N, outliers] in the outlier format: quantized, bf16, or None if there are none."""
    if columns.shape[1] == 0:
        return None
    spec = linear.outliers.spec(Channel(), dynamic=False)
    if spec is not None:
        return quantize(columns, spec, name)
    kept = columns.to(torch.bfloat16)
    refuse_nonfinite(kept, name)
    return kept


def dequantize_weight(weight: MixedWeight, linear: LinearScheme) -> Tensor:
    """float32 [N, K] as the activation's columns stand: permuted, normal columns rotated."""
    assert linear.weight is not None
    normal = dequantize(weight.normal, linear.weight)
    if weight.outlier is None:
        return normal
    spec = linear.outliers.spec(Channel(), dynamic=False)
    outlier = dequantize(weight.outlier, spec) if spec and isinstance(weight.outlier, Quantized) else weight.outlier
    assert isinstance(outlier, Tensor)
    return torch.cat((normal, outlier.float()), 1)


def fake_quantize_activation(x: Tensor, linear: LinearScheme) -> Tensor:
    """What the linear's low-bit product sees of a permuted x [..., K]: float32, rotated and rounded."""
    normal, outliers = linear.split(x.shape[-1])
    columns = x[..., :normal]
    if linear.rotation is not None:
        columns = rotate(columns, linear.rotation)
    rounded = columns.float() if linear.activation is None else fake_quantize(columns, linear.activation)
    if linear.residual and linear.activation is not None:  # its two terms meet the same weights: they may be added here
        loud = slice(max(0, normal - linear.residual), normal)
        left = fake_quantize(columns[..., loud].float() - rounded[..., loud], linear.activation)
        rounded = torch.cat((rounded[..., : loud.start], rounded[..., loud] + left), -1)
    if not outliers:
        return rounded
    spec = linear.outliers.spec(Token(), dynamic=True) if linear.activation is not None else None
    tail = x[..., normal:]
    tail = tail.to(torch.bfloat16).float() if spec is None else fake_quantize(tail, spec)
    return torch.cat((rounded, tail), -1)
