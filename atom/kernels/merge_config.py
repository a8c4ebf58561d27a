"""The compile-time choices of the kernel that merges results: no GPU, no cutlass."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MergeConfig:
    """Compile-time choices of the kernel. has_places: rows have indices, else they lie one behind the other."""

    head_dim: int
    has_places: bool = False
    threads: int = 256

    @property
    def groups(self) -> int:
        """Of 8 channels, a thread's."""
        return self.head_dim // 8
