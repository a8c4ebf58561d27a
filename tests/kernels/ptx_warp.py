"""A warp in the PTX emulator: the registers of its lanes, and what an instruction may ask of them."""

import re
from typing import Any

import numpy as np

from .ptx_memory import LANES, SHARED_BASE, Cta, Memory
from .ptx_numbers import U32, U64

LOCAL_BYTES = 256  # of a thread


class Warp:
    """32 lanes, each with a program counter, and their registers."""

    def __init__(
        self, kernel: Any, index: int, threads: int, place: Any, grid: Any, memory: Memory, constants: Any, cta: Cta
    ) -> None:
        self.kernel, self.index, self.threads, self.cta, self.memory = kernel, index, threads, cta, memory
        self.constants = constants
        self.registers: dict[str, np.ndarray] = {}
        self.counters = np.zeros(LANES, dtype=np.int64)
        self.alive = np.ones(LANES, dtype=bool)
        lanes = np.arange(LANES, dtype=U32)
        self.local = np.zeros((LANES, LOCAL_BYTES), dtype=np.uint8)
        self.special = {
            "__local_depot0": np.zeros(LANES, dtype=U64),
            "%tid.x": lanes + U32(LANES * index), "%laneid": lanes,
            "%ctaid.x": np.full(LANES, place[0], U32), "%ctaid.y": np.full(LANES, place[1], U32),
            "%nctaid.x": np.full(LANES, grid[0], U32), "%nctaid.y": np.full(LANES, grid[1], U32),
            "__dynamic_shmem__0": np.full(LANES, SHARED_BASE, U32),
        }  # fmt: skip
        self.yields = False  # it waits
        self.active = self.alive  # lanes that run an instruction, those that a predicate holds back left out

    @property
    def is_done(self) -> bool:
        return not self.alive.any()

    def read(self, arg: str, dtype: Any) -> np.ndarray:
        """An operand's bits as `dtype` [32]."""
        if arg in self.special:
            return self.special[arg].astype(dtype)
        if arg.startswith("%") or arg in self.registers:
            value = self.registers.get(arg)
            if value is None:
                value = np.zeros(LANES, dtype=dtype)
            if value.dtype == bool or dtype is bool:
                return value.astype(dtype)
            width = np.dtype(dtype).itemsize
            if value.dtype.itemsize == width:
                return value.view(dtype)
            return value.astype({1: np.uint8, 2: np.uint16, 4: U32, 8: U64}[width]).view(dtype)
        if arg.startswith("0f"):
            return np.full(LANES, int(arg[2:], 16), dtype=U32).view(dtype)
        if arg.startswith("0d"):
            return np.full(LANES, int(arg[2:], 16), dtype=U64).view(dtype)
        number = int(arg, 0)
        width = np.dtype(dtype).itemsize
        return np.full(LANES, number & ((1 << 8 * width) - 1), dtype={2: np.uint16, 4: U32, 8: U64}[width]).view(dtype)

    def write(self, name: str, value: np.ndarray) -> None:
        if name == "_":
            return
        value = (
            value
            if value.dtype == bool
            else value.view({1: np.uint8, 2: np.uint16, 4: U32, 8: U64}[value.dtype.itemsize])
        )
        if self.active.all():
            self.registers[name] = value.copy()
            return
        old = self.registers.get(name)
        if old is None or old.dtype != value.dtype:
            old = np.zeros(LANES, dtype=value.dtype) if old is None else old.astype(value.dtype)
        self.registers[name] = np.where(self.active, value, old)

    def address(self, arg: str, dtype: Any = U64) -> np.ndarray:
        base, _, offset = arg.strip("[]").partition("+")
        if "-" in offset or "-" in base:
            base, offset = re.match(r"(.*?)\+?(-?\d+)$", arg.strip("[]")).groups()  # type: ignore[union-attr]
        wide = self.read(base, dtype).astype(np.int64)
        return wide + int(offset or 0)

    def need_all(self, op: str) -> None:
        if not self.active.all():
            raise RuntimeError(f"{op} is run by {int(self.active.sum())} of 32 lanes")
