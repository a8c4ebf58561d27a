"""Which producer kernel a scheme's activation runs with: pure arithmetic, no GPU, no cutlass."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ProducerConfig:
    """Compile-time choices of one producer kernel.

    source         "norm" (RMSNorm), "silu" or "gelu_tanh" (act(gate) x up), "plain"
    granularity    "group": one scale per 128 columns; "token": one per row
    qmin, qmax     code range of the normal columns
    ratio          scale = largest magnitude x ratio
    bf16_scale     whether the scale is stored as bfloat16 (else float32)
    largest_scale  where scales saturate, so that codes x scale stay finite
    permuted       whether columns are gathered by a permutation
    outliers       whether INT8 columns under one scale of their own follow
    dtype          of the input: bfloat16, float16 or float32
    max_columns    shared memory is laid out for so many
    """

    source: str
    granularity: str
    qmin: int
    qmax: int
    ratio: float
    bf16_scale: bool
    largest_scale: float
    permuted: bool
    outliers: bool
    dtype: str
    max_columns: int
