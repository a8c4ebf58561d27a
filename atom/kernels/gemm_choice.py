"""Which config a GEMM runs with: a short table, measured on Llama-3-8B shapes on one H200 (docs/kernels/gemm.md)."""

from .gemm_config import GemmConfig
from .gemm_kinds import KINDS

SMS = 132


def choose_config(
    weight: str,
    token_scales: str,
    tokens: int,
    features: int,
    units: int,
    int8_units: bool = False,
    bias: bool = False,
) -> GemmConfig:
    """The config of a problem: the tile that covers the tokens, and a split of K that fills the SMs.

    tokens    1 or more; the caller rounds them up so that few kernels are compiled
    units     along K, see gemm_pack.py
    Raises nothing: every problem has a config.
    """
    kind = KINDS[weight]
    multicast = 1
    if tokens <= 32:
        tile_m = 16 if tokens <= 16 else 32
        wide = -(-features // 256)
        if wide >= SMS // 2:  # gate_up: tiles enough without a split
            warpgroups, split = (2, 1) if kind.promoted else (4, 1)
        elif wide >= 20 and kind.promoted:  # qkv
            warpgroups, split = 2, 2
        else:
            warpgroups, split = 4, 5 if units >= 64 else 4
    elif tokens <= 64:
        tile_m = 64
        if features <= 4096:
            warpgroups, split = 4, 8 if units >= 64 else 4
        else:
            warpgroups = 4 if features >= 16384 and kind.promoted else 2
            split = _split(-(-features // (64 * warpgroups)), most=2)
        if kind.operand == "bf16" and kind.promoted:
            warpgroups = 2  # four would have to spill
    elif tokens <= 256 or kind.operand == "int8":
        tile_m = 256 if kind.operand == "int8" and not kind.promoted and tokens > 256 else 128
        narrow = kind.operand != "int8" or kind.promoted or int8_units or 4096 < features < 16384
        warpgroups = 2 if narrow or tokens > 128 else 4
        split = _split(-(-features // (64 * warpgroups)) * -(-tokens // tile_m), most=4 if tile_m == 128 else 1)
    else:
        # Not measured yet. Two CTAs share a tile of tokens: bfloat16 activations are most of what a tile reads, and
        # two sums of E4M3 leave room for 192 tokens only, too few products for their bytes.
        tile_m = 192 if weight == "e4m3" and tokens > 1024 else 128
        warpgroups, split, multicast = 2, 1, 2
    split = max(1, min(split, units // 4))
    return GemmConfig(
        weight=weight,
        token_scales=token_scales,
        tile_m=tile_m,
        warpgroups=warpgroups,
        split=split,
        multicast=multicast,
        int8_units=int8_units,
        bias=bias,
        aligned=features % 8 == 0,
        ctas_per_sm=2 if warpgroups == 2 and tile_m <= (32 if kind.operand == "bf16" else 64) else 1,
        pairs=tile_m == 16 and kind.bits == 4 and kind.operand == "int8",
    ).with_most_stages()


def _split(tiles: int, most: int) -> int:
    """The largest power of two up to `most` that leaves every CTA an SM of its own."""
    split = 1
    while split * 2 <= most and tiles * split * 2 <= SMS:
        split *= 2
    return split
