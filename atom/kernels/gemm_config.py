"""The compile-time choices of one GEMM kernel and the shared memory they take: arithmetic alone, no GPU, no cutlass."""

import dataclasses
import math

from .gemm_kinds import KINDS, UNIT_ROWS, WeightKind

MOST_TILES = 256  # output tiles of a launch that splits K
COUNTER_WORDS = 32 * MOST_TILES  # of scratch memory, before the partial sums
SHARED_BYTES = 227 * 1024  # of one SM of sm_90, less what the driver keeps


@dataclasses.dataclass(frozen=True)
class GemmConfig:
    """Compile-time choices of one GEMM kernel.

    weight        name of a WeightKind
    token_scales  "group": a float32 scale per token and unit; "token": one per token; "none"
    tile_m        tokens of a tile (wgmma's N)
    warpgroups    consumer warpgroups: 64 rows (features) each
    stages        depth of the ring of shared-memory stages, one unit of K each
    split         CTAs of a cluster that share one tile along K
    multicast     CTAs of a cluster that share one tile of tokens
    int8_units    whether units of INT8 (outlier columns) follow those of INT4
    pairs         two units of K at a time: hides latency where tiles are small, and of "e4m3" the promotion
    clustered     the CTAs of a split are a cluster; else they meet at a counter in global memory, and a launch must
                  not have more of them than the GPU holds at once
    aligned       N is a multiple of 8: 16-byte stores
    bounded       registers and shared memory are such that `ctas_per_sm` CTAs fit for certain
    ways          warpgroups that share rows: each takes every `ways`-th unit of K; 1, or all of them
    residual      a bfloat16 matrix of the output's shape is added to the rounded products
    tail          CTAs that share each tile of the last round along K, where that round has tiles for a part of the SMs
                  only; they meet at a counter, as those of a split do. Without a split, ways and multicast
    """

    weight: str
    token_scales: str
    tile_m: int
    warpgroups: int
    stages: int = 0
    split: int = 1
    multicast: int = 1
    int8_units: bool = False
    bias: bool = False
    aligned: bool = True
    pdl: bool = True
    ctas_per_sm: int = 1
    pairs: bool = False
    clustered: bool = True
    bounded: bool = False
    ways: int = 1
    residual: bool = False
    tail: int = 1

    @property
    def kind(self) -> WeightKind:
        return KINDS[self.weight]

    @property
    def scaled_early(self) -> bool:
        """Sums are scaled before the outliers' are added, under scales of their own, and not at the end."""
        return self.int8_units and not self.kind.promoted

    @property
    def fetches_ahead(self) -> bool:
        """A unit's codes leave shared memory while the one before is multiplied, where registers suffice.

        Of a ring of two stages of bfloat16, all that fit for many tokens, both would have to be full.
        """
        tight = self.scaled_early and self.tile_m == 128 and self.warpgroups == 4
        return not tight and not (self.kind.operand == "bf16" and self.stages == 2)

    @property
    def sums_float(self) -> bool:
        """What leaves the main loop is float32."""
        return self.kind.promoted or self.scaled_early

    @property
    def parts(self) -> int:
        """CTAs that add up a tile: of every one, or of those of the last round."""
        return max(self.split, self.tail)

    @property
    def share_tokens(self) -> int:
        """Tokens of a tile whose sums one of those CTAs adds up and stores."""
        return 8 * -(-self.tile_m // (8 * self.parts))

    @property
    def meets_at_counter(self) -> bool:
        """Those CTAs are no cluster."""
        return self.tail > 1 or not self.clustered

    @property
    def x_bytes(self) -> int:
        """Activations of one unit: 128 columns of bytes, or twice 64 of bfloat16, for every token."""
        return 128 * self.tile_m * self.kind.operand_bytes

    @property
    def w_bytes(self) -> int:
        return self.warpgroups * self.kind.unit_bytes

    def most_ctas(self, sms: int) -> int:
        """CTAs of a launch that takes its tiles one after the other, on a GPU of so many SMs."""
        return sms * self.ctas_per_sm

    @property
    def registers(self) -> int:
        """Registers of a consumer thread after rebalancing with the producer's warpgroup; 0: no rebalancing."""
        return {2: 240, 3: 160, 4: 112}[self.warpgroups] if self.tile_m >= 64 and self.ctas_per_sm == 1 else 0

    @property
    def stage_bytes(self) -> int:
        scales = 4 * self.tile_m if self.token_scales == "group" else 0
        return self.ways * self.x_bytes + self.w_bytes + scales

    @property
    def ring_bytes(self) -> int:
        return self.stages * self.stage_bytes

    @property
    def chunk_tokens(self) -> int:
        """Tokens that a warpgroup transposes at a time in the epilogue."""
        return math.gcd(self.tile_m, 64)

    @property
    def staging_bytes(self) -> int:
        """One warpgroup's staging: 64 bfloat16 features a token, padded by 16 bytes against bank conflicts."""
        return 144 * self.chunk_tokens

    @property
    def scale_rows(self) -> int:
        """Scales of a token that are not loaded with a stage: its own, and its outliers'."""
        return 0 if self.token_scales != "token" else 2 if self.scaled_early else 1

    @property
    def scale_bytes(self) -> int:
        """A warpgroup's copy of the scales of the tile's tokens."""
        return 4 * self.scale_rows * self.tile_m

    @property
    def stagings_bytes(self) -> int:
        """Staging of all warpgroups that store."""
        return self.warpgroups // self.ways * self.staging_bytes

    @property
    def pool_bytes(self) -> int:
        """Shared memory of the ring, of each warpgroup, and for the sums that warpgroups of the same rows add up."""
        return self.ring_bytes + self.stagings_bytes + self.warpgroups * self.scale_bytes + self.merge_bytes

    @property
    def merge_bytes(self) -> int:
        return (self.ways - 1) * 4 * UNIT_ROWS * self.tile_m

    def with_most_stages(self) -> "GemmConfig":
        """As many stages as fit, at most 16."""
        room = SHARED_BYTES - 1024 if self.ctas_per_sm == 1 else SHARED_BYTES // self.ctas_per_sm - 2048
        for stages in range(16, 1, -1):
            config = dataclasses.replace(self, stages=stages)
            if config.pool_bytes + 1024 <= room:
                return config
        raise ValueError(f"no two stages of {self} fit in {room} bytes of shared memory; use a smaller tile")
