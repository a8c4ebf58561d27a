"""What Blackwell's block-scaled kernels refuse, and why. Imports no kernel, so that the ops can name it."""

from ..env import unverified_kernels
from ..quant.granularity import Group
from ..quant.schemes import LinearScheme, TensorSpec
from .registry import Problem

NOT_RUN = (
    "not yet run on hardware: compiled, and sm_120's emulated; set ATOM_UNVERIFIED_KERNELS=1 to run it all the same"
)


def refuses_fp4_sm100(problem: Problem) -> str | None:
    """Why the sm_100a GEMM cannot run a linear, or None."""
    return refuses_fp4(problem, "sm_100")


def refuses_fp4_sm120(problem: Problem) -> str | None:
    """Why the sm_120a GEMM cannot run a linear, or None."""
    return refuses_fp4(problem, "sm_120")


def refuses_fp4_producer(problem: Problem) -> str | None:
    """Why the producers of E2M1 codes cannot feed a linear, or None."""
    return refuses_fp4(problem, "sm_100") and refuses_fp4(problem, "sm_120")


def refuses_fp4(problem: Problem, arch: str) -> str | None:
    """Why the kernels for `arch` cannot run a problem, or None."""
    if problem.arch != arch:
        return f"it is built for {arch}, this is {problem.arch}"
    return refuses_scheme(problem.linear) or (None if unverified_kernels() else NOT_RUN)


def refuses_scheme(linear: LinearScheme) -> str | None:
    """Why the tensor cores cannot multiply this scheme by its own scales, or None."""
    weight, activation = linear.weight, linear.activation
    if weight is None or activation is None or not (_is_fp4(weight) and _is_fp4(activation)):
        return "it multiplies nvfp4 or mxfp4 weights and activations"
    if weight.group_size != activation.group_size:
        return f"weights and activations need groups of one size, got {weight.group_size} and {activation.group_size}"
    if linear.outliers.count or linear.rotation is not None or linear.residual:
        return "outliers, rotations and residual channels have no kernel here yet"
    if activation.clip == "mse":
        return "a searched clip is too slow at run time"
    return None


def _is_fp4(spec: TensorSpec) -> bool:
    """NVFP4 (16 columns under E4M3) or MXFP4 (32 under E8M0)."""
    if spec.format != "e2m1" or not spec.symmetric:
        return False
    return (spec.granularity, spec.scale_format) in ((Group(16), "e4m3"), (Group(32), "e8m0"))
