"""Runs a kernel's PTX on a CPU, so that kernels can be tested where there is no GPU.

Warps of 32 lanes in numpy, each lane with its own program counter: of the lanes of a warp those with the smallest
counter go on, so that they meet again where branches join. Warps take turns when they wait. Global and shared memory
are bytes with a map of what may be touched: reading or writing anything else is an error, and so is a warp-wide
instruction that some lanes miss. Bulk copies arrive late, shared memory begins as NaN. Products of matrices are exact
before they are rounded to float32; approximate functions are exact to float32. What ptxas makes of the PTX, timing and
memory order are not modelled.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LANES = 32
SHARED_BASE = 1024
LOCAL_BYTES = 256  # of a thread
F32, U32, S32, U64, S64 = np.float32, np.uint32, np.int32, np.uint64, np.int64


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


@dataclass
class Instruction:
    guard: tuple[str, bool] | None  # predicate, negated
    op: str
    args: list[Any]


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


class Kernel:
    """A parsed kernel, run with `launch`."""

    def __init__(self, ptx: str) -> None:
        body = ptx[ptx.index(".entry") :]
        header, body = body.split("{", 1)
        self.params = [
            (name, int(size) if size else {"f32": 4, "u32": 4, "b32": 4, "u64": 8, "b64": 8, "s32": 4}[kind])
            for kind, name, size in re.findall(r"\.param (?:\.align \d+ )?\.(\w+) (\w+)(?:\[(\d+)\])?", header)
        ]
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        body = _rename_local_labels(re.sub(r"//[^\n]*", "", body))
        body = re.sub(r"\.(reg|local|pragma|loc|file|section)\s[^;\n]*;?", "", body)
        for label, text in re.findall(r"([A-Za-z_$][\w$]*):(?!:)|([^;{}]*(?:\{[^;{}]*\}[^;{}]*)*);", body):
            if label:
                self.labels[label] = len(self.code)
                continue
            text = " ".join(text.split()).strip()
            while (found := re.match(r"([A-Za-z_$][\w$]*):(?!:)\s*(.*)", text)) is not None:
                self.labels[found[1]] = len(self.code)
                text = found[2]
            if text:
                self.code.append(_parse(text))

    def launch(
        self,
        grid: tuple[int, int],
        threads: int,
        arguments: Sequence[Tensor | float | int],
        shared_bytes: int = 232448,
        seed: int = 0,
    ) -> None:
        """Run all CTAs one after another; arrays are updated in place."""
        size = sum(-(-a.array.nbytes // 256) * 256 + 512 for a in arguments if isinstance(a, Tensor)) + 4096
        memory = Memory(1 << 40, size)
        constants: dict[str, np.ndarray] = {}
        placed: list[tuple[int, np.ndarray]] = []
        known: dict[tuple[int, int], int] = {}  # memory that is passed twice is one tensor
        for (name, length), argument in zip(self.params, arguments, strict=True):
            if isinstance(argument, Tensor):
                key = (argument.array.__array_interface__["data"][0], argument.array.nbytes)
                if key not in known:
                    known[key] = memory.place(argument.array)
                    placed.append((known[key], argument.array))
                address = known[key]
                is_bare = isinstance(argument, Address)
                data = np.uint64(address).tobytes() if is_bare else _descriptor(address, argument)
            else:
                data = np.array([argument], dtype=F32 if isinstance(argument, float) else S32).tobytes()
            assert len(data) == length, f"parameter {name} has {length} bytes, not {len(data)}"
            constants[name] = np.frombuffer(data, dtype=np.uint8)
        draw = np.random.default_rng(seed)
        for y in range(grid[1]):
            for x in range(grid[0]):
                self._run_cta((x, y), grid, threads, memory, constants, shared_bytes, draw)
        for address, array in placed:
            memory.fetch(address, array)

    def _run_cta(
        self, place: Any, grid: Any, threads: int, memory: Memory, constants: Any, shared: int, draw: Any
    ) -> None:
        cta = Cta(Memory(SHARED_BASE, shared))
        cta.shared.valid[:] = True
        warps = [Warp(self, w, threads, place, grid, memory, constants, cta) for w in range(threads // LANES)]
        idle = 0
        while any(not w.is_done for w in warps):
            before = cta.events
            for warp in draw.permutation(len(warps)):
                warps[warp].run()
            _deliver(cta, memory, draw)
            idle = 0 if cta.events != before else idle + 1
            if idle > 3:
                raise RuntimeError("all warps wait: a deadlock")


def _rename_local_labels(body: str) -> str:
    """Labels within the braces of inline PTX are visible there alone: give each block's a name of its own."""
    blocks = iter(range(10**6))

    def rename(found: re.Match[str]) -> str:
        block, number = found[0], next(blocks)
        for label in re.findall(r"^\s*([A-Za-z_]\w*):(?!:)", block, re.M):
            block = re.sub(rf"\b{label}\b", f"{label}_{number}", block)
        return block

    return re.sub(r"\{\s*\.reg[^{}]*\}", rename, body)


def _deliver(cta: Cta, memory: Memory, draw: Any) -> None:
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


def _descriptor(address: int, tensor: Tensor) -> bytes:
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


def _parse(text: str) -> Instruction:
    guard = None
    if text.startswith("@"):
        name, text = text.split(" ", 1)
        guard = (name.lstrip("@!"), "!" in name)
    op, _, rest = text.partition(" ")
    args: list[Any] = []
    for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest):
        part = part.strip()
        if part.startswith("{"):
            args.append([p.strip() for p in part[1:-1].split(",")])
        else:
            args.append(part)
    return Instruction(guard, op, args)


class Warp:
    """32 lanes and their registers."""

    def __init__(
        self, kernel: Kernel, index: int, threads: int, place: Any, grid: Any, memory: Memory, constants: Any, cta: Cta
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
        self.yields = False
        self.executed = 0

    @property
    def is_done(self) -> bool:
        return not self.alive.any()

    def run(self) -> None:
        """Go on until the warp waits or ends."""
        self.yields = False
        while not self.yields and self.alive.any():
            counter = int(self.counters[self.alive].min())
            self.lanes = self.alive & (self.counters == counter)
            self.is_whole = bool(self.lanes.all())
            self.step(self.kernel.code[counter], counter)

    def step(self, instruction: Instruction, counter: int) -> None:
        active = self.lanes
        if instruction.guard is not None:
            name, negated = instruction.guard
            active = active & (self.registers[name] != negated)
        self.active = active
        self.counters[self.lanes] = counter + 1
        self.executed += 1
        op = instruction.op
        if op.startswith("bra"):
            self.counters[active] = self.kernel.labels[instruction.args[0]]
            return
        if not active.any():
            return
        if op in ("ret", "exit"):
            self.alive &= ~active
            self.cta.events += 1
            return
        handler = _handler(op)
        if handler(self, op, instruction.args) is False:  # must be tried again
            self.counters[self.lanes] = counter
            self.yields = True

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


def _memory_op(warp: Warp, op: str, args: list[Any]) -> None:
    parts = op.split(".")
    size = WIDTH[parts[-1]]
    count = next((int(p[1:]) for p in parts if re.fullmatch(r"v\d", p)), 1)
    is_load = parts[0] == "ld"
    where, data = (args[1], args[0]) if is_load else (args[0], args[1])
    names = data if isinstance(data, list) else [data]
    storage = {1: np.uint8, 2: np.uint16, 4: U32, 8: U64}[size]
    if parts[1] == "param":
        name, _, offset = where.strip("[]").partition("+")
        for i, register in enumerate(names):
            start = int(offset or 0) + size * i
            warp.write(register, np.full(LANES, warp.constants[name][start : start + size].view(storage)[0], storage))
        return
    if "local" in parts:
        at = warp.address(where)[0]
        for i, register in enumerate(names):
            part = warp.local[:, at + size * i : at + size * (i + 1)]
            if is_load:
                warp.write(register, np.ascontiguousarray(part).view(storage)[:, 0])
            else:
                part[warp.active] = np.ascontiguousarray(warp.read(register, storage)[:, None]).view(np.uint8)[
                    warp.active
                ]
        return
    memory = warp.memory if "global" in parts else warp.cta.shared
    addresses = warp.address(where, U64 if "global" in parts else U32)[warp.active]
    at = memory.index(addresses, size * count)
    for i, register in enumerate(names):
        part = at[:, size * i : size * (i + 1)]
        if is_load:
            value = np.zeros(LANES, dtype=storage)
            value[warp.active] = np.ascontiguousarray(memory.bytes[part]).view(storage)[:, 0]
            warp.write(register, value)
        else:
            bits = warp.read(register, storage)[warp.active]
            memory.bytes[part] = np.ascontiguousarray(bits[:, None]).view(np.uint8)


def _atomic(warp: Warp, op: str, args: list[Any]) -> None:
    """atom.add: lanes one after another."""
    assert op.startswith("atom.add.") and op.endswith(".s32")
    old, value = np.zeros(LANES, S32), warp.read(args[2], S32)
    addresses = warp.address(args[1], U64)
    for lane in np.flatnonzero(warp.active):
        at = warp.memory.index(addresses[lane : lane + 1], 4)[0]
        old[lane] = warp.memory.bytes[at].view(S32)[0]
        warp.memory.bytes[at] = (old[lane : lane + 1] + value[lane]).view(np.uint8)
    warp.write(args[0], old)


def _binary(function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[Warp, str, list[Any]], None]:
    def run(warp: Warp, op: str, args: list[Any]) -> None:
        dtype = TYPES[op.split(".")[-1]]
        with np.errstate(all="ignore"):
            warp.write(args[0], function(warp.read(args[1], dtype), warp.read(args[2], dtype)).astype(dtype))

    return run


def _unary(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Warp, str, list[Any]], None]:
    def run(warp: Warp, op: str, args: list[Any]) -> None:
        dtype = TYPES[op.split(".")[-1]]
        with np.errstate(all="ignore"):
            warp.write(args[0], function(warp.read(args[1], dtype)).astype(dtype))

    return run


WIDER = {"s16": (np.int16, S32), "u16": (np.uint16, U32), "s32": (S32, S64), "u32": (U32, U64)}


def _wide(warp: Warp, op: str, args: list[Any]) -> None:
    narrow, wide = WIDER[op.split(".")[-1]]
    product = warp.read(args[1], narrow).astype(wide) * warp.read(args[2], narrow).astype(wide)
    if len(args) == 4:
        product = product + warp.read(args[3], wide)
    warp.write(args[0], product)


def _high(warp: Warp, op: str, args: list[Any]) -> None:
    narrow, wide = WIDER[op.split(".")[-1]]
    product = warp.read(args[1], narrow).astype(wide) * warp.read(args[2], narrow).astype(wide)
    warp.write(args[0], (product >> wide(8 * np.dtype(narrow).itemsize)).astype(narrow))


def _mad(warp: Warp, op: str, args: list[Any]) -> None:
    dtype = TYPES[op.split(".")[-1]]
    a, b, c = (warp.read(x, dtype) for x in args[1:])
    with np.errstate(all="ignore"):
        warp.write(args[0], a * b + c)


def _fma(warp: Warp, op: str, args: list[Any]) -> None:
    if op.endswith("bf16x2"):
        parts = [halves_bf16(warp.read(a, U32)) for a in args[1:]]
        results = [to_bf16((p[0].astype(np.float64) * p[1] + p[2]).astype(F32)) for p in zip(*parts, strict=True)]
        warp.write(args[0], results[0] | results[1] << U32(16))
        return
    dtype, wide = (np.float64, np.longdouble) if op.endswith("f64") else (F32, np.float64)
    a, b, c = (warp.read(x, dtype).astype(wide) for x in args[1:])
    with np.errstate(all="ignore"):
        found = (a * b + c).astype(dtype)
        warp.write(args[0], np.clip(np.nan_to_num(found), 0, 1).astype(dtype) if ".sat." in op else found)


PAIRS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.fmin, "max": np.fmax,
}  # fmt: skip


def _bf16x2(warp: Warp, op: str, args: list[Any]) -> None:
    """24 bits are enough that rounding to float32 first changes nothing."""
    function = PAIRS[op.split(".")[0]]
    (a0, a1), (b0, b1) = halves_bf16(warp.read(args[1], U32)), halves_bf16(warp.read(args[2], U32))
    with np.errstate(all="ignore"):
        warp.write(args[0], to_bf16(function(a0, b0)) | to_bf16(function(a1, b1)) << U32(16))


def _add_bf16(warp: Warp, op: str, args: list[Any]) -> None:
    a, b = (from_bf16(warp.read(x, np.uint16)) for x in args[1:])
    warp.write(args[0], to_bf16(a + b).astype(np.uint16))


def _shift(left: bool) -> Callable[[Warp, str, list[Any]], None]:
    def run(warp: Warp, op: str, args: list[Any]) -> None:
        dtype = TYPES[op.split(".")[-1]]
        bits = 8 * np.dtype(dtype).itemsize
        value, by = warp.read(args[1], dtype), warp.read(args[2], U32)
        small = np.minimum(by, bits - 1).astype(dtype)
        moved = value << small if left else value >> small
        if left or not np.issubdtype(dtype, np.signedinteger):
            moved = np.where(by >= bits, 0, moved).astype(dtype)
        warp.write(args[0], moved)

    return run


def _funnel(warp: Warp, op: str, args: list[Any]) -> None:
    low, high = (warp.read(a, U32).astype(U64) for a in args[1:3])
    by = warp.read(args[3], U32).astype(U64) & U64(31)
    both = (high << U64(32)) | low
    moved = (both << by) >> U64(32) if ".l." in op else both >> by
    warp.write(args[0], (moved & U64(0xFFFFFFFF)).astype(U32))


COMPARE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "nan": lambda a, b: np.isnan(a) | np.isnan(b), "neu": np.not_equal, "equ": lambda a, b: ~((a < b) | (a > b)),
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
}  # fmt: skip


def _setp(warp: Warp, op: str, args: list[Any]) -> None:
    _, relation, kind = op.split(".")
    dtype = TYPES[kind]
    warp.write(args[0], COMPARE[relation](warp.read(args[1], dtype), warp.read(args[2], dtype)))


def _selp(warp: Warp, op: str, args: list[Any]) -> None:
    dtype = TYPES[op.split(".")[-1]]
    warp.write(args[0], np.where(warp.read(args[3], bool), warp.read(args[1], dtype), warp.read(args[2], dtype)))


def _prmt(warp: Warp, op: str, args: list[Any]) -> None:
    a, b, selector = (warp.read(x, U32) for x in args[1:])
    source = np.stack([(w >> U32(8 * i)) & U32(255) for w in (a, b) for i in range(4)], -1)
    found = np.zeros(LANES, dtype=U32)
    for i in range(4):
        nibble = (selector >> U32(4 * i)) & U32(15)
        assert (nibble < 8).all(), "prmt with signs is not modelled"
        found |= source[np.arange(LANES), nibble] << U32(8 * i)
    warp.write(args[0], found)


def _mov(warp: Warp, op: str, args: list[Any]) -> None:
    if op == "mov.pred":
        warp.write(args[0], warp.read(args[1], np.int32).astype(bool))
        return
    dtype = TYPES[op.split(".")[-1]]
    half = {2: np.uint16, 4: np.uint16, 8: U32}[np.dtype(dtype).itemsize]
    if isinstance(args[1], list):
        warp.write(args[0], np.stack([warp.read(a, half) for a in args[1]], -1).view(dtype)[:, 0])
    elif isinstance(args[0], list):
        parts = warp.read(args[1], dtype).copy().view(half).reshape(LANES, 2)
        warp.write(args[0][0], parts[:, 0].copy())
        warp.write(args[0][1], parts[:, 1].copy())
    else:
        warp.write(args[0], warp.read(args[1], dtype))


def e4m3(x: np.ndarray) -> np.ndarray:
    import torch

    clamped = torch.from_numpy(np.clip(x, -448, 448).astype(F32))
    return clamped.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _cvt(warp: Warp, op: str, args: list[Any]) -> None:
    if op == "cvt.rn.bf16x2.f32":
        warp.write(args[0], to_bf16(warp.read(args[2], F32)) | to_bf16(warp.read(args[1], F32)) << U32(16))
    elif op == "cvt.rn.f16x2.f32":
        both = np.stack((warp.read(args[2], F32), warp.read(args[1], F32)), -1).astype(np.float16)
        warp.write(args[0], np.ascontiguousarray(both).view(U32)[:, 0])
    elif op == "cvt.rn.bf16.f32":
        warp.write(args[0], to_bf16(warp.read(args[1], F32)).astype(np.uint16))
    elif op == "cvt.f32.bf16":
        warp.write(args[0], from_bf16(warp.read(args[1], np.uint16)))
    elif op == "cvt.rn.f16x2.e4m3x2":
        import torch

        codes = torch.from_numpy(np.ascontiguousarray(warp.read(args[1], np.uint16)).view(np.uint8).copy())
        found = codes.view(torch.float8_e4m3fn).to(torch.float16).numpy()
        warp.write(args[0], np.ascontiguousarray(found).view(U32))
    elif op == "cvt.rn.satfinite.e4m3x2.f32":
        low, high = e4m3(warp.read(args[2], F32)), e4m3(warp.read(args[1], F32))
        warp.write(args[0], low.astype(np.uint16) | high.astype(np.uint16) << np.uint16(8))
    else:
        *rounding, target, source = op.split(".")[1:]
        value = warp.read(args[1], TYPES[source])
        if rounding == ["rni"]:
            value = np.rint(value)
        with np.errstate(all="ignore"):
            warp.write(args[0], value.astype(TYPES[target]))


def _shfl(warp: Warp, op: str, args: list[Any]) -> None:
    warp.need_all(op)
    value = warp.read(args[1], U32)
    lanes = np.arange(LANES)
    offset = warp.read(args[2], U32).astype(np.int64)
    above = np.where(lanes >= offset, lanes - offset, lanes)
    source = {"idx": offset % LANES, "bfly": lanes ^ offset, "up": above}[op.split(".")[2]]
    warp.write(args[0].split("|")[0], value[source])


def _redux(warp: Warp, op: str, args: list[Any]) -> None:
    warp.need_all(op)
    assert op.endswith("max.u32")
    warp.write(args[0], np.full(LANES, warp.read(args[1], U32).max()))


def _vote(warp: Warp, op: str, args: list[Any]) -> None:
    warp.need_all(op)
    assert ".any." in op
    warp.write(args[0], np.full(LANES, warp.read(args[1], bool).any()))


def _elect(warp: Warp, op: str, args: list[Any]) -> None:
    warp.need_all(op)
    lane, predicate = args[0].split("|")
    warp.write(lane, np.zeros(LANES, U32))
    warp.write(predicate, np.arange(LANES) == 0)


def _movmatrix(warp: Warp, op: str, args: list[Any]) -> None:
    warp.need_all(op)
    matrix = warp.read(args[1], U32).view(np.uint16).reshape(8, 8)  # row g holds columns 2t, 2t + 1 of lanes 4g + t
    warp.write(args[0], np.ascontiguousarray(matrix.T).view(U32).reshape(LANES))


def _ldmatrix(warp: Warp, op: str, args: list[Any]) -> None:
    """x4, not transposed: lanes 8 i ... 8 i + 7 give the rows of matrix i."""
    warp.need_all(op)
    assert ".x4." in op and "trans" not in op
    at = warp.cta.shared.index(warp.address(args[1], U32), 16)  # [32, 16 bytes]
    rows = np.ascontiguousarray(warp.cta.shared.bytes[at]).view(U32)  # [32, 4]
    for i, name in enumerate(args[0]):
        warp.write(
            name, rows[8 * i : 8 * i + 8].reshape(LANES).copy()
        )  # lane 4 g + t holds columns 2 t, 2 t + 1 of row g


def _mma(warp: Warp, op: str, args: list[Any]) -> None:
    """m16n8k16, bfloat16: fragments as in the PTX ISA's figures."""
    warp.need_all(op)
    d, a, b, c = args
    halves = halves_f16 if ".f16.f16." in op else halves_bf16
    A, B, C = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    g, t = np.arange(LANES) // 4, np.arange(LANES) % 4
    for i, name in enumerate(a):
        low, high = halves(warp.read(name, U32))
        A[g + 8 * (i % 2), 2 * t + 8 * (i // 2)] = low
        A[g + 8 * (i % 2), 2 * t + 8 * (i // 2) + 1] = high
    for i, name in enumerate(b):
        low, high = halves(warp.read(name, U32))
        B[2 * t + 8 * i, g] = low
        B[2 * t + 8 * i + 1, g] = high
    for i, name in enumerate(c):
        C[g + 8 * (i // 2), 2 * t + i % 2] = warp.read(name, F32)
    with np.errstate(all="ignore"):
        D = (A @ B + C).astype(F32)
    for i, name in enumerate(d):
        warp.write(name, D[g + 8 * (i // 2), 2 * t + i % 2])


def _bar(warp: Warp, op: str, args: list[Any]) -> bool | None:
    warp.need_all(op)
    name = int(args[0])
    count = int(args[1]) // LANES if len(args) > 1 else warp.threads // LANES
    cta = warp.cta
    if warp.index in cta.passed.setdefault(name, set()):
        cta.passed[name].discard(warp.index)
        return None
    waiting = cta.waiting.setdefault(name, set())
    if warp.index not in waiting:
        waiting.add(warp.index)
        cta.events += 1
    if len(waiting) == count:
        cta.passed[name] |= {w for w in waiting if w >= 0} - {warp.index}
        waiting.clear()
        return None
    return False


def _arrive(warp: Warp, op: str, args: list[Any]) -> None:
    """bar.arrive: counted, and not kept; it stands among those that wait as ~warp."""
    warp.need_all(op)
    name, count, cta = int(args[0]), int(args[1]) // LANES, warp.cta
    waiting = cta.waiting.setdefault(name, set())
    waiting.add(~warp.index)
    cta.events += 1
    if len(waiting) == count:
        cta.passed.setdefault(name, set()).update(w for w in waiting if w >= 0)
        waiting.clear()


def _mbarrier(warp: Warp, op: str, args: list[Any]) -> None:
    cta = warp.cta
    action = op.split(".")[1]
    if action == "init":
        for address in warp.address(args[0], U32)[warp.active]:
            count = int(warp.read(args[1], U32)[0])
            cta.barriers[int(address)] = Barrier(count, count)
        return
    where = args[0] if action == "try_wait" and args[0].startswith("[") else next(a for a in args if a.startswith("["))
    addresses = warp.address(where, U32)[warp.active]
    if action == "try_wait":
        assert len(set(addresses.tolist())) == 1
        after = args[args.index(where) + 1]
        ready = cta.barriers[int(addresses[0])].phase != int(warp.read(after, U32)[warp.active][0])
        warp.write(args[0], np.full(LANES, ready))
        warp.yields = not ready
        return
    after = args[args.index(where) + 1 :]
    for i, address in enumerate(addresses):
        barrier = cta.barriers[int(address)]
        if "expect_tx" in op:
            barrier.bytes += int(warp.read(after[0], U32)[warp.active][i])
        barrier.pending -= 1
        assert barrier.pending >= 0, "more arrivals than expected"
        barrier.settle()
        cta.events += 1


def _count(warp: Warp, op: str, args: list[Any]) -> None:
    """red.shared.add: lanes that meet in one place add one after another."""
    shared = warp.cta.shared
    at, adds = shared.index(warp.address(args[0], U32)[warp.active], 4), warp.read(args[1], S32)[warp.active]
    for place, add in zip(at, adds, strict=True):
        shared.bytes[place] = (np.ascontiguousarray(shared.bytes[place]).view(S32) + add).view(np.uint8)


def _bulk(warp: Warp, op: str, args: list[Any]) -> None:
    targets, barriers = (warp.address(a, U32)[warp.active] for a in (args[0], args[3]))
    sources, sizes = warp.address(args[1])[warp.active], warp.read(args[2], U32)[warp.active]
    for copy in zip(targets.tolist(), sources.tolist(), sizes.tolist(), barriers.tolist(), strict=True):
        warp.cta.copies.append(copy)
        warp.cta.events += 1


def _s16x2(warp: Warp, op: str, args: list[Any]) -> None:
    low, high = (
        PAIRS[op.split(".")[0]](*(half(warp.read(x, U32)).astype(np.int16) for x in args[1:])).astype(np.uint16)
        for half in (lambda word: word & U32(0xFFFF), lambda word: word >> U32(16))
    )
    warp.write(args[0], low.astype(U32) | high.astype(U32) << U32(16))


def _nothing(warp: Warp, op: str, args: list[Any]) -> None:
    pass


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    return (np.sign(a) * np.sign(b) * (np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64)))).astype(a.dtype)


HANDLERS: list[tuple[str, Callable[[Warp, str, list[Any]], Any]]] = [
    (r"(ld|st)\..*", _memory_op), (r"atom\..*", _atomic),
    (r"mul\.wide.*|mad\.wide.*", _wide), (r"mul\.hi\..*", _high), (r"mad\.lo.*", _mad), (r"fma\..*", _fma),
    (r"(add|sub|mul)\.rn\.bf16x2|(min|max)\.bf16x2", _bf16x2), (r"add\.(rn\.)?bf16", _add_bf16),
    (r"(min|max)\.s16x2", _s16x2),
    (r"add\.(?!bf16).*", _binary(lambda a, b: a + b)), (r"sub\.(?!bf16).*", _binary(lambda a, b: a - b)),
    (r"mul\.(?!bf16).*", _binary(lambda a, b: a * b)),
    (r"div\..*", _binary(_divide)), (r"rem\..*", _binary(lambda a, b: np.fmod(a, b))),
    (r"max\.NaN\..*", _binary(np.maximum)),
    (r"min\..*", _binary(np.fmin)), (r"max\..*", _binary(np.fmax)),
    (r"and\..*", _binary(lambda a, b: a & b)), (r"or\..*", _binary(lambda a, b: a | b)),
    (r"xor\..*", _binary(lambda a, b: a ^ b)), (r"not\.pred", _unary(lambda a: ~a)), (r"not\..*", _unary(lambda a: ~a)),
    (r"neg\..*", _unary(lambda a: -a)), (r"abs\..*", _unary(np.abs)),
    (r"shl\..*", _shift(True)), (r"shr\..*", _shift(False)), (r"shf\..*", _funnel),
    (r"setp\..*", _setp), (r"selp\..*", _selp), (r"prmt\..*", _prmt), (r"mov\..*", _mov), (r"cvt\..*", _cvt),
    (r"cvta\..*", _mov),
    (r"ex2\..*", _unary(np.exp2)), (r"lg2\..*", _unary(np.log2)), (r"rcp\..*", _unary(lambda a: 1 / a)),
    (r"sqrt\..*", _unary(np.sqrt)), (r"red\.shared\.add\.s32", _count),
    (r"shfl\..*", _shfl), (r"redux\..*", _redux), (r"vote\..*", _vote), (r"elect\..*", _elect),
    (r"movmatrix\..*", _movmatrix),
    (r"ldmatrix\..*", _ldmatrix), (r"mma\..*", _mma), (r"bar\.sync|barrier\.sync.*", _bar),
    (r"bar\.arrive|barrier(\.cta)?\.arrive", _arrive),
    (r"mbarrier\..*", _mbarrier),
    (r"cp\.async\.bulk\..*", _bulk), (r"griddepcontrol.*|fence.*|prefetch.*|bar\.warp\.sync", _nothing),
]  # fmt: skip
_found: dict[str, Callable[[Warp, str, list[Any]], Any]] = {}


def _handler(op: str) -> Callable[[Warp, str, list[Any]], Any]:
    if op not in _found:
        for pattern, handler in HANDLERS:
            if re.fullmatch(pattern, op):
                _found[op] = handler
                break
        else:
            raise NotImplementedError(f"the emulator does not know {op}; add it to HANDLERS")
    return _found[op]
