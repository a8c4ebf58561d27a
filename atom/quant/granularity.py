"""Granularity: what one scale covers.

Every granularity looks at the last axis of a tensor, the one that a matrix product sums over, and says the shape
of the scales. A weight [N, K] has channels (rows), an activation [tokens, K] has tokens, a cached key
[tokens, heads, head_dim] has heads: three names for one scale per row, kept apart because schemes are read by people.
"""

from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True)
class Granularity:
    """One scale per row of the last axis."""

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a tensor of `shape`."""
        return (*shape[:-1], 1)

    def __str__(self) -> str:
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Tensor(Granularity):
    """One scale for everything."""

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1,) * len(shape)


@dataclass(frozen=True)
class Channel(Granularity):
    """One scale per output channel of a weight."""


@dataclass(frozen=True)
class Token(Granularity):
    """One scale per token of an activation."""


@dataclass(frozen=True)
class Head(Granularity):
    """One scale per token and head of a cached key or value."""


@dataclass(frozen=True)
class Group(Granularity):
    """One scale per `size` adjacent columns of a row; the last group of a row may be shorter."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a group has at least one column, got size {self.size}; use group:128")

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], ceil(shape[-1] / self.size))

    def __str__(self) -> str:
        return f"group:{self.size}"


_NAMED: dict[str, Granularity] = {str(g): g for g in (Tensor(), Channel(), Token(), Head())}


def parse_granularity(text: str) -> Granularity:
    """The granularity that prints as `text`: tensor, channel, token, head, or group:SIZE."""
    if text in _NAMED:
        return _NAMED[text]
    kind, _, size = text.partition(":")
    if kind == "group" and size.isdigit() and int(size) > 0:
        return Group(int(size))
    raise ValueError(f"unknown granularity {text!r}; use one of {', '.join(_NAMED)}, or group:SIZE such as group:128")
