"""What the first kernel of a decode step does (atom/kernels/begin_sm90.py), in numpy, on a CPU's buffers."""

import ctypes
from typing import Any

import numpy as np
import torch

from atom.kernels.begin_config import BLOCKS, LANE, POSITION, RECORD_WORDS, SLOT, SOURCE, TOKEN


class BeginModel:
    """Called with the kernel's arguments."""

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
        tables: Any,
    ) -> None:
        count = len(hidden)
        for row, record in enumerate(words(at, (count, RECORD_WORDS))):
            blocks, position = int(record[BLOCKS]), int(record[POSITION])
            tables[row, :blocks] = torch.from_numpy(words(tables_at, (count, width))[row, :blocks].copy())
            token = int(record[TOKEN]) if record[SOURCE] < 0 else int(last[record[SOURCE]])
            hidden[row] = embedding[token] * scale
            angles = position * frequencies
            turns[0, :, row], turns[1, :, row] = angles.cos() * factors[:, None], angles.sin() * factors[:, None]
            ids[:, row] = torch.tensor([position, int(record[SLOT]), int(record[LANE])])


def words(address: int, shape: tuple[int, int]) -> np.ndarray:
    """int32 words of the host's memory."""
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_int32)), shape)
