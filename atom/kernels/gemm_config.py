"""Which tile, ring depth and split a GEMM runs with: pure arithmetic on the problem's shape, no GPU, no cutlass."""

import dataclasses

SHARED_BYTES = 227 * 1024  # of one SM of sm_90, less what the driver keeps


@dataclasses.dataclass(frozen=True)
class GemmConfig:
    """Compile-time choices of one GEMM kernel.

    scales        "group": a bfloat16 weight scale per row and unit, float32 promotion; "channel": an integer factor
                  per row and group folded into the codes, one float32 scale per row
    token_scales  "group": a float32 scale per token and unit; "token": one per token
    tile_m        tokens of a tile (wgmma's N)
    warpgroups    consumer warpgroups: 64 rows (features) each
    stages        depth of the ring of shared-memory stages, one unit of K each
    split         CTAs of a cluster that share one tile along K
    multicast     CTAs of a cluster that share one tile of tokens
    int8_units    whether units of INT8 (outlier columns) follow those of INT4
    aligned       N is a multiple of 8: 16-byte stores
    """

    scales: str
    token_scales: str
    tile_m: int
    warpgroups: int
    stages: int
    split: int = 1
    multicast: int = 1
    int8_units: bool = False
    bias: bool = False
    aligned: bool = True
    pdl: bool = True
    ctas_per_sm: int = 1

    @property
    def unit_bytes(self) -> int:
        return 4096 + (64 if self.scales == "channel" else 128)

    @property
    def registers(self) -> int:
        """Registers of a consumer thread after rebalancing with the producer's warpgroup; 0: no rebalancing."""
        return {2: 240, 3: 160, 4: 112}[self.warpgroups] if self.tile_m >= 64 and self.ctas_per_sm == 1 else 0

    @property
    def stage_bytes(self) -> int:
        scales = 4 * self.tile_m if self.token_scales == "group" else 0
        return 128 * self.tile_m + self.warpgroups * self.unit_bytes + scales

    @property
    def pool_bytes(self) -> int:
        """Shared memory of the ring, or of the epilogue's staging where that is larger."""
        staging = 4 * self.tile_m * (64 * self.warpgroups + 4)
        return max(self.stages * self.stage_bytes, staging)
