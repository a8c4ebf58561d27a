"""The compile-time choices of the kernel of the newest tokens and what follows from them: no GPU, no cutlass."""

from dataclasses import dataclass

RECENT_TOKENS = (16, 32, 64)  # windows that there are kernels for


@dataclass(frozen=True)
class RecentConfig:
    """Compile-time choices of the kernel that attends over the newest tokens, which are exact.

    tokens   of the window, one of RECENT_TOKENS
    queries  query heads of one KV head, 1 to 16
    """

    tokens: int
    head_dim: int
    queries: int
    warps: int = 4

    @property
    def tiles(self) -> int:
        """Of 16 tokens, a warp each."""
        return self.tokens // 16

    @property
    def rows(self) -> int:
        """Sequences and KV heads of a CTA."""
        return self.warps // self.tiles

    @property
    def columns(self) -> int:
        """Tiles of 8 query heads."""
        return -(-self.queries // 8)

    @property
    def groups(self) -> int:
        """Of 8 channels, that a lane loads at once."""
        return self.head_dim // 8

    @property
    def key_rounds(self) -> int:
        """Groups of each key that a lane loads; lanes past the row's end repeat the last."""
        return -(-self.groups // 4)

    @property
    def value_rounds(self) -> int:
        """Groups of each value that a lane loads."""
        return -(-self.groups // 8)

    @property
    def shared_bytes(self) -> int:
        """Where the warps of a CTA put their results: output, maximum and sum of each warp and head."""
        return 4 * self.warps * (self.queries * self.out_row + 2 * 8 * self.columns)

    @property
    def out_row(self) -> int:
        """Floats of a head's output in shared memory, padded against bank conflicts."""
        return self.head_dim + 4
