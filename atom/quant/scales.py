"""Scale formats: what a scale may be once it is stored, and how it lies in a checkpoint.

A scale is handled as float32 everywhere; `round_scale` moves it onto the grid of its storage format, so that the
codes chosen with it are those that the stored scale reads back.
"""

import torch
from torch import Tensor

STORAGE_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "e4m3": torch.float8_e4m3fn,
    "e8m0": torch.uint8,  # biased exponent: 2^(byte - 127)
    "uint4": torch.uint8,
}
# What an outer scale maps the largest inner scale to. Under uint4 a third is left free: GPTQ chooses the outer scale
# first, and weights that it updates later outgrow it. SmolLM2 w4a8, 12 x 512 tokens, four windows of 1024: perplexity
# 39.4 with 15, 36.1 with 12, 34.3 with 10; 34.9 with bf16 scales.
LARGEST = {"e4m3": 448.0, "uint4": 10.0}
LARGEST_DYNAMIC = {"e4m3": 448.0, "uint4": 15.0}  # of scales that are chosen at run time, for values that stay
_SMALLEST = {"fp32": 2.0**-126, "bf16": 2.0**-126, "fp16": 2.0**-24, "e4m3": 2.0**-9, "uint4": 1.0}


def round_scale(scale: Tensor, scale_format: str) -> Tensor:
    """The nearest scale of `scale_format` with the sign of `scale`, as float32; never zero, ties to even.

    E8M0 rounds down to a power of two.
    """
    if scale_format == "e8m0":
        return power_of_two(floor_log2(scale))
    magnitude = scale.abs().clamp_min(_SMALLEST[scale_format])
    if scale_format == "uint4":
        return magnitude.round().clamp_max(15.0)
    if scale_format != "fp32":
        dtype = STORAGE_DTYPES[scale_format]
        magnitude = magnitude.clamp_max(torch.finfo(dtype).max).to(dtype).float()
    return magnitude.copysign(scale)


def floor_log2(x: Tensor) -> Tensor:
    """Exact floor(log2(x)) for positive x, as float32; zero gives the smallest exponent, -127."""
    _, exponent = torch.frexp(x)  # x = mantissa * 2^exponent with mantissa in [0.5, 1)
    return torch.where(x > 0, exponent.float() - 1, -127.0)


def power_of_two(exponent: Tensor) -> Tensor:
    """Exact 2^exponent as float32 for whole exponents, clamped to [-127, 127]; exp2 need not be exact on a GPU."""
    bits = exponent.clamp(-126, 127).to(torch.int32) + 127 << 23
    return torch.where(exponent < -126, 2.0**-127, bits.view(torch.float32))


def store_scale(scale: Tensor, scale_format: str) -> Tensor:
    """The stored form of a scale that `round_scale` made, in the dtype of `STORAGE_DTYPES`."""
    if scale_format == "e8m0":
        return (floor_log2(scale) + 127).to(torch.uint8)
    return scale.to(STORAGE_DTYPES[scale_format])


def load_scale(stored: Tensor, scale_format: str) -> Tensor:
    """The float32 scale that `store_scale` stored."""
    if scale_format == "e8m0":
        return power_of_two(stored.float() - 127)
    return stored.float()
