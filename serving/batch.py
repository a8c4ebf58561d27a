"""A step as the scheduler describes it and a runner executes it.

The runner keeps a little state per lane, 0 ... max_num_seqs - 1: sampling parameters, counts for penalties, and the
token that was sampled last. A sequence has one lane from its admission to its end or preemption. Because a decode's
input may be a token that the step before is still sampling, the batch says where: `token_ids[pending]` are to be taken
from the last tokens of `pending_lanes`, on the device, in the order of the steps.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .decoding import Decodes, Rows
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
class Inherited:
    """Sequences that begin behind blocks which others computed: their lanes, where they begin, their block tables."""

    lanes: Int32
    starts: Int32
    block_tables: Int32


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
    ahead          int32 [B]       tokens of this step that stand before a sequence's own, in sequences of their own
                                   (rows.py); None: there are none
    decoding       the sequences, if all of them do nothing but decode: where a later step has the same object, they
                   are the same, in the same order, and their tables have only grown; None: who knows
    inherited      those that begin in this step, and not with their first token; None: there are none
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
    ahead: Int32 | None = None
    decoding: Rows | None = None
    inherited: Inherited | None = None

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


def unsampled(
    token_ids: Int32,
    positions: Int32,
    slots: Int64,
    cu_seqlens_q: Int32,
    seqlens_k: Int32,
    block_tables: Int32,
    lanes: Int32,
    num_decodes: int = 0,
) -> Batch:
    """A batch that stores and attends, and from which nothing is sampled; all its tokens are known."""
    none = np.zeros(0, dtype=np.int32)
    return Batch(
        token_ids=token_ids,
        pending=none,
        pending_lanes=none,
        positions=positions,
        slots=slots,
        cu_seqlens_q=cu_seqlens_q,
        seqlens_k=seqlens_k,
        block_tables=block_tables,
        lanes=lanes,
        sample_rows=none,
        sample_lanes=none,
        masks_stop=none.astype(np.bool_),
        num_decodes=num_decodes,
    )


@dataclass(frozen=True)
class Step:
    """What to execute, in the order of `number`, on one stream.

    decodes   sequences that do nothing but decode
    rest      what follows them in the batch
    admitted  sequences that got a lane in this step: their sampling state is to be loaded before it runs, with the
              tokens they have already (more than the prompt after a preemption)
    """

    number: int
    decodes: Decodes
    rest: tuple[Entry, ...]
    admitted: tuple[Sequence, ...]
    batch: Batch

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """All of it, one by one."""
        d = self.decodes
        columns = (d.lanes.tolist(), d.epochs.tolist(), d.starts.tolist(), d.masks_stop.tolist())
        decodes = (
            Entry(sequence, lane, epoch, start, start + 1, True, masks_stop)
            for sequence, lane, epoch, start, masks_stop in zip(d.rows.sequences, *columns, strict=True)
        )
        return (*decodes, *self.rest)
