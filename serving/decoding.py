"""The sequences that only decode, side by side: what a step changes of each lies in arrays by lane.

That a sequence joins, leaves or needs a block costs Python time; that it goes on by a token costs a place in a few
numpy operations. It joins when the step is scheduled that samples its first token, and from then on one token is
scheduled for it at a time: its length, the pending ones included, is always `scheduled + 1`.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import compress
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .result import FAULTY
from .sequence import Sequence

Int32 = NDArray[np.int32]
Bool = NDArray[np.bool_]

NO_TOKEN = -2  # fills up lists of stop tokens

_order = attrgetter("order")


class Rows(NamedTuple):
    """Sequences, and what every step asks of them, side by side."""

    sequences: tuple[Sequence, ...]
    lanes: Int32
    request_ids: tuple[str, ...]
    indices: tuple[int, ...]
    cached_tokens: tuple[int, ...]
    token_ids: tuple[list[int], ...]

    def where(self, chosen: Bool) -> "Rows":
        """Some of them."""
        marks = chosen.tolist()
        sequences, lanes, *columns = self
        kept: list[Any] = [tuple(compress(column, marks)) for column in columns]
        return Rows(tuple(compress(sequences, marks)), lanes[chosen], *kept)


@dataclass(frozen=True, slots=True)
class Decodes:
    """Sequences of a step that have one token each, from whose logits the next one is sampled.

    rows        the sequences
    starts      int32 [B]   positions of their tokens
    tokens      int32 [B]   0 where ...
    is_pending  bool  [B]   ... the token is still being sampled
    masks_stop  bool  [B]   EOS and stop token ids must not be sampled yet
    stays       int64 [B]   which stay among the decoding ones this is: tells a sequence from itself before a preemption
    epochs      int32 [B]
    """

    rows: Rows
    starts: Int32
    tokens: Int32
    is_pending: Bool
    masks_stop: Bool
    stays: NDArray[np.int64]
    epochs: Int32

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lanes(self) -> Int32:
        return self.rows.lanes


class Decoding:
    """The decoding sequences of one scheduler, in its order.

    scheduled, computed, known  int32 [num_lanes], see Sequence; `known` counts token_ids
    """

    def __init__(self, num_lanes: int, block_size: int) -> None:
        self.block_size = block_size
        self.scheduled, self.computed, self.known = np.zeros((3, num_lanes), dtype=np.int32)
        self._last, self._epochs = np.zeros((2, num_lanes), dtype=np.int32)
        self._most, self._least = np.zeros((2, num_lanes), dtype=np.int32)  # Sequence.max_length, min_length
        self._stays = np.zeros(num_lanes, dtype=np.int64)  # 0: nobody's
        self._ends = np.full((num_lanes, 1), NO_TOKEN, dtype=np.int32)  # tokens that may end a sequence
        self._count = 0
        self._sequences: list[Sequence] = []
        self._columns: list[list[Any]] = [[] for _ in range(5)]  # the other fields of Rows, changed with `_sequences`
        self._rows: Rows | None = None  # made of them when it is asked for

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def join(self, sequence: Sequence) -> None:
        """Take a sequence whose next token is being sampled: its first, or the next one after a preemption."""
        lane = sequence.lane
        assert lane is not None and sequence.decoding is None and sequence.length == sequence.scheduled + 1
        self._count += 1
        self._stays[lane], self._epochs[lane] = self._count, sequence.epoch
        self.scheduled[lane], self.computed[lane] = sequence.scheduled, sequence.computed
        self.known[lane], self._last[lane] = len(sequence.token_ids), sequence.token_ids[-1]
        self._most[lane], self._least[lane] = sequence.max_length, sequence.min_length
        ends = sequence.stop_token_ids | sequence.guided_ends
        if len(ends) > self._ends.shape[1]:
            more = np.full((len(self._ends), len(ends) - self._ends.shape[1]), NO_TOKEN, dtype=np.int32)
            self._ends = np.concatenate((self._ends, more), axis=1)
        self._ends[lane] = NO_TOKEN
        self._ends[lane, : len(ends)] = tuple(ends)
        sequence.decoding = self
        place = bisect_left(self._sequences, sequence.order, key=_order)
        self._sequences.insert(place, sequence)
        news = (lane, sequence.request_id, sequence.index, sequence.cached_tokens, sequence.token_ids)
        for column, value in zip(self._columns, news, strict=True):
            column.insert(place, value)
        self._rows = None

    def leave(self, sequence: Sequence) -> None:
        """Let a sequence go, with its state as it is now."""
        lane, state = sequence.lane, (sequence.scheduled, sequence.computed, sequence.pending)
        assert lane is not None
        sequence.decoding = None
        sequence.scheduled, sequence.computed, sequence.pending = state
        self._stays[lane] = 0
        place = bisect_left(self._sequences, sequence.order, key=_order)
        for column in (self._sequences, *self._columns):
            del column[place]
        self._rows = None

    def came_back(self, lane: int, token: int) -> None:
        """One sequence got a token."""
        self.known[lane] += 1
        self._last[lane] = token

    def at_block_start(self) -> list[tuple[Sequence, int]]:
        """Those whose next token will be the first of a block, in order, and their lengths with it."""
        sequences, lanes, *_ = self._in_order()
        starts = self.scheduled[lanes]
        (rows,) = np.nonzero((starts % self.block_size == 0) & (starts + 1 < self._most[lanes]))
        return [
            (sequences[row], length) for row, length in zip(rows.tolist(), (starts[rows] + 1).tolist(), strict=True)
        ]

    def advance(self) -> Decodes:
        """Schedule a token for every sequence whose last one is not being sampled already."""
        rows = self._in_order()
        starts = self.scheduled[rows.lanes]
        goes_on = starts + 1 < self._most[rows.lanes]
        if not goes_on.all():
            rows, starts = rows.where(goes_on), starts[goes_on]
        lanes = rows.lanes
        self.scheduled[lanes] = starts + 1
        is_pending = self.known[lanes] <= starts
        tokens = np.where(is_pending, np.int32(0), self._last[lanes])
        masks_stop = starts + 2 < self._least[lanes]
        return Decodes(rows, starts, tokens, is_pending, masks_stop, self._stays[lanes], self._epochs[lanes])

    def take(self, decodes: Decodes, tokens: Int32) -> Bool:
        """Take the tokens that a step sampled, but for those that need a closer look; returns bool [B], what it took.

        Not taken is what belongs to a sequence that has left since, is FAULTY, or may end its sequence. The taken ones
        are still to be appended to `Sequence.token_ids`.
        """
        lanes = decodes.lanes
        known = self.known[lanes] + 1
        taken: Bool = (self._stays[lanes] == decodes.stays) & (tokens != FAULTY) & (known < self._most[lanes])
        taken &= ~(self._ends[lanes] == tokens[:, None]).any(1)
        lanes = lanes[taken]
        self.known[lanes] = known[taken]
        self._last[lanes] = tokens[taken]
        self.computed[lanes] = decodes.starts[taken] + 1
        return taken

    def check(self) -> None:
        """Assert what must hold between any two calls; what breaks it is a bug here."""
        assert self._sequences == sorted(self._sequences, key=_order), "decoding sequences are out of order"
        lanes = [sequence.lane for sequence in self._sequences]
        assert sorted(np.nonzero(self._stays)[0].tolist()) == sorted(lanes), "a stay is nobody's"  # type: ignore[type-var]
        for sequence in self._sequences:
            lane = sequence.lane
            assert sequence.decoding is self and lane is not None
            assert self.known[lane] == len(sequence.token_ids) and self._last[lane] == sequence.token_ids[-1]
            assert sequence.ngrams is None and self._epochs[lane] == sequence.epoch

    def _in_order(self) -> Rows:
        if self._rows is None:
            lanes, *columns = self._columns
            self._rows = Rows(tuple(self._sequences), np.array(lanes, dtype=np.int32), *map(tuple, columns))
        return self._rows
