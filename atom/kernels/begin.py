"""The start of a decode step on Hopper: from records on the host to hidden states, angles, slots and block tables.

Without this kernel the same is two copies and eleven small kernels of torch (serving/decode_inputs.py), and the GPU
stands still while its copy engine and its multiprocessors wait for each other.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .begin_config import RECORD_WORDS
from .cache import kept_argument, load_kernel
from .leading import Leading
from .refusals_sm90 import refuses_rows
from .registry import Problem

ARCH = "sm_90a"

Int32 = NDArray[np.int32]


class Begin:
    """Buffers of a decode step that keep their place, and the kernel that fills them.

    embedding    [V, hidden] bfloat16, and its scale
    frequencies  of each rope, radians per position float32 [head_dim / 2], and the factors of cosines and sines
    last_tokens  int64 [num_lanes]: the token that each lane sampled last
    most         tokens of a step, and max_blocks of a sequence
    steps        that may be under way, and one: the next is written meanwhile
    window       tokens of a recent window, and rows of a ring (paged_step.RecentStep); (0, 0): there is none

    hidden       [most, hidden] bfloat16
    turns        float32 [2, ropes, most, head_dim / 2]: cosines, sines
    positions, slots, lanes  int64 [most]
    exact_slots  int64 [most], RecentStep.slots, and rings int32 [most], RecentStep.rings, with a recent window
    lengths      int32 [most]: positions + 1
    tables       int32 [most, max_blocks]
    """

    def __init__(
        self,
        embedding: Tensor,
        scale: float,
        frequencies: Sequence[Tensor],
        factors: Sequence[float],
        last_tokens: Tensor,
        most: int,
        max_blocks: int,
        steps: int,
        window: tuple[int, int] = (0, 0),
    ) -> None:
        device = embedding.device
        self.embedding, self.scale, self.last_tokens = embedding, scale, last_tokens
        self.frequencies = torch.stack([x.to(device) for x in frequencies])
        self.factors = torch.tensor(factors, dtype=torch.float32, device=device)
        self.hidden = torch.zeros(most, embedding.shape[1], dtype=embedding.dtype, device=device)
        shape = (2, *self.frequencies.shape[:1], most, self.frequencies.shape[1])
        self.turns = torch.zeros(shape, dtype=torch.float32, device=device)
        self.ids = torch.zeros(4, most, dtype=torch.int64, device=device)
        self.positions, self.slots, self.lanes, self.exact_slots = self.ids
        self.rings = torch.zeros(most, dtype=torch.int32, device=device)
        self.window = window
        self.lengths = torch.zeros(most, dtype=torch.int32, device=device)
        self.tables = torch.zeros(most, max_blocks, dtype=torch.int32, device=device)
        size = most * (RECORD_WORDS + max_blocks)
        pinned = device.type == "cuda"
        self.host = [torch.zeros(size, dtype=torch.int32, pin_memory=pinned) for _ in range(steps)]
        self.words = [(copy.numpy(), copy.data_ptr()) for copy in self.host]
        self.turn = 0
        self.first_hidden = Leading(self.hidden)
        self._before = [kept_argument(x) for x in (last_tokens, embedding)]  # its arguments, in their order
        self._between = [kept_argument(x) for x in (self.frequencies, self.factors)]
        self._after = [kept_argument(x) for x in (self.turns, self.ids, self.lengths, self.tables, self.rings)]

    def room(self, size: int) -> Int32:
        """Where the next step's records are to be written before it is called, int32 [size, RECORD_WORDS]."""
        self.turn = (self.turn + 1) % len(self.host)
        return self.words[self.turn][0][: size * RECORD_WORDS].reshape(size, RECORD_WORDS)

    def place(self, records: Int32, tables: Int32 | None) -> tuple[int, int]:
        """Put the tables of records that lie in their room where the kernel reads them; returns both addresses."""
        words, address = self.words[self.turn]
        if tables is not None:
            words[records.size : records.size + tables.size].reshape(tables.shape)[...] = tables
        return address, address + records.nbytes

    def __call__(self, records: Int32, tables: Int32 | None) -> None:
        """Fill the first rows of the buffers, on the current stream; does not wait.

        records  as `room` returned them, written
        tables   [B, width]; None: those of the step before, with what is new in the records
        """
        at, tables_at = self.place(records, tables)
        width = 0 if tables is None else tables.shape[1]
        hidden = self.first_hidden(len(records))
        begin_kernel()(
            at, tables_at, width, *self._before, self.scale, *self._between, hidden, *self._after, *self.window
        )


@lru_cache
def begin_kernel() -> Any:
    """The compiled kernel, from memory, disk or compiled now."""

    def compile() -> Any:
        from .begin_sm90 import compile_begin

        return compile_begin()

    return load_kernel("begin_sm90", "begin", compile, ARCH)


@lru_cache
def bring_kernel() -> Any:
    """The compiled kernel, from memory, disk or compiled now."""

    def compile() -> Any:
        from .begin_sm90 import compile_bring

        return compile_bring()

    return load_kernel("begin_sm90", "bring", compile, ARCH)


def refuses_begin(problem: Problem) -> str | None:
    """Why the sm_90a kernel cannot begin the steps of a model with K hidden channels, or None."""
    return refuses_rows(problem, "hidden states", "bfloat16")
