"""Which config a GEMM runs with: a short table, measured on Llama-3-8B shapes on one H200 (docs/kernels/gemm.md)."""

from dataclasses import replace

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
    sms: int = SMS,
) -> GemmConfig:
    """The config of a problem: the tile that covers the tokens, and a split of K that fills the SMs.

    tokens    1 or more; the caller rounds them up so that few kernels are compiled
    units     along K, see gemm_pack.py
    sms       of the GPU: no more CTAs than that wait for each other
    Raises nothing: every problem has a config.
    """
    if weight == "e4m3_fast":  # the bytes and the sums of INT8; two CTAs that share tokens draw less power
        config = choose_config("int8", token_scales, tokens, features, units, int8_units, bias, sms)
        return replace(config, weight=weight, multicast=2 if tokens > 512 and config.tile_m == 256 else 1)
    kind = KINDS[weight]
    multicast, clustered, pairs, tail = 1, True, False, 1
    by_factor = weight in ("int4_uint4", "int4_uint4_g32")
    is_w4a16 = weight == "int4_uint4_bf16"
    small_groups = weight == "int4_uint4_g32" and tokens <= 16  # with a sweep of their own
    three_quarters = 64 < tokens <= 96 and (by_factor or weight == "int8")  # of a tile of 128
    two_fit = tokens <= (32 if kind.operand == "bf16" else 64)  # CTAs of two warpgroups on an SM
    if tokens <= 32:
        tile_m = 16 if tokens <= 16 else 32
        wide = -(-features // 256)
        if wide >= SMS // 2:  # gate_up: tiles enough without a split
            warpgroups, split = (2, 1) if kind.promoted or small_groups or is_w4a16 else (4, 1)
            pairs = kind.promoted
        elif wide >= 20:  # qkv
            warpgroups, split = (2, 2) if kind.promoted or small_groups or (is_w4a16 and tokens > 16) else (4, 4)
            pairs = kind.promoted or small_groups
        elif is_w4a16 and units >= 16 and _split(-(-features // 128), sms) == 4:  # o and down: codes take the time
            warpgroups, split, clustered, two_fit = 2, 4, False, False
        elif units >= 64 and kind.operand != "bf16":  # down
            warpgroups, split, clustered, pairs = 2, _split(-(-features // 128), sms), False, True
            two_fit = not (int8_units and kind.promoted)
        elif kind.operand == "bf16" or kind.promoted:
            all_fit = weight != "e2m1_g16" or 5 * wide <= sms  # at once, as those that meet at a counter must
            warpgroups, split = 4, 5 if units >= 64 and all_fit else 4
            pairs = not kind.promoted or token_scales == "group"  # else a register too many
            clustered = weight != "e2m1_g16" or split == 4 or tile_m == 16  # else one too many as well
        else:  # o
            warpgroups, split = (4, 4) if small_groups else (2, _split(-(-features // 128), sms))
            pairs = small_groups
        pairs = pairs and tokens <= 16 and kind.bits == 4 and kind.operand == "int8"
    elif tokens <= 64:
        tile_m = 64
        one_round = is_w4a16 and sms < 2 * -(-features // 256) <= 2 * sms  # of tiles of 256 rows
        warpgroups = 4 if one_round or (features >= 16384 and kind.promoted and kind.operand != "bf16") else 2
        split = _split(-(-features // (64 * warpgroups)), sms)
        if is_w4a16 and units >= 64 and 8 * -(-features // 256) <= sms:  # down
            warpgroups, split = 4, 8
        clustered = split <= 2
        two_fit = two_fit and (units < 64 or by_factor)
    elif weight == "int4_uint4_bf16":
        tile_m, warpgroups, tail = _bf16_tile(tokens, features, units, sms)
        split = _split(_tiles(tile_m, warpgroups, tokens, features), sms) if tokens <= 256 else 1
        clustered = split <= 2
    elif tokens <= 256:
        gate_up = features >= 16384 and kind.operand == "int8" and not kind.promoted
        tile_m, warpgroups = 96 if three_quarters else 128, 2
        if 128 < tokens <= 192:  # the same tiles, three quarters of them
            tile_m = 192 if weight == "int4_uint4" and units >= 64 else 96
        if gate_up:
            tile_m, warpgroups = _wide_tile(tokens, features, sms)
        if weight == "int4_uint4" and units < 64 and tokens > 128 and not gate_up and features > 64 * sms:
            tile_m *= 2  # one round of tiles for two
        split = _split(_tiles(tile_m, warpgroups, tokens, features), sms)
        clustered = split <= 2
    elif kind.operand == "int8":
        tile_m, warpgroups = (128 if kind.promoted else _tile_of_many(weight, tokens, features)), 2
        split = 1
        if weight == "int4_uint4" and not int8_units and 384 < tokens <= 512 and tile_m != 192:
            tail = 2
    else:
        # Two CTAs share a tile of tokens: bfloat16 activations are most of what a tile reads, and two sums of E4M3
        # leave room for 192 tokens only, too few products for their bytes.
        tile_m = 192 if weight == "e4m3" and tokens > 1024 else 128
        warpgroups, split, multicast = 2, 1, 1 if weight == "e4m3" and tokens <= 1024 else 2
    ways, row_tiles = 1, -(-features // 64)
    is_one_round = 48 <= row_tiles <= sms  # of tiles of 64 rows
    if is_one_round and weight == "int8" and tokens <= 16 and units >= 8:
        ways, warpgroups, split, two_fit = 4, 4, 1, False
    elif is_one_round and weight == "int4_uint4" and tokens <= 16 and 8 <= units < 64 and 2 * row_tiles > sms:  # qkv
        ways, warpgroups, split, two_fit, pairs = 4, 4, 1, False, False
    elif is_one_round and by_factor and 64 < tokens <= 128 and not three_quarters and 8 <= units < 64:  # qkv, o
        ways, split = 2, 2 if row_tiles * 2 <= sms else 1
        clustered = split == 1
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
        ctas_per_sm=2 if warpgroups == 2 and two_fit else 1,
        bounded=warpgroups == 2 and two_fit and (split == 1 or (tokens <= 32 and clustered and split == 4)),
        pairs=pairs or (weight == "e4m3" and tile_m in (96, 128)),
        clustered=clustered or split == 1,
        ways=ways,
        tail=tail if units >= 8 else 1,
    ).with_most_stages()


def _wide_tile(tokens: int, features: int, sms: int) -> tuple[int, int]:
    """(tokens, warpgroups) of a tile of a linear that has one for every SM: the fewest products an SM, in whole rounds.

    Of 22016 features (Llama-2-7B) 172 tiles of 128 rows are two rounds of 132 SMs, 115 of 192 rows one.
    """
    if tokens <= 128:
        tile = 96 if tokens <= 96 else 128
        shapes = [(tile, 4), (tile, 3), (tile, 2)]
    else:
        shapes = [(192, 2), (192, 3)] if tokens <= 192 else [(256, 2), (128, 3)]

    def products(shape: tuple[int, int]) -> int:
        tile, warpgroups = shape
        return tile * warpgroups * -(-_tiles(tile, warpgroups, tokens, features) // sms)

    return min(shapes, key=products)


def _bf16_tile(tokens: int, features: int, units: int, sms: int) -> tuple[int, int, int]:
    """(tokens, warpgroups, CTAs that share a tile of the last round) of "int4_uint4_bf16", of more than 64 tokens.

    Of more than 256 what ends first, in rounds of one tile an SM. A product takes the least in the largest tile, of
    which few products fill a round.
    """
    if tokens <= 256:
        return next(tile for tile in (128, 192, 256) if tokens <= tile), 2, 1
    time = {(128, 2, 2): 0.88, (128, 3, 2): 0.86, (256, 2, 2 if tokens <= 512 else 1): 0.82}  # of a product

    def all_rounds(shape: tuple[int, int, int]) -> float:
        tile, warpgroups, tail = shape
        share = 1.0 if tail == 1 else _share(8, units)
        return _rounds(_tiles(tile, warpgroups, tokens, features), share, sms) * tile * warpgroups * time[shape]

    return min(time, key=all_rounds)


def _tile_of_many(weight: str, tokens: int, features: int) -> int:
    """The tile for the INT8 products of many tokens: what ends first, in rounds of one tile an SM.

    A tile of half as many products takes a little more than half as long, but may fill the last round better. Tiles of
    192 tokens are for 257 to 384.
    """
    time = {256: 1.0, 128: 0.53 if KINDS[weight].is_verbatim else 0.59}  # of a round
    if weight == "int4_uint4" and tokens <= 512:
        time |= {192: 0.76}
    return min(time, key=lambda tile: -(-_tiles(tile, 2, tokens, features) // SMS) * time[tile])


def _share(meeting: int, units: int) -> float:
    """What a round takes in which two CTAs share each tile: half as long, and as long as `meeting` units to add up."""
    return 0.5 + meeting / units


def _rounds(tiles: int, share: float, sms: int) -> float:
    """How many rounds of a tile an SM it takes; `share`: what the last one takes if it has tiles for half of them."""
    whole, left = divmod(tiles, sms)
    if left == 0:
        return whole
    return whole + (min(share, 1.0) if 2 * left <= sms else 1.0)


def _tiles(tile: int, warpgroups: int, tokens: int, features: int) -> int:
    """How many tiles a product has."""
    return -(-features // (64 * warpgroups)) * -(-tokens // tile)


def _split(tiles: int, sms: int) -> int:
    """4, 2 or 1 CTAs a tile: as many as leave every CTA an SM of its own."""
    return next((split for split in (4, 2) if tiles * split <= sms), 1)
