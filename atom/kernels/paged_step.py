"""What attention must know of a step: whose queries stand where, how long the sequences are, in which blocks they lie.

A step is the same for all layers, so whatever follows from it (groups of like length for the torch reference, the plan
of the split work for a kernel) is computed once, on first use, for each sliding window that the model has.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.integer[Any]]
Derived = TypeVar("Derived")
Share = Literal["auto", "always", "never"]  # when decodes read the blocks that they begin with together: where it pays


@dataclass(frozen=True)
class RecentStep:
    """Where a step's exact keys and values lie: of the newest tokens, which a query reads as they were before rounding.

    A query at position p reads p - tokens + 1 ... p exactly, all before them from the blocks. Exact keys and values of
    the token at position p of sequence b lie in row rings[b] + p % capacity of the layer's ring store, in the dtype of
    the model, behind all transforms that keys get before they are rounded.

    tokens     of the window, the query's own among them
    capacity   rows of one ring; at least `tokens`
    rings      int32 [B], on the device: the first row of each sequence's ring. Negative: what its one query reads
               exactly lies in rows one behind the other, from ~rings[b] on, and not in a ring
    rings_host int64 [B], the same on the host
    slots      int64 [T], on the device: the rows to which this step's tokens go, of the ring store or of the scratch
    is_direct  they go to the ring store: every sequence has one query, and no ring loses what another query reads.
               Else they go to the scratch, whose row t is the step's token t. Before attention runs, those of sequences
               with one query and of texts that begin are copied to their rings; those of other chunks after it, so that
               a chunk's queries find the tokens before it in the ring and its own in the scratch.
    """

    tokens: int
    capacity: int
    rings: Tensor
    rings_host: Ints
    slots: Tensor
    is_direct: bool


@dataclass(frozen=True)
class RecentLayer:
    """The exact keys and values that attention of one layer reads; see RecentStep.

    ring     dtype of the model, [rows, 2, num_kv_heads, head_dim]: keys (0) and values (1)
    scratch  the same for this step's tokens, [at least T, 2, num_kv_heads, head_dim]; unused where is_direct
    """

    ring: Tensor
    scratch: Tensor


@dataclass(frozen=True)
class PagedStep:
    """A ragged batch of T query tokens from B sequences.

    cu_seqlens_q   int [B + 1], on the host: tokens of sequence b are cu_seqlens_q[b] ... cu_seqlens_q[b + 1] - 1,
                   the last ones of the sequence; there may be none
    seqlens_k      int [B], on the host: tokens to attend over, this step's included
    tables         int [B, max blocks], on the host
    slots          int64 [T], on the device
    block_tables   int32 or int64 [B, max blocks], on the device
    ahead          int [B], on the host: of the tokens before a sequence's first query, how many are stored in this very
                   step, as other sequences' queries; None: none
    lengths        int32 [B], seqlens_k on the device, where every sequence has one query; None: attention brings them
    recent         where the newest tokens' exact keys and values lie; None: queries read nothing but the blocks
    """

    cu_seqlens_q: Ints
    seqlens_k: Ints
    tables: Ints
    slots: Tensor
    block_tables: Tensor
    ahead: Ints | None = None
    lengths: Tensor | None = None
    recent: RecentStep | None = None
    _derived: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_tokens(self) -> int:
        return int(self.cu_seqlens_q[-1])

    @cached_property
    def counts(self) -> Ints:
        """Query tokens of each sequence."""
        return np.diff(self.cu_seqlens_q)

    def derive(self, key: Any, make: Callable[[], Derived]) -> Derived:
        """What `make` returned when `key` was first asked for in this step."""
        if key not in self._derived:
            self._derived[key] = make()
        found: Derived = self._derived[key]
        return found


def runs(firsts: Ints, counts: Ints) -> NDArray[np.int64]:
    """firsts[i] ... firsts[i] + counts[i] - 1, one run behind the other."""
    before = np.cumsum(counts) - counts
    found: NDArray[np.int64] = np.arange(int(counts.sum())) + np.repeat(firsts - before, counts)
    return found
