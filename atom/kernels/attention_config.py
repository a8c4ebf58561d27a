"""The compile-time choices of the attention kernels and what follows from them: no GPU, no cutlass."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

CODE_BITS = {"int4": 4, "int8": 8, "fp8_e4m3": 8, "bf16": 16}
SHARED_BYTES = 227 * 1024  # of one SM of sm_90, less what the driver keeps
SEGMENT_BYTES = (
    40_000  # that could be read while a CTA begins and ends a segment (H200: best of 8 to 60 KB, nine batches)
)
CTA_BYTES = 70_000  # that a CTA is started for: merging what it leaves takes longer than reading less
ENOUGH_BYTES = (
    120_000  # that rings of an SM should hold: 33 KB are under way in a microsecond, and warps hold a stage each
)
SMALL_STAGE = 5000  # bytes; of smaller stages the fetching warp takes two at a time (H200: up to 2 % faster)
MOST_QUERIES = 16  # query heads of one KV head: two column tiles of mma


@dataclass(frozen=True)
class DecodeConfig:
    """Compile-time choices of one decode kernel; one block of shared memory geometry for producer and consumers.

    kv            "int4", "int8" (both unsigned under a zero point), "fp8_e4m3" or "bf16"
    queries       query heads of one KV head, 1 to 16
    has_window    the layer has a sliding window
    has_cap       scores are capped
    has_offset    what every key has in common was taken off before rounding, and belongs to the scores
    warps         that consume: each takes every `warps`-th stage of a segment
    ctas_per_sm   resident at once
    members       sequences that read a shared prefix together (prefix_decode_sm90.py): their query heads stand side by
                  side, `queries` of them in each warp's columns, and every warp takes every stage. 0: a row is one
                  sequence's
    least_tokens  of a stage, so that the cost of a softmax step is shared; a power of two
    at_once       stages that the fetching warp takes together, where they are small
    zero_bias     what stored zero points are less of
    recent        newest tokens of a sequence that another kernel reads exactly (recent_decode_sm90.py); this one stops
                  before them and adds what that found. 0: it reads all
    """

    kv: str
    head_dim: int
    queries: int
    block_size: int = 16
    has_window: bool = False
    has_cap: bool = False
    has_offset: bool = False
    warps: int = 4
    ctas_per_sm: int = 2
    members: int = 0
    least_tokens: int = 32
    at_once: int = 1
    zero_bias: int = 0
    recent: int = 0

    @property
    def own_queries(self) -> int:
        """Query heads of one sequence."""
        return self.queries * self.warps // self.members if self.members else self.queries

    @property
    def code_bits(self) -> int:
        return CODE_BITS[self.kv]

    @property
    def codes_per_word(self) -> int:
        """Of 32 bits."""
        return 32 // self.code_bits

    @property
    def row_bytes(self) -> int:
        return self.head_dim * self.code_bits // 8

    @property
    def row_words(self) -> int:
        return self.row_bytes // 4

    @property
    def word_bytes(self) -> int:
        return 0 if self.kv == "bf16" else 4

    @property
    def tile_bytes(self) -> int:
        """KVLayout.tile_bytes."""
        return -(-2 * self.block_size * (self.word_bytes + self.row_bytes) // 128) * 128

    @property
    def stage_blocks(self) -> int:
        return max(1, self.least_tokens // self.block_size)

    @property
    def stage_tokens(self) -> int:
        return self.stage_blocks * self.block_size

    @property
    def stage_bytes(self) -> int:
        return self.stage_blocks * self.tile_bytes

    @property
    def column_tiles(self) -> int:
        """Tiles of 8 query heads."""
        return -(-self.queries // 8)

    @property
    def groups(self) -> int:
        """Tiles of 16 tokens that share a tile of columns: with four query heads or fewer, two take four each."""
        return 2 if self.queries <= 4 else 1

    @property
    def key_words(self) -> int:
        """Words of a key row that one of the four lanes of its quad reads; past the row's end they repeat the last."""
        return -(-self.row_words // 4)

    @property
    def value_words(self) -> int:
        """Words of a value row that one of its eight lanes reads; past the row's end they repeat the last."""
        return -(-self.row_words // 8)

    @property
    def channel_tiles(self) -> int:
        """Tiles of 16 value channels, those past the row's end included."""
        return self.value_words * self.codes_per_word // 2

    @property
    def out_row(self) -> int:
        """Floats of a warp's output for one head where the warps' are put together, padded against bank conflicts."""
        return self.head_dim + 4

    @property
    def merge_bytes(self) -> int:
        """Where the warps of a CTA put their results together: output, maximum and sum of each warp and head."""
        return 4 * self.warps * (self.queries * self.out_row + 2 * 8 * self.column_tiles)

    @property
    def query_bytes(self) -> int:
        """Of one segment."""
        return 2 * self.queries * self.head_dim * (self.warps if self.members else 1)

    @property
    def turn_row_bytes(self) -> int:
        """cos and sin of one token of a stage in 16 bits, padded so that eight rows fall on different banks."""
        return 2 * self.head_dim + 16

    @property
    def turn_bytes(self) -> int:
        return self.stage_tokens * self.turn_row_bytes if self.has_offset else 0

    @property
    def stages(self) -> int:
        """Of the ring: what fits beside results, the queries of two segments, and barriers; as many for each warp."""
        room = SHARED_BYTES // self.ctas_per_sm - 1024 - 1280  # what the driver keeps; barriers, segments and parts
        room -= self.merge_bytes + 2 * self.query_bytes + self.turn_bytes
        most = min(24, max(0, room) // self.stage_bytes)
        return most if self.members else most // self.warps * self.warps

    @property
    def ring_bytes(self) -> int:
        """Of all rings of an SM."""
        return self.ctas_per_sm * self.stages * self.stage_bytes

    @property
    def overhead_blocks(self) -> int:
        """What could be read while a CTA begins and ends a segment."""
        return max(1, SEGMENT_BYTES // self.tile_bytes)

    @property
    def least_blocks(self) -> int:
        """What a CTA is worth being started for."""
        return max(2 * self.stage_blocks, CTA_BYTES // self.tile_bytes)

    @property
    def threads(self) -> int:
        """The consumers and one warp that fetches."""
        return 32 * (self.warps + 1)


@lru_cache(None)  # every step asks
def choose_decode(
    kv: str,
    head_dim: int,
    queries: int,
    block_size: int,
    has_window: bool,
    has_cap: bool,
    has_offset: bool = False,
    zero_bias: int = 0,
    recent: int = 0,
) -> DecodeConfig:
    """The config of a problem: of those whose registers and shared memory fit, the one with the largest rings.

    Warps of a CTA and CTAs of an SM are few where a lane holds many outputs. Two CTAs are better than three otherwise
    too (H200: by 1 to 18 %): their rings are larger, and rows of one length can be dealt whole more often. Tiles of
    short rows of codes come in larger stages, since a stage costs its barriers whatever is in it.
    """
    size = head_dim * -(-queries // 8)
    if (size >= 256 and (kv in ("int8", "bf16") or has_offset)) or size > 256:
        shapes = [(1, 4), (1, 3), (1, 2)]
    else:
        shapes = [(2, 4), (2, 3), (1, 4), (1, 3), (1, 2)]
    config = DecodeConfig(
        kv, head_dim, queries, block_size, has_window, has_cap, has_offset, zero_bias=zero_bias, recent=recent
    )
    if kv == "int4" and head_dim <= 64:
        config = replace(config, least_tokens=64)
    if config.stage_bytes <= SMALL_STAGE:
        config = replace(config, at_once=2)
    return _largest_ring(config, shapes)


@lru_cache(None)
def choose_prefix(
    kv: str, head_dim: int, queries: int, block_size: int, has_cap: bool, zero_bias: int = 0
) -> DecodeConfig:
    """The config of prefixes that sequences of `queries` heads share: every warp's 16 columns as full as may be."""
    beside = MOST_QUERIES // queries
    base = choose_decode(kv, head_dim, beside * queries, block_size, False, has_cap, zero_bias=zero_bias)
    if head_dim <= 64:  # instructions bind: more warps
        base = _largest_ring(replace(base, least_tokens=32), [(3, 4), (2, 4)])
    return replace(base, members=beside * base.warps, at_once=1)


def _largest_ring(config: DecodeConfig, shapes: list[tuple[int, int]]) -> DecodeConfig:
    """With the first of `shapes` (CTAs of an SM, computing warps of each) whose rings hold enough, or hold most."""
    configs = [replace(config, ctas_per_sm=ctas, warps=warps) for ctas, warps in shapes]
    enough = [each for each in configs if each.ring_bytes >= ENOUGH_BYTES]
    return enough[0] if enough else max(configs, key=lambda each: each.ring_bytes)


def word_index(sharers: int, words: int, row_words: int, sharer: int, word: int) -> int:
    """Which word of a row is the `word`-th of one of the lanes that share it.

    Neighbours where the row divides evenly (vector loads), else every `sharers`-th; past the end the last one.
    """
    if row_words % sharers == 0:
        return words * sharer + word
    return min(sharers * word + sharer, row_words - 1)


def row_token(row: int) -> int:
    """The token (of 16) that stands in row `row` of an mma tile.

    Any order is right as long as keys, scales and values agree; in this one the four lanes of a quad read values of
    neighbouring tokens, half as many bank conflicts as in the natural order.
    """
    return (row & 8) + ((row & 7) >> 1) + 4 * (row & 1)


@dataclass(frozen=True)
class AppendConfig:
    """Compile-time choices of the kernel that turns, rounds and writes.

    clip          TensorSpec.clip
    norm          of query and key heads, before they are turned: "none", "plain" (x / rms * weight) or "shifted"
                  (x / rms * (weight + 1), Gemma's)
    has_offset    keys are rounded less their offset, which is taken off before they are turned
    has_centre    a constant is taken off turned keys
    rotates       turned queries and keys are transformed by a block Hadamard matrix
    has_mirror    and reflected behind it
    zero_bias     zero points keep the mean of a row and are stored less so much; 0: they are whole
    has_recent    keys and values are stored unrounded too (paged_step.RecentStep)
    parts         tasks (heads of one kind that fill a warp) that a warp takes: several hide latency in prefill, one
                  spreads few tokens wide
    """

    kv: str
    head_dim: int
    block_size: int
    clip: float = 1.0
    has_offset: bool = False
    parts: int = 1
    warps: int = 4
    norm: str = "none"
    has_centre: bool = False
    rotates: bool = False
    has_mirror: bool = False
    zero_bias: int = 0
    has_recent: bool = False

    @property
    def cache(self) -> DecodeConfig:
        """Where things stand in a tile."""
        return DecodeConfig(self.kv, self.head_dim, 1, self.block_size)

    @property
    def lanes(self) -> int:
        """That share a head, 16 channels each; rounded up to a power of two."""
        return 1 << (self.head_dim // 16 - 1).bit_length()

    @property
    def heads(self) -> int:
        """Of one kind that a warp takes at once."""
        return 32 // self.lanes

    @property
    def is_exact(self) -> bool:
        """Heads are rounded from float32, not from pairs of bfloat16."""
        return self.has_centre or self.rotates or self.zero_bias > 0

    @property
    def hadamard(self) -> int:
        """Channels of a block of the transform: the largest power of two that divides head_dim."""
        return self.head_dim & -self.head_dim

    @property
    def hadamard_scale(self) -> float:
        return float(self.hadamard**-0.5)

    @property
    def octet_steps(self) -> tuple[int, ...]:
        """The transform's strides between octets."""
        return tuple(1 << i for i in range((self.hadamard // 8).bit_length() - 1))

    def tasks(self, num_heads: Any, num_kv_heads: Any) -> Any:
        """Of one token."""
        return -(-num_heads // self.heads) + 2 * -(-num_kv_heads // self.heads)

    def ctas(self, num_tokens: Any, num_heads: Any, num_kv_heads: Any) -> Any:
        """Of a launch."""
        return -(-num_tokens * -(-self.tasks(num_heads, num_kv_heads) // self.parts) // self.warps)


@dataclass(frozen=True)
class GatherConfig:
    """Compile-time choices of the kernel that reads blocks into dense keys and values.

    zero_bias  what stored zero points are less of
    """

    kv: str
    head_dim: int
    block_size: int
    threads: int = 128
    zero_bias: int = 0

    @property
    def cache(self) -> DecodeConfig:
        """Where things stand in a tile."""
        return DecodeConfig(self.kv, self.head_dim, 1, self.block_size)

    @property
    def octets(self) -> int:
        """Groups of 8 channels of a row."""
        return self.head_dim // 8

    @property
    def code_words(self) -> int:
        """Of 32 bits, that hold 8 channels."""
        return self.cache.code_bits // 4

    @property
    def rounds(self) -> int:
        """Octets that a thread takes of a block's keys and values."""
        return -(-2 * self.block_size * self.octets // self.threads)
