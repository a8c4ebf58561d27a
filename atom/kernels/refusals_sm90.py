"""What the sm_90 kernels refuse, and why. Imports no kernel, so that the ops can name it."""

from ..quant.granularity import Channel, Group, Token
from ..quant.schemes import LinearScheme, TensorSpec
from .registry import Problem

LARGEST_ROW = 48 * 1024  # float32 values of a row that fit in shared memory


def refuses_linear(problem: Problem) -> str | None:
    """Why the sm_90a GEMM cannot run a linear, or None."""
    if problem.arch != "sm_90":
        return f"it is built for sm_90, this is {problem.arch}"
    return refuses_scheme(problem.linear)


def refuses_producer(problem: Problem) -> str | None:
    """Why the sm_90a producers cannot feed a linear, or None."""
    if problem.arch != "sm_90":
        return f"it is built for sm_90, this is {problem.arch}"
    if problem.K % 8:
        return f"rows must be a multiple of 8 long, got {problem.K}"
    if problem.K > LARGEST_ROW:
        return f"rows of {problem.K} do not fit in shared memory; at most {LARGEST_ROW}"
    return refuses_scheme(problem.linear)


def refuses_scheme(linear: LinearScheme) -> str | None:
    """Why INT8 wgmma cannot multiply this scheme exactly, or None."""
    weight, activation, outliers = linear.weight, linear.activation, linear.outliers
    if weight is None or activation is None:
        return "weights and activations must both be quantized"
    if linear.rotation is not None:
        return "a rotated input needs a producer that rotates"
    if not weight.symmetric or not activation.symmetric:
        return "asymmetric codes have no kernel yet"
    if outliers.count > 256 or (outliers.count and outliers.format != "int8"):
        return f"outliers must be at most 256 INT8 columns, got {outliers.count} in {outliers.format}"
    by_token = _is(activation, "int8", Token()) and activation.outer is None
    if weight.format == "int8" and isinstance(weight.granularity, Channel) and weight.outer is None:
        return None if by_token and not outliers.count else "INT8 weights need INT8 activations per token, no outliers"
    if weight.format not in ("int4", "int3") or weight.granularity != Group(128):
        return f"weights in {weight} have no kernel yet"
    if weight.outer == "channel" and weight.scale_format == "uint4":
        return (
            None if by_token and not outliers.count else "integer scales need INT8 activations per token, no outliers"
        )
    if weight.outer is not None or weight.scale_format != "bf16":
        return f"{weight.scale_format} weight scales under {weight.outer} have no kernel yet"
    if by_token:
        return None if not outliers.count else "outlier columns need INT4 activations in groups of 128"
    by_group = any(_is(activation, name, Group(128)) for name in ("int4", "int3")) and activation.outer is None
    if not by_group or activation.scale_format != "bf16":
        return f"activations in {activation} have no kernel yet"
    return None


def _is(spec: TensorSpec, name: str, granularity: object) -> bool:
    return spec.format == name and spec.granularity == granularity
