"""Speed of light: the least time that a GPU could need for an op, from bytes and operations alone.

Rates are what was measured on the device, not its data sheet (docs/kernels).
"""

from dataclasses import dataclass

from ..quant.schemes import LinearScheme


@dataclass(frozen=True)
class Gpu:
    """Read bandwidth, and product rates in operations per second for 16-bit and 8-bit operands."""

    name: str
    arch: str
    bytes_per_s: float
    flops_16: float
    flops_8: float


GPUS = {
    "h200": Gpu("h200", "sm_90", 4.38e12, 900e12, 1656e12),
    "h100": Gpu("h100", "sm_90", 3.0e12, 900e12, 1656e12),
}


def linear_bound_us(gpu: Gpu, M: int, N: int, K: int, linear: LinearScheme) -> float:
    """Microseconds of y[M, N] = x[M, K] @ w[N, K].T at the speed of light, outputs in 16 bits."""
    weight_bits = activation_bits = 16.0
    if linear.weight is not None:
        normal, outliers = linear.split(K)
        weight_bits = linear.weight.bits_per_value(normal) * normal / K + linear.outliers.bits * outliers / K
        if linear.activation is not None:
            activation_bits = (
                linear.activation.bits_per_value(normal) * normal / K + linear.outliers.bits * outliers / K
            )
    moved = N * K * weight_bits / 8 + M * K * activation_bits / 8 + M * N * 2
    rate = gpu.flops_8 if linear.activation is not None else gpu.flops_16
    return 1e6 * max(moved / gpu.bytes_per_s, 2 * M * N * K / rate)
