"""RMSNorm, permutation and quantization in one op: the producer of every attention and MLP input."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..quant.mixed import fake_quantize_activation
from ..quant.schemes import LinearScheme
from .activation import Activation
from .refusals_fp4 import refuses_fp4_producer
from .refusals_sm90 import refuses_producer
from .registry import Implementation, Op


def normalize(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32 whatever the dtype of x (arXiv:1910.07467)."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """normalize(x) * weight, in float32; the caller adds 1 to Gemma's weights."""
    return normalize(x, eps) * weight.float()


def rms_norm_quantize_reference(
    linear: LinearScheme, perm: Tensor | None, weight: Tensor, eps: float
) -> Callable[[Tensor], Activation]:
    """x [T, K] -> round(rms_norm(x)[:, perm]), as float32."""

    def run(x: Tensor) -> Activation:
        normed = rms_norm(x, weight, eps)
        return fake_quantize_activation(normed if perm is None else normed[..., perm], linear)

    return run


def add_rms_norm_quantize_reference(
    linear: LinearScheme, perm: Tensor | None, weight: Tensor, eps: float
) -> Callable[[Tensor, Tensor], tuple[Tensor, Activation]]:
    """(residual, update) [T, K] each, in one dtype -> (residual + update, rounded norm of that)."""
    norm = rms_norm_quantize_reference(linear, perm, weight, eps)

    def run(residual: Tensor, update: Tensor) -> tuple[Tensor, Activation]:
        total = residual + update
        return total, norm(total)

    return run


RMS_NORM_QUANTIZE = Op(
    name="rms_norm_quantize",
    formula="quantize(rms_norm(x, weight)[:, perm])",
    reference=rms_norm_quantize_reference,
    implementations=(
        Implementation("producers_sm90", "atom.kernels.producers:build_rms_norm_quantize", refuses_producer),
        Implementation("producers_fp4", "atom.kernels.gemm_fp4:build_rms_norm_quantize", refuses_fp4_producer),
    ),
)

ADD_RMS_NORM_QUANTIZE = Op(
    name="add_rms_norm_quantize",
    formula="h = residual + update; quantize(rms_norm(h, weight)[:, perm]) and h",
    reference=add_rms_norm_quantize_reference,
    implementations=(
        Implementation("producers_sm90", "atom.kernels.producers:build_add_rms_norm_quantize", refuses_producer),
    ),
)
