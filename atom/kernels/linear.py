"""The low-bit GEMM: y[M, N] = x[M, K] @ w[N, K].T over mixed columns.

Reference: the weight is dequantized once, the activation arrives rounded; one float32 product does the rest. What it
computes is what a kernel must: exact products of codes, scaled per group, summed.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import linear as dense_linear

from ..quant.mixed import MixedWeight, dequantize_weight
from ..quant.schemes import LinearScheme
from .activation import Activation
from .refusals_fp4 import refuses_fp4_sm100, refuses_fp4_sm120
from .refusals_sm90 import refuses_linear
from .registry import Implementation, Op


def linear_reference(linear: LinearScheme, weight: MixedWeight, bias: Tensor | None) -> Callable[[Activation], Tensor]:
    """Builder of x [M, K] float32, permuted and rounded -> y [M, N] float32."""
    dense = dequantize_weight(weight, linear)
    offset = None if bias is None else bias.float()

    def run(x: Activation) -> Tensor:
        assert isinstance(x, Tensor), "the reference linear takes what reference producers hand on"
        return dense_linear(x, dense, offset)

    return run


def linear_add_reference(
    linear: LinearScheme, weight: MixedWeight, bias: Tensor | None
) -> Callable[[Activation, Tensor], Tensor]:
    """Builder of (x [M, K] float32, residual [M, N]) -> residual + y in its dtype, y rounded to that first."""
    multiply = linear_reference(linear, weight, bias)

    def run(x: Activation, residual: Tensor) -> Tensor:
        return residual + multiply(x).to(residual.dtype)

    return run


LINEAR = Op(
    name="linear",
    formula="x @ w.T + bias, normal columns in the scheme's formats, outlier columns in theirs",
    reference=linear_reference,
    implementations=(
        Implementation("gemm_sm90", "atom.kernels.gemm:build_linear", refuses_linear),
        Implementation("gemm_fp4_sm100", "atom.kernels.gemm_fp4:build_linear", refuses_fp4_sm100),
        Implementation("gemm_fp4_sm120", "atom.kernels.gemm_fp4:build_linear", refuses_fp4_sm120),
    ),
)

LINEAR_ADD = Op(
    name="linear_add",
    formula="residual + (x @ w.T + bias), the products rounded to the residual's format before they are added",
    reference=linear_add_reference,
    implementations=(Implementation("gemm_sm90", "atom.kernels.gemm:build_linear_add", refuses_linear),),
)
