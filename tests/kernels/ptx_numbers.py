"""The number types of PTX in numpy, and bfloat16, float16 and E4M3 as bits."""

from typing import Any

import numpy as np
import torch

F32, U32, S32, U64, S64 = np.float32, np.uint32, np.int32, np.uint64, np.int64
WIDTH = {
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
}
TYPES: dict[str, Any] = {
    "u16": np.uint16, "b16": np.uint16, "s16": np.int16, "u32": U32, "b32": U32, "s32": S32, "f32": F32, "u64": U64,
    "b64": U64, "s64": S64, "f64": np.float64, "pred": bool, "u8": np.uint8, "b8": np.uint8,
}  # fmt: skip


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 -> bits of the nearest bfloat16, ties to even."""
    bits = x.astype(F32).view(U32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(U32)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(U32) << U32(16)).view(F32)


def halves_f16(word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    both = word.view(np.float16).reshape(-1, 2).astype(F32)
    return both[:, 0], both[:, 1]


def halves_bf16(word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return from_bf16(word & U32(0xFFFF)), (word & U32(0xFFFF0000)).view(F32)


def e4m3(x: np.ndarray) -> np.ndarray:
    """float32 -> bits of the nearest E4M3 number, saturating."""
    clamped = torch.from_numpy(np.clip(x, -448, 448).astype(F32))
    return clamped.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
