"""The kinds of packed weights that the GEMM multiplies: what a unit holds, and what becomes of its sums.

A unit is 64 rows (output features) by `columns` of K in the order in which wgmma reads it (gemm_pack.py), followed by
its scales. A kind is a value; how its codes become a wgmma operand stands in gemm_decode_sm90.py under the same name.
"""

from dataclasses import dataclass
from typing import Literal

UNIT_ROWS = 64


@dataclass(frozen=True)
class WeightKind:
    """One way in which a weight is packed and multiplied.

    operand         what wgmma multiplies: "int8", "e4m3" or "bf16"; the activation arrives in it
    bits            of one code
    columns         of K in a unit
    scale_bytes     behind the codes of a unit: a multiple of 128, so that units are whole 128-byte lines
    promoted        a unit's sum is added to a float32 sum of its own: under a scale per row, or because the tensor
                    cores add too coarsely (E4M3: 14 bits or so); else wgmma itself adds up over all of K
    channel_scaled  one float32 scale per row at the end
    """

    name: str
    operand: Literal["int8", "e4m3", "bf16"]
    bits: int
    columns: int
    scale_bytes: int
    promoted: bool
    channel_scaled: bool

    @property
    def code_bytes(self) -> int:
        return UNIT_ROWS * self.columns * self.bits // 8

    @property
    def unit_bytes(self) -> int:
        return self.code_bytes + self.scale_bytes

    @property
    def operand_bytes(self) -> int:
        return 2 if self.operand == "bf16" else 1

    @property
    def is_verbatim(self) -> bool:
        """The codes are the operand: wgmma reads them from shared memory."""
        return self.bits == 8

    @property
    def steps(self) -> int:
        """wgmmas of a unit, 32 bytes of operand each."""
        return self.columns * self.operand_bytes // 32


KINDS = {
    kind.name: kind
    for kind in (
        # INT4 codes under a bfloat16 scale per row and unit; units of INT8 outlier columns may follow
        WeightKind("int4", "int8", 4, 128, 128, promoted=True, channel_scaled=False),
        # INT4 codes times an integer factor per row and unit
        WeightKind("int4_uint4", "int8", 4, 128, 128, promoted=False, channel_scaled=True),
        # the same, a factor per row and 32 columns
        WeightKind("int4_uint4_g32", "int8", 4, 128, 128, promoted=False, channel_scaled=True),
        WeightKind("int8", "int8", 8, 128, 0, promoted=False, channel_scaled=True),
        WeightKind("e4m3", "e4m3", 8, 128, 0, promoted=True, channel_scaled=True),
        WeightKind("e4m3_fast", "e4m3", 8, 128, 0, promoted=False, channel_scaled=True),  # adds coarsely, by choice
        # 4-bit codes that become bfloat16, exactly: alone, times an integer factor per row and unit, or times an 8-bit
        # scale per row and 16 or 32 columns
        WeightKind("int4_bf16", "bf16", 4, 128, 128, promoted=True, channel_scaled=False),
        WeightKind("int4_uint4_bf16", "bf16", 4, 128, 128, promoted=False, channel_scaled=True),
        WeightKind("int4_g16", "bf16", 4, 128, 512, promoted=False, channel_scaled=True),
        WeightKind("e2m1_g16", "bf16", 4, 128, 512, promoted=False, channel_scaled=True),
        WeightKind("e2m1_g32", "bf16", 4, 128, 256, promoted=False, channel_scaled=True),
    )
}
OUTLIER_COLUMNS = 64  # of a unit of INT8 outlier columns: as many bytes as one of INT4
