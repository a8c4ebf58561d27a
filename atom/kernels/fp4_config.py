"""Compile-time choices of the block-scaled GEMMs of Blackwell. Pure data, no GPU, no cutlass."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fp4Config:
    """One kernel of gemm_fp4_sm100.py or gemm_fp4_sm120.py.

    group_size      columns under one scale: 16 (NVFP4, E4M3) or 32 (MXFP4, E8M0)
    token_scaled    whether each token has a float32 scale over these
    channel_scaled  whether each feature has, or the weight one for all
    bias            whether a bias is added
    """

    group_size: int
    token_scaled: bool
    channel_scaled: bool = False
    bias: bool = False
