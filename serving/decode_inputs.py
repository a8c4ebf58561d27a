"""What a decode step begins with, in buffers that keep their place: hidden states, angles, slots, block tables, lanes.

`load` brings a padded batch to the device before what was captured runs; `start` is the first part of what is captured.
On Hopper one kernel does all of it (atom/kernels/begin.py), elsewhere torch does.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from atom.kernels.begin import Begin, refuses_begin
from atom.kernels.begin_config import BLOCKS, LANE, NEWEST, POSITION, RECORD_WORDS, RING, SLOT, SOURCE, TOKEN
from atom.kernels.leading import Leading
from atom.kernels.paged_step import Ints
from atom.kernels.registry import Kernels, Problem, device_arch
from atom.models.model import Model
from atom.models.rope import RopeConfig, Rotation

from .batch import Batch, Int32
from .decoding import Rows
from .kv_pool import DeviceArrays
from .recent import RecentTokens
from .step_inputs import Staging, StepInputs

Rotations = Mapping[RopeConfig, Rotation]


class DecodeInputs(Protocol):
    def load(self, padded: Batch, rings: Ints | None = None) -> Tensor:
        """Fill the buffers, without waiting; returns the lanes that sample, int64 [S].

        rings  PagedKV.rings of the step
        """
        ...

    def arrays(self, size: int) -> DeviceArrays:
        """What attention reads."""
        ...

    def start(self, size: int) -> tuple[Tensor, Rotations]:
        """Hidden states [size, hidden_size] and the angles of every rope."""
        ...


def decode_inputs(
    model: Model, last_tokens: Tensor, most: int, max_blocks: int, block_size: int, depth: int, kernels: Kernels,
    recent: RecentTokens | None = None,
) -> DecodeInputs:  # fmt: skip
    """The inputs of decode steps of at most `most` sequences of max_blocks blocks each, `depth` of them under way.

    recent  the exact tokens, where some are kept
    """
    dtype = str(model.dtype).removeprefix("torch.")
    problem = Problem(device_arch(model.device), K=model.config.hidden_size, dtype=dtype)
    is_dynamic = any(config.kind == "dynamic" for config in model.config.ropes)
    if kernels == "auto" and not is_dynamic and refuses_begin(problem) is None:
        return KernelInputs(model, last_tokens, most, max_blocks, block_size, depth, recent)
    return TorchInputs(model, last_tokens, most, max_blocks, depth, recent)


class TorchInputs:
    """One upload, copies into the buffers; tokens, embedding and angles are captured."""

    def __init__(
        self, model: Model, last_tokens: Tensor, most: int, max_blocks: int, depth: int,
        recent: RecentTokens | None = None,
    ) -> None:  # fmt: skip
        self._recent = recent
        self._rings = torch.zeros(most, dtype=torch.int32, device=model.device)
        self._model, self._last_tokens = model, last_tokens
        self._staging = Staging(model.device, depth)
        # tokens, sources, positions, slots, rows of exact tokens
        self._words = torch.zeros(5, most, dtype=torch.int64, device=model.device)
        self._tables = torch.zeros(most, max_blocks, dtype=torch.int32, device=model.device)

    def load(self, padded: Batch, rings: Ints | None = None) -> Tensor:
        """See DecodeInputs."""
        size, width = padded.block_tables.shape
        words = np.empty((5, size), dtype=np.int64)
        words[0], words[1], words[2], words[3] = padded.token_ids, -1, padded.positions, padded.slots
        words[4] = 0
        starts = np.zeros(0, dtype=np.int32)
        if self._recent is not None and rings is not None:
            words[4], starts = self._recent.exact_slots(rings, padded.positions), rings.astype(np.int32)
        words[1, padded.pending] = padded.pending_lanes
        lanes = padded.sample_lanes.astype(np.int64)
        on_device, table_rows, lane_ids, ring_starts = self._staging.upload([words, padded.block_tables, lanes, starts])
        self._rings[: len(starts)] = ring_starts
        self._words[:, :size] = on_device
        self._tables[:size, :width] = table_rows
        return lane_ids

    def arrays(self, size: int) -> DeviceArrays:
        """See DecodeInputs."""
        exact = (None, None) if self._recent is None else (self._rings[:size], self._words[4, :size])
        return DeviceArrays(self._words[3, :size], self._tables[:size], None, *exact)

    def start(self, size: int) -> tuple[Tensor, Rotations]:
        """See DecodeInputs."""
        token_ids, sources, positions, _, _ = self._words[:, :size]
        empty = token_ids[:0]
        inputs = StepInputs(token_ids, sources, positions, self.arrays(size), empty, empty)
        decoder = self._model.model
        return decoder.embed(inputs.tokens(self._last_tokens)), decoder.rotations(positions)


class KernelInputs:
    """One kernel, which reads the host's memory; nothing is captured.

    Tables of the sequences that the last step had are there already, but for their newest blocks.
    """

    def __init__(
        self, model: Model, last_tokens: Tensor, most: int, max_blocks: int, block_size: int, depth: int,
        recent: RecentTokens | None = None,
    ) -> None:  # fmt: skip
        self._block_size = block_size
        decoder = model.model
        self._ropes = decoder.ropes()
        self._begin = Begin(
            decoder.embed_tokens.weight.detach(),
            1.0 if decoder.embedding_factor is None else decoder.embedding_factor,
            [rope.frequencies for rope in self._ropes.values()],
            [config.attention_factor for config in self._ropes],
            last_tokens,
            most,
            max_blocks,
            depth + 1,
            (0, 0) if recent is None else (recent.tokens, recent.capacity),
        )
        begin = self._begin
        self._exact = None if recent is None else (Leading(begin.rings), Leading(begin.exact_slots))
        self._lanes, self._slots, self._tables, self._lengths = (
            Leading(whole) for whole in (begin.lanes, begin.slots, begin.tables, begin.lengths)
        )
        # the last step's: its records, whose tables are there (see Batch), how many blocks each has
        self._records = np.zeros((most, RECORD_WORDS), dtype=np.int32)
        self._decoding: Rows | None = None
        self._blocks = np.zeros(0, dtype=np.int32)
        self._is_pending = False

    def load(self, padded: Batch, rings: Ints | None = None) -> Tensor:
        """See DecodeInputs."""
        size, sampled = padded.num_seqs, len(padded.sample_lanes)
        records = self._records[:size]
        goes_on = padded.decoding is not None and padded.decoding is self._decoding
        is_pending = len(padded.pending) == sampled  # every token is still being sampled, by the same lanes ever again
        if not (goes_on and is_pending and self._is_pending):
            records[:, TOKEN], records[:, SOURCE] = padded.token_ids, -1
            records[padded.pending, SOURCE] = padded.pending_lanes
        if not goes_on:
            records[:, LANE] = padded.lanes  # those that are sampled from first
            if rings is not None:
                records[:, RING] = rings
        records[:, POSITION], records[:, SLOT] = padded.positions, padded.slots
        records[:, BLOCKS] = blocks = (padded.seqlens_k + (self._block_size - 1)) // self._block_size
        tables: Int32 | None = padded.block_tables
        if goes_on and (blocks - self._blocks).max() <= 1:
            records[:, NEWEST] = padded.slots // self._block_size
            tables = None
        self._decoding = None  # should the launch fail
        room = self._begin.room(size)
        room[...] = records
        self._begin(room, tables)
        self._decoding, self._blocks, self._is_pending = padded.decoding, blocks, is_pending
        return self._lanes(len(padded.sample_lanes))

    def arrays(self, size: int) -> DeviceArrays:
        """See DecodeInputs."""
        exact = (None, None) if self._exact is None else (self._exact[0](size), self._exact[1](size))
        return DeviceArrays(self._slots(size), self._tables(size), self._lengths(size), *exact)

    def start(self, size: int) -> tuple[Tensor, Rotations]:
        """See DecodeInputs."""
        begin = self._begin
        rotations = {
            config: Rotation(begin.turns[0, index, :size], begin.turns[1, index, :size], begin.positions[:size], rope)
            for index, (config, rope) in enumerate(self._ropes.items())
        }
        return begin.hidden[:size], rotations
