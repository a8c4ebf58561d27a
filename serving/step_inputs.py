"""A step's arrays on the device: one packed upload, and the padding of a decode step to a bucket.

Everything here is asynchronous: the host writes page-locked memory that no copy under way still reads, and goes on.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atom.kernels.host_memory import bring

from .batch import Batch
from .kv_pool import DeviceArrays

_ALIGN = 16  # bytes; every dtype may begin there


@dataclass(frozen=True)
class StepInputs:
    """What the model reads of a batch, on the device.

    token_ids     int64 [T]
    sources       int64 [T]       the lane whose last token is the input, -1 where token_ids has it
    positions     int64 [T]
    attention     what attention reads
    sample_rows   int64 [S]
    sample_lanes  int64 [S]
    """

    token_ids: Tensor
    sources: Tensor
    positions: Tensor
    attention: DeviceArrays
    sample_rows: Tensor
    sample_lanes: Tensor

    def tokens(self, last_tokens: Tensor) -> Tensor:
        """The input tokens [T], those that were sampled last taken from last_tokens [lanes]."""
        return torch.where(self.sources < 0, self.token_ids, last_tokens[self.sources.clamp(min=0)])


def host_arrays(batch: Batch) -> list[NDArray[Any]]:
    """The fields of StepInputs, in order, as numpy arrays."""
    sources = np.full(batch.num_tokens, -1, dtype=np.int64)
    sources[batch.pending] = batch.pending_lanes
    wide = (batch.token_ids.astype(np.int64), sources, batch.positions.astype(np.int64))
    rows = (batch.sample_rows.astype(np.int64), batch.sample_lanes.astype(np.int64))
    return [*wide, batch.slots, batch.block_tables, *rows]


def step_inputs(batch: Batch, staging: "Staging") -> StepInputs:
    """The batch on the device."""
    token_ids, sources, positions, slots, tables, rows, lanes = staging.upload(host_arrays(batch))
    return StepInputs(token_ids, sources, positions, DeviceArrays(slots, tables), rows, lanes)


class Staging:
    """Host arrays to the device in one copy. It must live until its last copy has ended.

    depth  uploads whose copies may still be under way when the next one is written
    """

    def __init__(self, device: torch.device, depth: int) -> None:
        self.device = device
        self._buffers: list[Tensor | None] = [None] * (depth + 1)
        self._turn = 0

    def upload(self, arrays: SequenceOf[NDArray[Any]]) -> list[Tensor]:
        """Each array as a tensor of its shape and dtype. On a CPU they share the arrays' memory."""
        if self.device.type == "cpu":
            return [torch.from_numpy(array) for array in arrays]
        packed, starts = pack(arrays, self._room)
        on_device = torch.empty(len(packed), dtype=torch.uint8, device=self.device)
        bring(packed.view(torch.int32), on_device.view(torch.int32))
        return [unpack_one(on_device, start, array) for start, array in zip(starts, arrays, strict=True)]

    def _room(self, size: int) -> Tensor:
        """Page-locked memory of `size` bytes whose last copy has ended."""
        self._turn = (self._turn + 1) % len(self._buffers)
        buffer = self._buffers[self._turn]
        if buffer is None or buffer.numel() < size:
            pinned = self.device.type == "cuda"
            buffer = torch.empty(1 << (size - 1).bit_length(), dtype=torch.uint8, pin_memory=pinned)
            self._buffers[self._turn] = buffer
        return buffer[:size]


def pack(arrays: SequenceOf[NDArray[Any]], room: Any) -> tuple[Tensor, list[int]]:
    """Write arrays one after another into room(bytes), uint8; returns it and where each begins."""
    starts, size = [], 0
    for array in arrays:
        starts.append(size)
        size += -(-array.nbytes // _ALIGN) * _ALIGN
    packed: Tensor = room(max(size, _ALIGN))
    host = packed.numpy()
    for start, array in zip(starts, arrays, strict=True):
        host[start : start + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
    return packed, starts


def unpack_one(packed: Tensor, start: int, like: NDArray[Any]) -> Tensor:
    """The array of the dtype and shape of `like` that begins at byte `start`; a view."""
    dtype = torch.from_numpy(like[:0]).dtype
    return packed[start : start + like.nbytes].view(dtype).view(like.shape)


def is_decode(batch: Batch) -> bool:
    """Every sequence has one token, and its successor is sampled."""
    return batch.num_decodes == batch.num_seqs == len(batch.sample_rows)


def pad_decodes(batch: Batch, size: int, scratch_block: int, block_size: int, spare_lane: int = 0) -> Batch:
    """A decode batch with rows added up to `size`, each a sequence of one token that lies in the scratch block.

    They need distinct slots only where a kernel minds; all write the scratch block's first slot, and nobody reads it.
    What is kept by lane is that of `spare_lane`.
    `sample_rows` and `sample_lanes` stay those of the real rows.
    """
    missing = size - batch.num_seqs
    if not missing:
        return batch
    tables = np.full((missing, batch.block_tables.shape[1]), scratch_block, dtype=np.int32)
    return replace(
        batch,
        token_ids=_padded(batch.token_ids, missing, 0),
        positions=_padded(batch.positions, missing, 0),
        slots=_padded(batch.slots, missing, scratch_block * block_size),
        cu_seqlens_q=np.arange(size + 1, dtype=np.int32),
        seqlens_k=_padded(batch.seqlens_k, missing, 1),
        block_tables=np.concatenate((batch.block_tables, tables)),
        lanes=_padded(batch.lanes, missing, spare_lane),
        num_decodes=size,
        ahead=None if batch.ahead is None else _padded(batch.ahead, missing, 0),
    )


def _padded(array: NDArray[Any], missing: int, value: int) -> NDArray[Any]:
    return np.concatenate((array, np.full(missing, value, dtype=array.dtype)))
