"""What the first kernel of a decode step does (atom/kernels/begin_sm90.py), in numpy, on a CPU's buffers."""

import ctypes
from typing import Any

import numpy as np
import torch

from atom.kernels.begin_config import BLOCKS, LANE, NEWEST, POSITION, RECORD_WORDS, RING, SLOT, SOURCE, TOKEN


class BeginModel:
    """Called with the kernel's arguments. It counts the steps that came without tables."""

    def __init__(self) -> None:
        self.without = 0

    def __call__(
        self,
        at: int,
        tables_at: int,
        width: int,
        last: Any,
        embedding: Any,
        scale: float,
        frequencies: Any,
        factors: Any,
        hidden: Any,
        turns: Any,
        ids: Any,
        lengths: Any,
        tables: Any,
        rings: Any,
        recent: int,
        capacity: int,
    ) -> None:
        count = len(hidden)
        self.without += not width
        for row, record in enumerate(words(at, (count, RECORD_WORDS))):
            blocks, position = int(record[BLOCKS]), int(record[POSITION])
            if width:
                tables[row, :blocks] = torch.from_numpy(words(tables_at, (count, width))[row, :blocks].copy())
            else:
                tables[row, blocks - 1] = int(record[NEWEST])
            token = int(record[TOKEN]) if record[SOURCE] < 0 else int(last[record[SOURCE]])
            hidden[row] = embedding[token] * scale
            angles = position * frequencies
            turns[0, :, row], turns[1, :, row] = angles.cos() * factors[:, None], angles.sin() * factors[:, None]
            ids[:3, row] = torch.tensor([position, int(record[SLOT]), int(record[LANE])])
            if recent:
                rings[row] = ring = int(record[RING])
                ids[3, row] = ring + position % capacity if ring >= 0 else ~ring + min(position, recent - 1)
            lengths[row] = position + 1


def words(address: int, shape: tuple[int, int]) -> np.ndarray:
    """int32 words of the host's memory."""
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_int32)), shape)
