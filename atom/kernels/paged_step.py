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
    """

    cu_seqlens_q: Ints
    seqlens_k: Ints
    tables: Ints
    slots: Tensor
    block_tables: Tensor
    ahead: Ints | None = None
    lengths: Tensor | None = None
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
