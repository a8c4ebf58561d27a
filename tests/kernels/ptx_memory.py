"""Memory in the PTX emulator: allocations, a kernel's arguments, shared memory with its barriers and late copies."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .ptx_numbers import S32, S64, U64

LANES = 32  # of a warp
SHARED_BASE = 1024


@dataclass(frozen=True)
class Tensor:
    """A kernel's tensor argument: a contiguous array, and which of its dimensions are compile-time constants."""

    array: np.ndarray
    static: tuple[int, ...] = ()


@dataclass(frozen=True)
class Part(Tensor):
    """Entries `start` to `stop` along the second dimension of a whole array, where they lie."""

    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Address(Tensor):
    """An array of which the kernel gets nothing but the address."""


class Memory:
    """Allocations in one flat address space, with guard bytes between them."""

    def __init__(self, base: int, size: int) -> None:
        self.base = base
        self.bytes = np.full(size, 255, dtype=np.uint8)
        self.valid = np.zeros(size, dtype=bool)
        self.top = 0

    def place(self, array: np.ndarray) -> int:
        self.top = -(-self.top // 256) * 256 + 256
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        self.bytes[self.top : self.top + data.size] = data
        self.valid[self.top : self.top + data.size] = True
        address = self.base + self.top
        self.top += data.size
        return address

    def fetch(self, address: int, like: np.ndarray) -> None:
        start = address - self.base
        like.reshape(-1).view(np.uint8)[:] = self.bytes[start : start + like.nbytes]

    def index(self, addresses: np.ndarray, size: int) -> np.ndarray:
        at = addresses.astype(np.int64)[:, None] - self.base + np.arange(size)
        if at.min() < 0 or at.max() >= self.bytes.size or not self.valid[at].all():
            raise IndexError(f"an access of {size} bytes outside every tensor, at {addresses.min():#x}")
        if (addresses.astype(np.int64) % size).any():
            raise ValueError(f"an access of {size} bytes is not aligned")
        return at


@dataclass
class Barrier:
    expected: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.expected


@dataclass
class Cta:
    shared: Memory
    barriers: dict[int, Barrier] = field(default_factory=dict)
    waiting: dict[int, set[int]] = field(default_factory=dict)  # named barrier -> warps
    passed: dict[int, set[int]] = field(default_factory=dict)
    copies: list[tuple[int, int, int, int]] = field(default_factory=list)
    events: int = 0  # what other warps may wait for


def deliver(cta: Cta, memory: Memory, draw: Any) -> None:
    """Some of the bulk copies under way arrive."""
    keep = []
    for copy in cta.copies:
        if draw.random() < 0.4:
            keep.append(copy)
            cta.events += 1
            continue
        target, source, size, barrier = copy
        at = memory.index(np.array([source]), 1)[0, 0]
        if size % 16 or source % 16 or target % 16 or not memory.valid[at : at + size].all():
            raise ValueError(f"a bulk copy of {size} bytes is not aligned, or reads outside every tensor")
        cta.shared.bytes[target - SHARED_BASE : target - SHARED_BASE + size] = memory.bytes[at : at + size]
        cta.barriers[barrier].bytes -= size
        cta.barriers[barrier].settle()
        cta.events += 1
    cta.copies = keep


def descriptor(address: int, tensor: Tensor) -> bytes:
    """A tensor parameter: pointer, dynamic sizes (int32), dynamic strides (int64)."""
    shape = tensor.array.shape
    sizes = list(shape)
    if isinstance(tensor, Part):
        sizes[1] = tensor.stop - tensor.start
        address += tensor.start * int(np.prod(shape[2:])) * tensor.array.itemsize
    dynamic = [i for i in range(len(shape)) if i not in tensor.static]
    data = np.array([address], dtype=U64).tobytes() + np.array([sizes[i] for i in dynamic], dtype=S32).tobytes()
    strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape)) if any(j > i for j in dynamic)]
    data += b"\0" * (-len(data) % 8) + np.array(strides, dtype=S64).tobytes()
    return data + b"\0" * (-len(data) % 8)
