"""Which prefill chunks of a step are attended over how, and where their keys stand in dense memory: no GPU, no torch.

Keys and values of all chunks are read into dense rows. Torch has two kernels for what follows: ragged flash attention,
which takes all lengths and windows at once, and cuDNN's, 1.7 times as fast on an H200, which takes equal lengths, and
causality only from the first key on (a *square*). A chunk that is worth a launch of its own becomes a square: of its
keys the first, a multiple of SQUARE, are attended over in full, the others in a square whose first queries are filling;
the two results are merged. Sides are multiples of SQUARE, because cuDNN prepares itself for every new shape; whether
one is worth that, square_shapes.py decides.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .paged_step import Ints, PagedStep, runs
from .square_shapes import SquareShape

SQUARE = 512
SQUARE_FLOPS = 3e10  # of a launch: 90 us gained on an H200 (177 us ragged), for 45 more on the host
PREFIX_FLOPS = 1e11  # the same behind a prefix, two launches and a merge: 160 us gained (568 us), for 270 on the host;
# and where a square's sides must be filled up: four prompts of 1000 took 194 us so, 111 of them for copies


@dataclass(frozen=True)
class RaggedPart:
    """Chunks for ragged flash attention.

    tokens         the step's tokens that are theirs: a range, or indices where others stand between them
    cu_seqlens_q   int32 [C + 1], in the order of `tokens`
    cu_seqlens_k   int32 [C + 1], dense rows; they begin at row 0
    """

    tokens: slice | NDArray[np.int64]
    cu_seqlens_q: Ints
    cu_seqlens_k: Ints

    @cached_property
    def most(self) -> tuple[int, int]:
        """Queries and keys of a chunk at most."""
        return int(np.diff(self.cu_seqlens_q).max()), int(np.diff(self.cu_seqlens_k).max())


@dataclass(frozen=True)
class SquarePart:
    """Equal chunks for one launch of cuDNN's attention.

    tokens   the step's tokens that are theirs, a range: `count` times `queries`
    first    dense row of the first one's first key; each has `prefix` + `side` rows
    prefix   keys that are attended over in full
    filling  queries that stand before a chunk's own in its square
    side     of the square: filling, queries, and what is missing to a multiple of SQUARE
    """

    tokens: slice
    first: int
    count: int
    queries: int
    prefix: int
    filling: int
    side: int


@dataclass(frozen=True)
class PrefillPlan:
    """The prefill chunks of a step, for layers of one window.

    tiles      int32 [N, 4]   block (-1: zeros), dense row of its first token read, first token, end token
    num_rows   dense rows
    positions  int64 [num_rows], of the keys there; 0 in filling
    is_all     the step has no other tokens
    """

    tiles: Ints
    num_rows: int
    positions: NDArray[np.int64]
    ragged: RaggedPart | None
    squares: tuple[SquarePart, ...]
    is_all: bool


@dataclass(frozen=True)
class Chunks:
    """Chunks of a step: their queries and the ends of their keys, where their tokens begin, and their block tables."""

    counts: Ints
    ends: Ints
    starts: Ints
    tables: Ints


def chunks_of(step: PagedStep) -> Chunks | None:
    """The sequences with several queries; None if there are none."""
    chosen = np.flatnonzero(step.counts > 1)
    if not len(chosen):
        return None
    counts, ends = step.counts[chosen].astype(np.int64), step.seqlens_k[chosen].astype(np.int64)
    return Chunks(counts, ends, step.cu_seqlens_q[chosen].astype(np.int64), step.tables[chosen])


Takes = Callable[[tuple[SquareShape, ...], float], bool]


def always(shapes: tuple[SquareShape, ...], flops: float) -> bool:
    """Takes every shape."""
    return True


def plan_prefill(
    step: PagedStep,
    window: int | None,
    block_size: int,
    flops: int = 0,
    allows_squares: bool = False,
    takes: Takes = always,
) -> PrefillPlan | None:
    """The plan of the sequences with several queries; None if there are none.

    flops           of one query and key: 4 * num_heads * head_dim
    allows_squares  results may depend on which chunks are together in a step
    takes           whether a square's shapes are worth it for chunks of so many flops (SquareShapes.takes)
    """
    chunks = chunks_of(step)
    if chunks is None:
        return None
    return plan_chunks(chunks, window, block_size, flops, allows_squares, step.num_tokens, takes)


def plan_chunks(
    chunks: Chunks,
    window: int | None,
    block_size: int,
    flops: int,
    allows_squares: bool,
    num_tokens: int,
    takes: Takes = always,
) -> PrefillPlan:
    """`plan_prefill` of these chunks, in a step of num_tokens."""
    counts, ends, starts = chunks.counts, chunks.ends, chunks.starts
    firsts = np.zeros_like(ends) if window is None else np.maximum(0, ends - counts - window + 1)
    groups: list[tuple[int, int]] = []  # chunks that make a square part: first and end
    if allows_squares and (window is None or window >= ends.max()):
        firsts = np.zeros_like(ends)
        groups = list(_square_groups(chunks, flops, takes))
    in_square = np.zeros(len(counts), dtype=bool)
    for start, stop in groups:
        in_square[start:stop] = True
    ragged_keys = np.where(in_square, 0, ends - firsts)
    rows = np.cumsum(ragged_keys) - ragged_keys  # of each chunk's first key
    total = int(ragged_keys.sum())
    squares, filling = [], []
    for start, stop in groups:
        queries, length = int(counts[start]), int(ends[start])
        prefix, side = _sides(queries, length)
        rows[start:stop] = total + np.arange(stop - start) * (prefix + side)
        at = int(starts[start])
        tokens = slice(at, at + (stop - start) * queries)
        squares.append(SquarePart(tokens, total, stop - start, queries, prefix, length - queries - prefix, side))
        total += (stop - start) * (prefix + side)
        if prefix + side > length:
            filling += [(int(row) + length, int(row) + prefix + side) for row in rows[start:stop]]
    tiles, positions = _tiles(chunks.tables, firsts, ends, rows, block_size, total)
    empty = [(-1, row, 0, min(block_size, stop - row)) for a, stop in filling for row in range(a, stop, block_size)]
    if empty:
        tiles = np.concatenate((tiles, np.array(empty, dtype=np.int32)))
    ragged = _ragged(chunks, ragged_keys, ~in_square)
    return PrefillPlan(tiles, total, positions, ragged, tuple(squares), int(counts.sum()) == num_tokens)


def _sides(queries: int, length: int) -> tuple[int, int]:
    """Keys that are attended over in full, and the side of the square behind them."""
    prefix = (length - queries) // SQUARE * SQUARE
    return prefix, -(-(length - prefix) // SQUARE) * SQUARE


def _square_groups(chunks: Chunks, flops: int, takes: Takes) -> Iterator[tuple[int, int]]:
    """Runs of neighbouring chunks, equal in queries and keys, that are worth a launch and their shapes' preparation."""
    counts, ends, starts, start = chunks.counts, chunks.ends, chunks.starts, 0
    for stop in range(1, len(counts) + 1):
        is_next = stop < len(counts) and starts[stop] == starts[stop - 1] + counts[stop - 1]
        if is_next and counts[stop] == counts[start] and ends[stop] == ends[start]:
            continue
        queries, length = int(counts[start]), int(ends[start])
        done = (stop - start) * queries * (length - queries / 2) * flops
        is_square = queries == length and queries % SQUARE == 0
        is_large = done >= (SQUARE_FLOPS if is_square else PREFIX_FLOPS) and queries >= SQUARE // 2
        if is_large and takes(_shapes(stop - start, *_sides(queries, length)), done):
            yield start, stop
        start = stop


def _shapes(count: int, prefix: int, side: int) -> tuple[SquareShape, ...]:
    """What a part's launches need: one chunk's keys lie together, several chunks' as far apart as all of one's."""
    apart = prefix + side
    square = SquareShape(count, side, side, side if count == 1 else apart)
    return (square, SquareShape(count, side, prefix, prefix if count == 1 else apart)) if prefix else (square,)


def _tiles(
    tables: Ints, firsts: Ints, ends: Ints, rows: Ints, block_size: int, total: int
) -> tuple[Ints, NDArray[np.int64]]:
    """PrefillPlan's tiles and positions of chunks whose keys `firsts` ... `ends` - 1 go to `rows` and behind."""
    opening = firsts // block_size
    blocks = -(-ends // block_size) - opening
    owner = np.repeat(np.arange(len(ends)), blocks)
    index = runs(opening, blocks)  # of the block
    first = np.maximum(firsts[owner] - index * block_size, 0)
    tiles = np.empty((len(owner), 4), dtype=np.int32)
    tiles[:, 0] = tables[owner, index]
    tiles[:, 1] = rows[owner] + index * block_size + first - firsts[owner]
    tiles[:, 2] = first
    tiles[:, 3] = np.minimum(ends[owner] - index * block_size, block_size)
    lengths = ends - firsts
    positions = np.zeros(total, dtype=np.int64)
    positions[runs(rows, lengths)] = runs(firsts, lengths)
    return tiles, positions


def _ragged(chunks: Chunks, keys: Ints, chosen: NDArray[np.bool_]) -> RaggedPart | None:
    if not chosen.any():
        return None
    return ragged_part(chunks.counts[chosen], keys[chosen], chunks.starts[chosen])


def ragged_part(counts: Ints, keys: Ints, starts: Ints) -> RaggedPart:
    """Chunks of so many queries and keys, whose tokens begin at `starts`."""
    cu_seqlens_q = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    tokens: slice | NDArray[np.int64] = slice(int(starts[0]), int(starts[-1] + counts[-1]))
    if starts[-1] + counts[-1] - starts[0] != cu_seqlens_q[-1]:
        tokens = np.repeat(starts - cu_seqlens_q[:-1], counts) + np.arange(cu_seqlens_q[-1])
    return RaggedPart(tokens, cu_seqlens_q, np.concatenate(([0], np.cumsum(keys))).astype(np.int32))
