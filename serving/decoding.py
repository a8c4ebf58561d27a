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
_all = np.logical_and.reduce  # what `all` calls, in half the time


class Rows(NamedTuple):
    """Sequences, and what every step asks of them and none changes, side by side.

    lane_index   intp [B]      the lanes, of the type that numpy indexes with: with int32 it takes ten times as long
    stays        int64 [B]     which stay among the decoding ones this is: tells a sequence from itself before a
                               preemption
    most, least  int32 [B]     Sequence.max_length and min_length
    ends         int32 [E, B]  what is no token to go on with: FAULTY, and those that may end the sequence
    """

    sequences: tuple[Sequence, ...]
    request_ids: tuple[str, ...]
    indices: tuple[int, ...]
    cached_tokens: tuple[int, ...]
    token_ids: tuple[list[int], ...]
    lanes: Int32
    lane_index: NDArray[np.intp]
    stays: NDArray[np.int64]
    epochs: Int32
    most: Int32
    least: Int32
    ends: Int32

    def where(self, chosen: Bool) -> "Rows":
        """Some of them."""
        marks = chosen.tolist()
        columns: list[Any] = [tuple(compress(column, marks)) for column in self[:5]]
        arrays: list[Any] = [array[..., chosen] for array in self[5:]]
        return Rows(*columns, *arrays)


@dataclass(frozen=True, slots=True)
class Decodes:
    """Sequences of a step that have one token each, from whose logits the next one is sampled.

    rows        the sequences; the same object as long as nobody joins, leaves, or is at its end
    starts      int32 [B]   positions of their tokens
    tokens      int32 [B]   0 where ...
    is_pending  bool  [B]   ... the token is still being sampled
    masks_stop  bool  [B]   EOS and stop token ids must not be sampled yet
    """

    rows: Rows
    starts: Int32
    tokens: Int32
    is_pending: Bool
    masks_stop: Bool

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lanes(self) -> Int32:
        return self.rows.lanes

    @property
    def epochs(self) -> Int32:
        return self.rows.epochs


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
        self._ends = np.full((2, num_lanes), NO_TOKEN, dtype=np.int32)  # see Rows.ends
        self._ends[0] = FAULTY
        self._count = 0
        self._sequences: list[Sequence] = []
        self._lanes: list[int] = []  # theirs
        self._columns: list[list[Any]] = [[] for _ in range(4)]  # further fields of Rows, changed with `_sequences`
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
        if len(ends) >= len(self._ends):
            more = np.full((len(ends) + 1 - len(self._ends), self._ends.shape[1]), NO_TOKEN, dtype=np.int32)
            self._ends = np.concatenate((self._ends, more))
        self._ends[1:, lane] = NO_TOKEN
        self._ends[1 : len(ends) + 1, lane] = tuple(ends)
        sequence.decoding = self
        place = bisect_left(self._sequences, sequence.order, key=_order)
        self._sequences.insert(place, sequence)
        self._lanes.insert(place, lane)
        news = (sequence.request_id, sequence.index, sequence.cached_tokens, sequence.token_ids)
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
        columns: list[list[Any]] = [self._sequences, self._lanes, *self._columns]
        for column in columns:
            del column[place]
        self._rows = None

    def came_back(self, lane: int, token: int) -> None:
        """One sequence got a token."""
        self.known[lane] += 1
        self._last[lane] = token

    def at_block_start(self) -> list[tuple[Sequence, int]]:
        """Those whose next token will be the first of a block, in order, and their lengths with it."""
        rows = self._in_order()
        starts = self.scheduled[rows.lane_index]
        found = ((starts % self.block_size == 0) & (starts + 1 < rows.most)).nonzero()[0]
        return [
            (rows.sequences[row], length)
            for row, length in zip(found.tolist(), (starts[found] + 1).tolist(), strict=True)
        ]

    def advance(self) -> Decodes:
        """Schedule a token for every sequence whose last one is not being sampled already."""
        rows = self._in_order()
        starts = self.scheduled[rows.lane_index]
        nexts = starts + 1
        goes_on = nexts < rows.most
        if not _all(goes_on):
            rows, starts, nexts = rows.where(goes_on), starts[goes_on], nexts[goes_on]
        self.scheduled[rows.lane_index] = nexts
        is_pending = self.known[rows.lane_index] < nexts
        tokens = (
            np.zeros(len(starts), dtype=np.int32)
            if _all(is_pending)
            else np.where(is_pending, np.int32(0), self._last[rows.lane_index])
        )
        return Decodes(rows, starts, tokens, is_pending, nexts + 1 < rows.least)

    def take(self, decodes: Decodes, tokens: Int32) -> Bool:
        """Take the tokens that a step sampled, but for those that need a closer look; returns bool [B], what it took.

        Not taken is what belongs to a sequence that has left since, is FAULTY, or may end its sequence. The taken ones
        are still to be appended to `Sequence.token_ids`.
        """
        rows, computed = decodes.rows, decodes.starts + 1
        lanes, known = rows.lane_index, computed + 1
        taken: Bool = known < rows.most
        for ends in rows.ends:
            taken &= ends != tokens
        if rows is not self._rows:
            taken &= self._stays[lanes] == rows.stays
        if not _all(taken):
            lanes, known, tokens, computed = lanes[taken], known[taken], tokens[taken], computed[taken]
        self.known[lanes] = known
        self._last[lanes] = tokens
        self.computed[lanes] = computed
        return taken

    def check(self) -> None:
        """Assert what must hold between any two calls; what breaks it is a bug here."""
        assert self._sequences == sorted(self._sequences, key=_order), "decoding sequences are out of order"
        lanes = [sequence.lane for sequence in self._sequences]
        assert lanes == self._lanes
        assert sorted(np.nonzero(self._stays)[0].tolist()) == sorted(lanes), "a stay is nobody's"  # type: ignore[type-var]
        for sequence in self._sequences:
            lane = sequence.lane
            assert sequence.decoding is self and lane is not None
            assert self.known[lane] == len(sequence.token_ids) and self._last[lane] == sequence.token_ids[-1]
            assert sequence.ngrams is None and self._epochs[lane] == sequence.epoch

    def _in_order(self) -> Rows:
        if self._rows is None:
            index = np.array(self._lanes, dtype=np.intp)
            columns: list[Any] = [tuple(column) for column in (self._sequences, *self._columns)]
            arrays: list[Any] = [each[index] for each in (self._stays, self._epochs, self._most, self._least)]
            self._rows = Rows(*columns, *(index.astype(np.int32), index, *arrays, self._ends[:, index]))
        return self._rows
