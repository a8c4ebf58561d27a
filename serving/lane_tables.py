"""A step's arrays, made of its decoding sequences, its other entries, and the block tables of their lanes."""

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import numpy as np

from .batch import Batch, Entry, Inherited, Int32
from .decoding import Decodes, Rows

SPARE = 16  # blocks by which tables may grow before they are gathered again


class LaneTables:
    """Block tables by lane, kept as one array so that a batch gathers its rows at once.

    Steps of the same decoding sequences share one array of their tables, which only grow.
    """

    def __init__(self, num_lanes: int, max_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._tables = np.zeros((num_lanes, max_blocks), dtype=np.int32)
        self._lengths = [0] * num_lanes  # blocks written
        self._free = list(reversed(range(num_lanes)))
        self._rows: Rows | None = None  # the last step's, if nothing else was in it,
        self._gathered = self._tables[:0]  # their tables, where each begins,
        self._firsts = np.zeros(0, dtype=np.intp)
        self._places = np.full(num_lanes, -1, dtype=np.int32)  # and where each lane's is, -1: nowhere

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A free lane, its table empty."""
        lane = self._free.pop()
        self._tables[lane] = 0
        self._lengths[lane] = 0
        return lane

    def give_back(self, lane: int) -> None:
        assert lane not in self._free, f"lane {lane} is free already"
        self._places[lane] = -1
        self._free.append(lane)

    def extend(self, lane: int, table: SequenceOf[int]) -> None:
        """Write those blocks of a sequence's table that are new since the last call."""
        written, length = self._lengths[lane], len(table)
        self._lengths[lane] = length
        place = self._places[lane]
        if place >= 0 and length > self._gathered.shape[1]:
            self._rows = None
            place = -1
        if written + 1 == length:  # as a rule, and in a fifth of the time
            self._tables[lane, written] = block = table[written]
            if place >= 0:
                self._gathered[place, written] = block
        elif written < length:
            self._tables[lane, written:length] = table[written:]
            if place >= 0:
                self._gathered[place, written:length] = table[written:]

    def build(self, decodes: Decodes, rest: SequenceOf[Entry], num_decodes: int, num_new: int = 0) -> Batch:
        """The arrays of a step; the tables of its lanes must be up to date.

        num_decodes  of the leading sequences, some of the rest included, see Batch
        num_new      of the last sequences, which begin in this step
        """
        if not rest:
            return self._build_decodes(decodes)
        _, own_lanes, _, own_starts, own_ends, own_samples, own_masks, own_drafts = zip(*rest, strict=True)
        count = len(decodes)
        starts = _joined(decodes.starts, own_starts)
        ends = _joined(decodes.starts + 1, own_ends)
        lanes = _joined(decodes.lanes, own_lanes)
        samples = np.concatenate((np.ones(count, dtype=np.bool_), np.array(own_samples, dtype=np.bool_)))
        counts = ends - starts
        cu_seqlens_q = np.zeros(len(starts) + 1, dtype=np.int32)
        np.cumsum(counts, out=cu_seqlens_q[1:])
        owner = np.repeat(np.arange(len(starts)), counts)  # [T]
        positions = np.arange(cu_seqlens_q[-1], dtype=np.int32) + (starts - cu_seqlens_q[:-1])[owner]
        blocks = self._tables[lanes[owner], positions // self.block_size].astype(np.int64)
        block_tables = self._tables[lanes, : -(-ends.max() // self.block_size)]  # a copy: lanes indexed it
        token_ids = np.concatenate((decodes.tokens, np.array(_tokens(rest), dtype=np.int32)))
        pending = decodes.is_pending.nonzero()[0].astype(np.int32)
        rows = cu_seqlens_q[1:][samples] - 1
        masks_stop = np.concatenate((decodes.masks_stop, np.array(own_masks, dtype=np.bool_)))[samples]
        sample_lanes = lanes[samples]
        if any(own_drafts):
            widths = np.array([1] * count + [1 + len(drafts) for drafts in own_drafts], dtype=np.int32)[samples]
            last = np.cumsum(widths)
            rows = np.repeat(rows - last + 1, widths) + np.arange(last[-1], dtype=np.int32)
            sample_lanes, masks_stop = np.repeat(sample_lanes, widths), np.repeat(masks_stop, widths)
        assert len(token_ids) == cu_seqlens_q[-1]
        return Batch(
            token_ids=token_ids,
            pending=pending,
            pending_lanes=lanes[pending],
            positions=positions,
            slots=blocks * self.block_size + positions % self.block_size,
            cu_seqlens_q=cu_seqlens_q,
            seqlens_k=ends,
            block_tables=block_tables,
            lanes=lanes,
            sample_rows=rows.astype(np.int32, copy=False),
            sample_lanes=sample_lanes,
            masks_stop=masks_stop,
            num_decodes=num_decodes,
            inherited=_inherited(lanes, starts, block_tables, num_new),
        )

    def _build_decodes(self, decodes: Decodes) -> Batch:
        """`build` of nothing else: what runs most of the time."""
        lanes, starts = decodes.lanes, decodes.starts
        rows = np.arange(len(decodes) + 1, dtype=np.int32)
        each, ends = rows[:-1], starts + 1
        width = -(-int(ends.max()) // self.block_size)
        if decodes.rows is not self._rows:
            index = decodes.rows.lane_index
            self._rows, self._gathered = decodes.rows, self._tables[index, : width + SPARE]  # a copy
            self._firsts = np.arange(0, self._gathered.size, self._gathered.shape[1])
            self._places.fill(-1)
            self._places[index] = each
        blocks = self._gathered.reshape(-1)[self._firsts + starts // self.block_size].astype(np.int64)
        pending, pending_lanes = each, lanes
        if not decodes.is_pending.all():
            pending = each[decodes.is_pending]
            pending_lanes = lanes[pending]
        return Batch(
            token_ids=decodes.tokens,
            pending=pending,
            pending_lanes=pending_lanes,
            positions=starts,
            slots=blocks * self.block_size + starts % self.block_size,
            cu_seqlens_q=rows,
            seqlens_k=ends,
            block_tables=self._gathered[:, :width],
            lanes=lanes,
            sample_rows=each,
            sample_lanes=lanes,
            masks_stop=decodes.masks_stop,
            num_decodes=len(decodes),
            decoding=decodes.rows,
        )


def _inherited(lanes: Int32, starts: Int32, block_tables: Int32, num_new: int) -> Inherited | None:
    """Those of the last `num_new` sequences that do not begin with their first token."""
    first = len(lanes) - num_new
    chosen = first + starts[first:].nonzero()[0]
    return Inherited(lanes[chosen], starts[chosen], block_tables[chosen]) if len(chosen) else None


def _joined(decodes: Int32, rest: tuple[int, ...]) -> Int32:
    return np.concatenate((decodes, np.array(rest, dtype=np.int32)))


def _tokens(entries: Iterable[Entry]) -> list[int]:
    """The input tokens of entries, drafts included."""
    tokens: list[int] = []
    for sequence, _, _, start, end, _, _, drafts in entries:
        tokens += (sequence.token_ids[start], *drafts) if drafts else sequence.token_ids[start:end]
    return tokens
