"""Which config a GEMM runs with: a short table, measured on Llama-3-8B shapes on one H200 (docs/kernels/gemm.md)."""

from .gemm_config import GemmConfig

SMS = 132


def choose_config(
    scales: str,
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
    if tokens <= 32:
        tile_m = 16 if tokens <= 16 else 32
        wide = -(-features // 256)
        if wide >= SMS // 2:  # gate_up: tiles enough without a split
            warpgroups, split = (2, 1) if scales == "group" else (4, 1)
        elif wide >= 20 and scales == "group":  # qkv
            warpgroups, split = 2, 2
        else:
            warpgroups, split = 4, 5 if units >= 64 else 4
    elif tokens <= 64:
        tile_m = 64
        if features <= 4096:
            warpgroups, split = 4, 8 if units >= 64 else 4
        else:
            warpgroups = 4 if features >= 16384 and scales == "group" else 2
            split = _split(-(-features // (64 * warpgroups)), most=2)
    else:
        tile_m = 256 if scales == "channel" and tokens > 256 else 128
        tall = scales == "channel" and tokens <= 128 and not int8_units and not 4096 < features < 16384
        warpgroups = 4 if tall else 2
        split = _split(-(-features // (64 * warpgroups)) * -(-tokens // tile_m), most=4 if tile_m == 128 else 1)
    split = max(1, min(split, units // 4))
    return GemmConfig(
        scales=scales,
        token_scales=token_scales,
        tile_m=tile_m,
        warpgroups=warpgroups,
        split=split,
        int8_units=int8_units,
        bias=bias,
        aligned=features % 8 == 0,
        ctas_per_sm=2 if warpgroups == 2 and tile_m <= 64 else 1,
        pairs=tile_m == 16,
    ).with_most_stages()


def _split(tiles: int, most: int) -> int:
    """The largest power of two up to `most` that leaves every CTA an SM of its own."""
    split = 1
    while split * 2 <= most and tiles * split * 2 <= SMS:
        split *= 2
    return split
