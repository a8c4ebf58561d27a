"""A step as the scheduler describes it and a runner executes it.

The runner keeps a little state per lane, 0 ... max_num_seqs - 1: sampling parameters, counts for penalties, and the
token that was sampled last. A sequence has one lane from its admission to its end or preemption. Because a decode's
input may be a token that the step before is still sampling, the batch says where: `token_ids[pending]` are to be taken
from the last tokens of `pending_lanes`, on the device, in the order of the steps.
"""

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .sequence import Sequence

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


class Entry(NamedTuple):  # made for every sequence and step: a named tuple takes a third of a frozen dataclass's time
    """One sequence's part of a step: the tokens at positions start ... end - 1.

    With drafts, start is the sequence's last token, they come after it, and each of these tokens is sampled from.
    """

    sequence: Sequence
    lane: int
    epoch: int  # of the sequence when this was scheduled
    start: int
    end: int
    samples: bool  # its last token's logits give the sequence's next token
    masks_stop: bool  # EOS and stop token ids must not be sampled yet
    drafts: tuple[int, ...] = ()  # guessed tokens; what is sampled from the one before says which of them are right

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Batch:
    """Arrays of a step of T tokens from B sequences, S of which sample; decodes come first.

    token_ids      int32 [T]       0 where pending
    pending        int32 [P]       indices into token_ids whose token is the last one of ...
    pending_lanes  int32 [P]       ... these lanes
    positions      int32 [T]
    slots          int64 [T]       where keys and values go: block * block_size + place within the block
    cu_seqlens_q   int32 [B + 1]   tokens of sequence b are cu_seqlens_q[b] ... cu_seqlens_q[b + 1] - 1
    seqlens_k      int32 [B]       tokens to attend over, this step's included
    block_tables   int32 [B, max blocks]   beyond ceil(seqlens_k / block_size) blocks: any valid ones
    lanes          int32 [B]
    sample_rows    int32 [S]       indices into the T tokens, in the order in which results are handed back: of each
                                   entry that samples its last row, and with d drafts its last d + 1 rows
    sample_lanes   int32 [S]
    masks_stop     bool  [S]       the lane's EOS and stop token ids must not be sampled yet
    num_decodes    leading sequences that have one token each, a sampled one, and no drafts
    """

    token_ids: Int32
    pending: Int32
    pending_lanes: Int32
    positions: Int32
    slots: Int64
    cu_seqlens_q: Int32
    seqlens_k: Int32
    block_tables: Int32
    lanes: Int32
    sample_rows: Int32
    sample_lanes: Int32
    masks_stop: NDArray[np.bool_]
    num_decodes: int

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_seqs(self) -> int:
        return len(self.lanes)

    @property
    def max_seqlen_q(self) -> int:
        return int(np.diff(self.cu_seqlens_q).max())

    @property
    def max_seqlen_k(self) -> int:
        return int(self.seqlens_k.max())


@dataclass(frozen=True)
class Step:
    """What to execute, in the order of `number`, on one stream.

    admitted  sequences that got a lane in this step: their sampling state is to be loaded before it runs, with the
              tokens they have already (more than the prompt after a preemption)
    """

    number: int
    entries: tuple[Entry, ...]
    admitted: tuple[Sequence, ...]
    batch: Batch


class LaneTables:
    """Block tables by lane, kept as one array so that a batch gathers its rows at once."""

    def __init__(self, num_lanes: int, max_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._tables = np.zeros((num_lanes, max_blocks), dtype=np.int32)
        self._lengths = [0] * num_lanes  # blocks written
        self._free = list(reversed(range(num_lanes)))

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
        self._free.append(lane)

    def extend(self, lane: int, table: SequenceOf[int]) -> None:
        """Write those blocks of a sequence's table that are new since the last call."""
        written = self._lengths[lane]
        if written < len(table):
            self._tables[lane, written : len(table)] = table[written:]
            self._lengths[lane] = len(table)

    def _build_decodes(
        self, entries: SequenceOf[Entry], starts: Int32, ends: Int32, lanes: Int32, masks_stop: NDArray[np.bool_]
    ) -> Batch:
        """`build` where every entry is a decode, one token each that is sampled from: what runs most of the time."""
        token_ids, pending = _last_tokens(entries)
        blocks = self._tables[lanes, starts // self.block_size].astype(np.int64)
        rows = np.arange(len(entries) + 1, dtype=np.int32)
        return Batch(
            token_ids=token_ids,
            pending=pending,
            pending_lanes=lanes[pending],
            positions=starts,
            slots=blocks * self.block_size + starts % self.block_size,
            cu_seqlens_q=rows,
            seqlens_k=ends,
            block_tables=self._tables[lanes, : -(-ends.max() // self.block_size)],
            lanes=lanes,
            sample_rows=rows[:-1],
            sample_lanes=lanes,
            masks_stop=masks_stop,
            num_decodes=len(entries),
        )

    def build(self, entries: SequenceOf[Entry], num_decodes: int) -> Batch:
        """The arrays of a step; the tables of its lanes must be up to date."""
        _, all_lanes, _, all_starts, all_ends, all_samples, all_masks, all_drafts = zip(*entries, strict=True)
        starts = np.array(all_starts, dtype=np.int32)
        ends = np.array(all_ends, dtype=np.int32)
        lanes = np.array(all_lanes, dtype=np.int32)
        if num_decodes == len(entries):
            return self._build_decodes(entries, starts, ends, lanes, np.array(all_masks, dtype=np.bool_))
        samples = np.array(all_samples, dtype=np.bool_)
        counts = ends - starts
        cu_seqlens_q = np.zeros(len(entries) + 1, dtype=np.int32)
        np.cumsum(counts, out=cu_seqlens_q[1:])
        owner = np.repeat(np.arange(len(entries)), counts)  # [T]
        positions = np.arange(cu_seqlens_q[-1], dtype=np.int32) + (starts - cu_seqlens_q[:-1])[owner]
        blocks = self._tables[lanes[owner], positions // self.block_size].astype(np.int64)
        block_tables = self._tables[lanes, : -(-ends.max() // self.block_size)]  # a copy: lanes indexed it
        token_ids, pending = _tokens(entries, len(owner))
        rows, masks_stop = cu_seqlens_q[1:][samples] - 1, np.array(all_masks, dtype=np.bool_)[samples]
        sample_lanes = lanes[samples]
        if any(all_drafts):
            counts = np.array([1 + len(drafts) for drafts in all_drafts], dtype=np.int32)[samples]
            last = np.cumsum(counts)
            rows = np.repeat(rows - last + 1, counts) + np.arange(last[-1], dtype=np.int32)
            sample_lanes, masks_stop = np.repeat(sample_lanes, counts), np.repeat(masks_stop, counts)
        return Batch(
            token_ids=token_ids,
            pending=pending,
            pending_lanes=lanes[owner[pending]],
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
        )


def _last_tokens(entries: SequenceOf[Entry]) -> tuple[Int32, Int32]:
    """`_tokens` of entries that are all decodes."""
    known = [entry[0].token_ids for entry in entries]
    pending = [row for row, entry in enumerate(entries) if entry[4] > len(known[row])]
    tokens = np.array([token_ids[-1] for token_ids in known], dtype=np.int32)
    tokens[pending] = 0
    return tokens, np.array(pending, dtype=np.int32)


def _tokens(entries: Iterable[Entry], total: int) -> tuple[Int32, Int32]:
    """Token ids [total], 0 where not known yet, and the indices of those."""
    tokens: list[int] = []
    pending: list[int] = []
    for sequence, _, _, start, end, _, _, drafts in entries:
        known = sequence.token_ids
        if drafts:
            tokens.append(known[start])
            tokens += drafts
        elif end > len(known):  # a decode whose input is being sampled
            assert end - start == 1
            pending.append(len(tokens))
            tokens.append(0)
        elif end - start == 1:
            tokens.append(known[start])
        else:
            tokens += known[start:end]
    assert len(tokens) == total
    return np.array(tokens, dtype=np.int32), np.array(pending, dtype=np.int32)
