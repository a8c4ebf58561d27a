"""Which producer kernel a scheme's activation runs with: pure arithmetic, no GPU, no cutlass."""

from dataclasses import dataclass
from functools import partial
from math import frexp
from typing import Literal

import torch

from ..quant.formats import get_format
from ..quant.rounding import largest_scale
from ..quant.scales import LARGEST
from ..quant.schemes import LinearScheme


@dataclass(frozen=True)
class ProducerConfig:
    """Compile-time choices of one producer kernel.

    source         "norm" (RMSNorm), "add_norm" (of x + residual, which is written back), "silu" or "gelu_tanh"
                   (act(gate) x up), "plain"
    rounding       "group": codes in bytes, a scale per 128 columns; "token": codes in bytes, one per row; "small":
                   code x scale as bfloat16, a scale per `group_size` columns; "none": bfloat16
    format         of the codes: int3, int4, int8, e2m1 or fp8_e4m3; bf16 without rounding
    ratio          scale = largest magnitude x ratio
    scale_format   how a scale is stored: fp32, bf16, e4m3 (under a float32 per token) or e8m0
    largest_scale  where scales saturate, so that codes x scale stay finite
    permuted       whether columns are gathered by a permutation
    outliers       whether INT8 columns under one scale of their own follow
    strided        whether rows of the inputs lie further apart than they are long (halves of a fused GEMM's output)
    dtype          of the input: bfloat16, float16 or float32
    max_columns    shared memory is laid out for so many
    """

    source: str
    rounding: Literal["group", "token", "small", "none"]
    format: str
    ratio: float
    scale_format: str
    largest_scale: float
    group_size: int
    permuted: bool
    outliers: bool
    strided: bool
    dtype: str
    max_columns: int

    @property
    def code_range(self) -> tuple[int, int]:
        return get_format(self.format).code_range(True)

    @property
    def writes_bf16(self) -> bool:
        return self.rounding in ("small", "none")

    @property
    def outer_ratio(self) -> float:
        """The outer scale is the largest inner scale times this."""
        return 1.0 / LARGEST[self.scale_format]

    @property
    def exponents(self) -> tuple[int, int]:
        """(the exponent of the format's largest value, the largest exponent of a scale), for e8m0."""
        return frexp(get_format(self.format).max)[1] - 1, frexp(self.largest_scale)[1] - 1


def producer_config(
    source: str, linear: LinearScheme, dtype: torch.dtype, K: int, permuted: bool, strided: bool
) -> ProducerConfig:
    """The kernel of an activation; `linear` is one that refusals_sm90.py lets pass."""
    spec = linear.activation
    make = partial(
        ProducerConfig,
        source=source,
        permuted=permuted,
        outliers=linear.outliers.count > 0,
        strided=strided,
        dtype=str(dtype).removeprefix("torch."),
        max_columns=-(-K // 1024) * 1024,
    )
    if spec is None:
        return make(rounding="none", format="bf16", ratio=1.0, scale_format="fp32", largest_scale=1.0, group_size=0)
    fmt = get_format(spec.format)
    levels = (2**fmt.bits - 1) / 2 if spec.scale_rule == "range" else fmt.max
    assert spec.clip != "mse"
    size = spec.group_size or 0
    return make(
        rounding="token" if not size else "group" if size == 128 else "small",
        format=spec.format,
        ratio=float(spec.clip) if spec.scale_format == "e8m0" else float(spec.clip) / levels,
        scale_format=spec.scale_format,
        largest_scale=largest_scale(fmt),
        group_size=size,
    )
