"""What the sm_90 kernels refuse, and why; which kind of packed weight a scheme takes. Imports no kernel, so that the
ops can name it."""

from ..quant.granularity import Channel, Granularity, Group, Token
from ..quant.schemes import LinearScheme, TensorSpec
from .registry import Problem

LARGEST_ROW = 48 * 1024  # float32 values of a row that fit in shared memory
LARGEST_ROTATION = 256  # columns of a Hadamard block: what a warp holds
FACTOR_GROUPS = (32, 64, 128)  # columns under one integer factor


def refuses_linear(problem: Problem) -> str | None:
    """Why the sm_90a GEMM cannot run a linear, or None."""
    return refuses_arch(problem) or refuses_scheme(problem.linear)


def refuses_producer(problem: Problem) -> str | None:
    """Why the sm_90a producers cannot feed a linear, or None."""
    if reason := refuses_arch(problem):
        return reason
    if problem.K > LARGEST_ROW:
        return f"rows of {problem.K} do not fit in shared memory; at most {LARGEST_ROW}"
    if problem.linear == LinearScheme():  # nothing is rounded: the model's own format
        return None if problem.dtype == "bfloat16" else f"full precision must be bfloat16, got {problem.dtype}"
    return refuses_scheme(problem.linear)


def refuses_rows(problem: Problem, rows: str, dtype: str | None = None) -> str | None:
    """Why no sm_90a kernel can read rows of K values (of that dtype, if it takes no other), or None."""
    if reason := refuses_arch(problem):
        return reason
    if dtype is not None and problem.dtype != dtype:
        return f"{rows} must be {dtype}, got {problem.dtype}"
    return f"{rows} must be a multiple of 8 long, got {problem.K}" if problem.K % 8 else None


def refuses_arch(problem: Problem) -> str | None:
    """Why code for sm_90a cannot run on this GPU, or None."""
    return None if problem.arch == "sm_90" else f"it is built for sm_90, this is {problem.arch}"


def fuses_rows(problem: Problem) -> bool:
    """Whether linears that share an input run as one GEMM."""
    return refuses_linear(problem) is None


def weight_kind(linear: LinearScheme) -> str:
    """The WeightKind of a scheme that `refuses_scheme` lets pass."""
    weight, activation = linear.weight, linear.activation
    assert weight is not None
    if weight.format == "fp8_e4m3":
        return "e4m3_fast" if linear.fast_sums else "e4m3"
    if weight.format == "int8":
        return "int8"
    if weight.outer == "channel" and weight.scale_format == "uint4":
        if activation is None:
            return "int4_uint4_bf16"
        return "int4_uint4" if weight.group_size == 128 else "int4_uint4_g32"
    if weight.group_size != 128:
        return f"{weight.format}_g{weight.group_size}"
    if activation is None or not _is_integer(activation):
        return "int4_bf16"
    return "int4"


def refuses_scheme(linear: LinearScheme) -> str | None:
    """Why wgmma cannot multiply this scheme exactly, or None."""
    weight, activation, outliers = linear.weight, linear.activation, linear.outliers
    if weight is None:
        return "weights are not quantized"
    if linear.residual:
        return "residual channels have no kernel yet"
    rotation = linear.rotation
    if rotation is not None and (rotation.kind != "block_hadamard" or rotation.block > LARGEST_ROTATION):
        return f"a rotation must be a block_hadamard of at most {LARGEST_ROTATION} columns, got {rotation}"
    if not weight.symmetric or (activation is not None and not activation.symmetric):
        return "asymmetric codes have no kernel yet"
    if activation is not None and activation.clip == "mse":
        return "a searched clip is too slow at run time"
    if activation is not None and activation.scale_rule in ("signed", "four_six"):
        return f"no producer chooses scales by the rule {activation.scale_rule!r} yet"
    if outliers.count > 256 or (outliers.count and outliers.format != "int8"):
        return f"outliers must be at most 256 INT8 columns, got {outliers.count} in {outliers.format}"
    by_factor = activation is not None and _by_factor(activation, "token")
    by_group = activation is not None and _is_integer(activation) and activation.group_size == 128
    if outliers.count and not (by_group or by_factor):
        return "outlier columns need INT4 activations in groups of 128"
    if weight.format in ("int8", "fp8_e4m3"):
        if not _plain(weight, weight.format, Channel()):
            return f"weights in {weight} have no kernel yet"
        by_token = activation is not None and _plain(activation, weight.format, Token())
        return None if by_token else f"{weight.format} weights need {weight.format} activations per token"
    if activation is None or _small_groups(activation):
        whole = activation is None and _by_factor(weight, "channel") and weight.group_size == 128
        known = whole or _small_groups(weight) or _groups_of_128(weight)
        return None if known else f"weights in {weight} have no kernel yet"
    by_token = _plain(activation, "int8", Token())
    if _by_factor(weight, "channel"):
        wants = "INT8 activations per token, or INT4 in groups of 32, 64 or 128 under factors per token"
        return None if by_token or by_factor else f"integer scales need {wants}"
    if weight.granularity != Group(128) or weight.format not in ("int4", "int3"):
        return f"weights in {weight} have no kernel yet for activations in {activation}"
    if not _groups_of_128(weight):
        return f"{weight.scale_format} weight scales under {weight.outer} have no kernel yet"
    if by_token or (by_group and activation.outer is None and activation.scale_format == "bf16"):
        return None
    return f"activations in {activation} have no kernel yet"


def _plain(spec: TensorSpec, name: str, granularity: Granularity) -> bool:
    return spec.format == name and spec.granularity == granularity and spec.outer is None


def _is_integer(spec: TensorSpec) -> bool:
    """INT8 per token, or INT4 in groups of 128: codes that INT8 wgmma multiplies."""
    return spec.format in ("int3", "int4", "int8") and spec.group_size in (None, 128)


def _by_factor(spec: TensorSpec, outer: str) -> bool:
    """INT4 codes under integer factors under one scale per row: code x factor stays within INT8."""
    codes = spec.format in ("int3", "int4") and spec.group_size in FACTOR_GROUPS
    return codes and spec.scale_format == "uint4" and spec.outer == outer


def _groups_of_128(weight: TensorSpec) -> bool:
    name = weight.format in ("int4", "int3")
    return name and weight.granularity == Group(128) and weight.outer is None and weight.scale_format == "bf16"


def _small_groups(spec: TensorSpec) -> bool:
    """NVFP4, MXFP4 or NVINT4: value x scale is exact in bfloat16."""
    if spec.format == "e2m1" and spec.granularity == Group(32):
        return spec.scale_format == "e8m0"
    outer = spec.outer is not None and (spec.outer == "token" if spec.dynamic else True)
    return spec.format in ("e2m1", "int4") and spec.granularity == Group(16) and spec.scale_format == "e4m3" and outer
