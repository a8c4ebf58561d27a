"""Blackwell's warp-level product of E2M1 codes under block scales, in the PTX emulator."""

from typing import Any

import numpy as np
import torch

from .ptx_memory import LANES
from .ptx_numbers import F32, U32
from .ptx_warp import Warp

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def codes(words: np.ndarray) -> np.ndarray:
    """The eight E2M1 numbers of each word, float64 [..., 8]."""
    return E2M1[(words[..., None] >> (4 * np.arange(8, dtype=U32))) & U32(15)]


def scale_values(words: np.ndarray, count: int, kind: str) -> np.ndarray:
    """The `count` scales in the low bytes of each word, float64 [..., count]."""
    found = ((words[..., None] >> (8 * np.arange(count, dtype=U32))) & U32(255)).astype(np.uint8)
    if kind == "ue4m3":
        return torch.from_numpy(found).view(torch.float8_e4m3fn).double().numpy()
    return np.exp2(found.astype(np.float64) - 127)


def mma_block_scaled(warp: Warp, op: str, args: list[Any]) -> None:
    """m16n8k64: fragments and the lanes whose scales count (selectors 0) as in the PTX ISA."""
    warp.need_all(op)
    d, a, b, c, (scale_a,), select_a, (scale_b,), select_b = args
    assert all((warp.read(s, np.uint16) == 0).all() for s in (*select_a, *select_b))
    count, kind = (4 if "::4X" in op else 2), op.split(".")[-1]
    g, q = np.arange(LANES) // 4, np.arange(LANES) % 4
    A, B, C = np.zeros((16, 64)), np.zeros((8, 64)), np.zeros((16, 8))
    for i, name in enumerate(a):
        columns = 8 * q[:, None] + 32 * (i // 2) + np.arange(8)
        A[(g + 8 * (i % 2))[:, None], columns] = codes(warp.read(name, U32))
    for i, name in enumerate(b):
        B[g[:, None], 8 * q[:, None] + 32 * i + np.arange(8)] = codes(warp.read(name, U32))
    for i, name in enumerate(c):
        C[g + 8 * (i // 2), 2 * q + i % 2] = warp.read(name, F32)
    of_a, of_b = np.zeros((16, count)), np.zeros((8, count))
    asked = q < 2
    of_a[(g + 8 * q)[asked]] = scale_values(warp.read(scale_a, U32), count, kind)[asked]
    of_b[g[q == 0]] = scale_values(warp.read(scale_b, U32), count, kind)[q == 0]
    A, B = A * np.repeat(of_a, 64 // count, 1), B * np.repeat(of_b, 64 // count, 1)
    D = (A @ B.T + C).astype(F32)
    for i, name in enumerate(d):
        warp.write(name, D[g + 8 * (i // 2), 2 * q + i % 2])
