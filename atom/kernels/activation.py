"""Activations on their way into a quantized linear.

A producer (norm, gated activation, permutation) hands on one of two things that a quantized linear takes: on the
reference path a plain float32 tensor [T, K], already permuted and rounded; on the kernel path a QuantizedActivation
with the codes and scales themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..quant.mixed import fake_quantize_activation
from ..quant.schemes import LinearScheme
from .refusals_fp4 import refuses_fp4_producer
from .refusals_sm90 import refuses_producer
from .registry import Implementation, Op


@dataclass(eq=False, slots=True)  # not frozen: one is made at every launch, and that would double what it costs
class QuantizedActivation:
    """Codes and scales of T tokens, in the order a low-bit GEMM reads them.

    packed          normal columns [T, ...], packed as the implementation wants them
    scale           their scales [T, groups] or [T, 1]
    num_tokens      T
    outlier         outlier columns [T, outliers], or None
    outlier_scale   their scales [T, 1], or None
    outer           float32 [T] over the scales of each token, or None
    """

    packed: Tensor
    scale: Tensor
    num_tokens: int
    outlier: Tensor | None = None
    outlier_scale: Tensor | None = None
    outer: Tensor | None = None


Activation = Tensor | QuantizedActivation


def permute_quantize_reference(linear: LinearScheme, perm: Tensor | None) -> Callable[[Tensor], Activation]:
    """x [T, K] -> round(x[:, perm]), as float32."""

    def run(x: Tensor) -> Activation:
        return fake_quantize_activation(x if perm is None else x[..., perm], linear)

    return run


PERMUTE_QUANTIZE = Op(
    name="permute_quantize",
    formula="quantize(x[:, perm])",
    reference=permute_quantize_reference,
    implementations=(
        Implementation("producers_sm90", "atom.kernels.producers:build_permute_quantize", refuses_producer),
        Implementation("producers_fp4", "atom.kernels.gemm_fp4:build_permute_quantize", refuses_fp4_producer),
    ),
)
