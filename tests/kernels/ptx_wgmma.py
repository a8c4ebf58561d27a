"""The emulator of ptx_emulator.py for the GEMM: wgmma, tensor copies with their swizzle, transposed matrix stores.

A warp multiplies its own 16 rows when it issues a wgmma; tensor copies arrive late, as bulk copies do. The CTAs of a
cluster, or of a whole launch that meets in global memory, run together. Not modelled: that wgmma is asynchronous,
memory order between CTAs, how coarsely FP8 adds up.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from .ptx_arithmetic import mov, unary
from .ptx_emulator import Kernel, run
from .ptx_exchange import arrive, bar, memory_op, nothing
from .ptx_instructions import HANDLERS
from .ptx_memory import LANES, SHARED_BASE, Cta, Memory, Tensor, deliver, descriptor
from .ptx_numbers import U32, U64, from_bf16
from .ptx_warp import Warp


@dataclass(frozen=True)
class TensorMap:
    """What the host makes of a matrix [rows, columns] for copies of boxes 128 bytes wide, `rows` high."""

    array: np.ndarray  # of bytes, or of uint16 for bfloat16
    rows: int


@dataclass(frozen=True)
class Columns:
    """Columns `start` to `stop` of a matrix, as a tensor whose rows lie further apart than they are long."""

    array: np.ndarray
    start: int
    stop: int


@dataclass(frozen=True)
class Sizes:
    """int32 values that a kernel takes in one parameter."""

    values: tuple[int, ...]


class TensorCoreKernel(Kernel):
    """A parsed kernel whose arguments may be tensor maps."""

    def launch_all(self, grid: int, threads: int, arguments: Sequence[Any], together: int = 1, seed: int = 0) -> None:
        """Run all CTAs, `together` at a time (a cluster); arrays are updated in place."""
        arrays = [a.array for a in arguments if isinstance(a, Tensor | Columns)]
        memory = Memory(1 << 40, sum(array.nbytes + 1024 for array in arrays) + 4096)
        constants: dict[str, np.ndarray] = {}
        placed: list[tuple[int, np.ndarray]] = []
        self.maps: dict[str, TensorMap] = {}
        for (name, length), argument in zip(self.params, arguments, strict=True):
            if isinstance(argument, TensorMap):
                self.maps[name], data = argument, bytes(length)
            elif isinstance(argument, Tensor):
                address = memory.place(argument.array)
                placed.append((address, argument.array))
                data = descriptor(address, argument)
            elif isinstance(argument, Columns):
                at = memory.place(argument.array) + argument.start * argument.array.itemsize
                sizes = np.array((argument.array.shape[0], argument.stop - argument.start), dtype=np.int32)
                data = np.array([at], dtype=U64).tobytes() + sizes.tobytes()
                data += np.array([argument.array.shape[1]], dtype=np.int64).tobytes()
            else:
                values = argument.values if isinstance(argument, Sizes) else (argument,)
                data = np.array(values, dtype=np.float32 if isinstance(values[0], float) else np.int32).tobytes()
            assert len(data) == length, f"parameter {name} has {length} bytes, not {len(data)}"
            constants[name] = np.frombuffer(data, dtype=np.uint8)
        draw = np.random.default_rng(seed)
        for first in range(0, grid, together):
            self._run(range(first, first + together), grid, threads, memory, constants, draw)
        for address, array in placed:
            memory.fetch(address, array)

    def _run(self, blocks: range, grid: int, threads: int, memory: Memory, constants: Any, draw: Any) -> None:
        ctas = [Cta(Memory(SHARED_BASE, 232448)) for _ in blocks]
        warps = []
        for block, cta in zip(blocks, ctas, strict=True):
            cta.shared.valid[:] = True
            for index in range(threads // LANES):
                warp = Warp(self, index, threads, (block, 0), (grid, 1), memory, constants, cta)
                warp.special |= {name: np.full(LANES, i, U64) for i, name in enumerate(self.maps)}
                warps.append(warp)
        self.cluster = Cluster(ctas, {id(warp): 0 for warp in warps}, {id(warp): 0 for warp in warps})
        idle = 0
        while any(not warp.is_done for warp in warps):
            before = sum(cta.events for cta in ctas)
            for at in draw.permutation(len(warps)):
                run(warps[at])
            for cta in ctas:
                self._deliver(cta, memory, draw)
            idle = 0 if sum(cta.events for cta in ctas) != before else idle + 1
            if idle > 3:
                raise RuntimeError("all warps wait: a deadlock")

    def _deliver(self, cta: Cta, memory: Memory, draw: Any) -> None:
        """Some of the copies under way arrive."""
        tiles: list[Any] = [copy for copy in cta.copies if callable(copy)]
        cta.events += len(tiles)
        cta.copies = [copy for copy in cta.copies if not callable(copy)]
        deliver(cta, memory, draw)
        for copy in tiles:
            if draw.random() < 0.4:
                cta.copies.append(copy)
            else:
                copy()


@dataclass
class Cluster:
    """CTAs that run together; how often each warp has arrived at their barrier, and has passed it."""

    ctas: list[Cta]
    arrived: dict[int, int]
    passed: dict[int, int]


def swizzled(addresses: np.ndarray) -> np.ndarray:
    """The 128-byte swizzle of shared-memory addresses."""
    return addresses ^ (((addresses >> 7) & 7) << 4)


def _tensor_copy(warp: Warp, op: str, args: list[Any]) -> None:
    assert ".2d." in op and int(warp.active.sum()) == 1, "one lane copies a tile"
    lane = int(np.flatnonzero(warp.active)[0])
    target, barrier = int(warp.address(args[0], U32)[lane]), int(warp.address(args[2], U32)[lane])
    pointer, column, row = re.findall(r"[%\w]+", args[1])
    kernel: Any = warp.kernel
    source = list(kernel.maps.values())[int(warp.read(pointer, U64)[lane])]
    c, r = (int(warp.read(name, np.int32)[lane]) for name in (column, row))
    receivers = [warp.cta]
    if "multicast" in op:
        mask = int(warp.read(args[3], np.uint16)[lane])
        receivers = [cta for rank, cta in enumerate(kernel.cluster.ctas) if mask >> rank & 1]
    for cta in receivers:
        cta.copies.append(partial(_arrive, cta, source, target, barrier, c, r))  # type: ignore[arg-type]
        cta.events += 1


def _arrive(cta: Cta, source: TensorMap, target: int, barrier: int, column: int, row: int) -> None:
    size = source.array.itemsize
    box = np.zeros((source.rows, 128 // size), dtype=source.array.dtype)  # outside the tensor it is zero
    part = source.array[max(row, 0) : row + source.rows, max(column, 0) : column + 128 // size]
    box[: part.shape[0], : part.shape[1]] = part
    assert target % 1024 == 0, "a swizzled tile begins at a multiple of 1024"
    at = swizzled(target + np.arange(source.rows * 128)) - SHARED_BASE
    cta.shared.bytes[at] = box.view(np.uint8).reshape(-1)
    cta.barriers[barrier].bytes -= source.rows * 128
    cta.barriers[barrier].settle()


def _operand(warp: Warp, descriptor: str, rows: np.ndarray, kind: str) -> np.ndarray:
    """float64 [rows, columns of a step] that a descriptor of a K-major, 128-byte swizzled operand names."""
    word = int(warp.read(descriptor, U64)[0])
    assert word >> 62 == 1 and (word >> 32) & 0x3FFF == 64, "128-byte swizzle, 1024 bytes from 8 rows to the next"
    start = (word & 0x3FFF) << 4
    at = swizzled(start + (rows[:, None] // 8) * 1024 + (rows[:, None] % 8) * 128 + np.arange(32)) - SHARED_BASE
    return numbers(np.ascontiguousarray(warp.cta.shared.bytes[at]), kind)


def numbers(data: np.ndarray, kind: str) -> np.ndarray:
    """Bytes [..., n] as float64."""
    if kind == "bf16":
        return from_bf16(data.view(np.uint16)).astype(np.float64)
    if kind == "e4m3":
        return torch.from_numpy(data.copy()).view(torch.float8_e4m3fn).double().numpy()
    return data.view(np.int8).astype(np.float64)


def _wgmma(warp: Warp, op: str, args: list[Any]) -> None:
    """m64nNk16 or k32: this warp's 16 rows. Fragments as in the PTX ISA's figures."""
    warp.need_all(op)
    shape = re.search(r"m64n(\d+)k(\d+)", op)
    assert shape is not None
    kind = op.split(".")[-1].replace("s8", "int8")
    d, a, b, p = args[:4]
    g, t = np.arange(LANES) // 4, np.arange(LANES) % 4
    B = _operand(warp, b, np.arange(int(shape[1])), kind)
    if isinstance(a, list):
        A = np.zeros((16, int(shape[2])))
        each = 4 // (2 if kind == "bf16" else 1)
        for i, name in enumerate(a):
            values = numbers(np.ascontiguousarray(warp.read(name, U32)).view(np.uint8).reshape(LANES, 4), kind)
            for e in range(each):
                A[g + 8 * (i % 2), 4 * each * (i // 2) + each * t + e] = values[:, e]
    else:
        A = _operand(warp, a, 16 * (warp.index % 4) + np.arange(16), kind)
    product, adds = A @ B.T, bool(warp.read(p, bool)[0])
    dtype: Any = np.int32 if kind == "int8" else np.float32
    for i, name in enumerate(d):
        part = product[g + 8 * (i % 4 // 2), 8 * (i // 4) + 2 * t + i % 2]
        old = warp.read(name, dtype).astype(np.float64) if adds else 0.0
        warp.write(name, (part + old).astype(dtype))


def _stmatrix(warp: Warp, op: str, args: list[Any]) -> None:
    """x4.trans: lane 4 g + t of register i holds rows 2 t, 2 t + 1 of column g of matrix i; lane l names a row."""
    warp.need_all(op)
    at = warp.cta.shared.index(warp.address(args[0], U32), 16)
    for i, name in enumerate(args[1]):
        pairs = warp.read(name, U32).view(np.uint16).reshape(8, 4, 2)  # [g, t, part]
        matrix = np.ascontiguousarray(pairs.reshape(8, 8).T)  # row 2 t + part, column g
        warp.cta.shared.bytes[at[8 * i : 8 * i + 8]] = matrix.view(np.uint8)


def _widen(warp: Warp, op: str, args: list[Any]) -> None:
    codes = np.ascontiguousarray(warp.read(args[1], np.uint16)).view(np.uint8).reshape(LANES, 2)
    halves = numbers(codes, "e4m3").astype(np.float16)
    warp.write(args[0], np.ascontiguousarray(halves).view(U32)[:, 0])


def _from_half(warp: Warp, op: str, args: list[Any]) -> None:
    warp.write(args[0], warp.read(args[1], np.uint16).view(np.float16).astype(np.float32))


def _mov_predicate(warp: Warp, op: str, args: list[Any]) -> None:
    known = args[1] in warp.registers
    warp.write(args[0], warp.read(args[1], bool) if known else np.full(LANES, int(args[1]) != 0))


def _mov_64(warp: Warp, op: str, args: list[Any]) -> None:
    """The two halves of a word apart or together; else an ordinary move."""
    if isinstance(args[1], list):
        low, high = (warp.read(a, U32).astype(U64) for a in args[1])
        warp.write(args[0], low | high << U64(32))
    elif isinstance(args[0], list):
        word = warp.read(args[1], U64)
        for name, part in zip(args[0], (word & U64(0xFFFFFFFF), word >> U64(32)), strict=True):
            warp.write(name, part.astype(U32))
    else:
        mov(warp, op, args)


def _bar(warp: Warp, op: str, args: list[Any]) -> bool | None:
    """A barrier whose name or count stands in a register."""
    return bar(warp, op, [str(int(warp.read(arg, U32)[0])) for arg in args])


def _bar_arrive(warp: Warp, op: str, args: list[Any]) -> None:
    arrive(warp, op, [str(int(warp.read(arg, U32)[0])) for arg in args])


def _cluster_barrier(warp: Warp, op: str, args: list[Any]) -> bool | None:
    warp.need_all(op)
    cluster: Cluster = warp.kernel.cluster  # type: ignore[attr-defined]
    if ".arrive" in op:
        cluster.arrived[id(warp)] += 1
        warp.cta.events += 1
        return None
    if min(cluster.arrived.values()) <= cluster.passed[id(warp)]:
        return False
    cluster.passed[id(warp)] += 1
    return None


PEER = 24  # bits of an address before the rank of the CTA it lies in, plus one


def _map_to_peer(warp: Warp, op: str, args: list[Any]) -> None:
    warp.write(args[0], warp.read(args[1], U32) | (warp.read(args[2], U32) + U32(1)) << U32(PEER))


def _send_to_peer(warp: Warp, op: str, args: list[Any]) -> None:
    """st.async, red.async.max: a word into a peer's shared memory, or the larger, counted by a barrier there."""
    cluster: Cluster = warp.kernel.cluster  # type: ignore[attr-defined]
    words = warp.read(args[1], U32)[warp.active]
    places, barriers = (warp.address(arg, U32)[warp.active].tolist() for arg in (args[0], args[2]))
    for place, barrier, word in zip(places, barriers, words, strict=True):
        cta = cluster.ctas[(place >> PEER) - 1]
        at = cta.shared.index(np.array([place & ((1 << PEER) - 1)]), 4)[0]
        if op.startswith("red"):
            word = max(word, np.ascontiguousarray(cta.shared.bytes[at]).view(U32)[0])
        cta.shared.bytes[at] = np.array([word]).view(np.uint8)
        counts = cta.barriers[barrier & ((1 << PEER) - 1)]
        counts.bytes -= 4
        counts.settle()
        cta.events += 1


def _arrive_at_peer(warp: Warp, op: str, args: list[Any]) -> None:
    cluster: Cluster = warp.kernel.cluster  # type: ignore[attr-defined]
    for address in warp.address(args[1], U32)[warp.active].tolist():
        cta = cluster.ctas[(address >> PEER) - 1]
        barrier = cta.barriers[address & ((1 << PEER) - 1)]
        barrier.pending -= 1
        assert barrier.pending >= 0, "more arrivals than expected"
        barrier.settle()
        cta.events += 1


def _load_acquire(warp: Warp, op: str, args: list[Any]) -> None:
    memory_op(warp, "ld.global." + op.split(".")[-1], args)
    warp.yields = True  # it may be waiting for another CTA


def _atomic_add(warp: Warp, op: str, args: list[Any]) -> None:
    addresses, by = warp.address(args[1]), warp.read(args[2], np.int32)
    old = np.zeros(LANES, dtype=np.int32)
    for lane in np.flatnonzero(warp.active):
        at = warp.memory.index(addresses[lane : lane + 1], 4)
        old[lane] = np.ascontiguousarray(warp.memory.bytes[at]).view(np.int32)[0, 0]
        warp.memory.bytes[at] = np.array([[old[lane] + by[lane]]], dtype=np.int32).view(np.uint8)
    warp.write(args[0], old)
    warp.cta.events += 1


def _increment(warp: Warp, op: str, args: list[Any]) -> None:
    """red.add: as atom.add, whose result nobody takes."""
    addresses, by = warp.address(args[0]), warp.read(args[1], np.int32)
    for lane in np.flatnonzero(warp.active):
        at = warp.memory.index(addresses[lane : lane + 1], 4)
        old = np.ascontiguousarray(warp.memory.bytes[at]).view(np.int32)
        warp.memory.bytes[at] = (old + by[lane]).astype(np.int32).view(np.uint8)
    warp.cta.events += 1


HANDLERS[:0] = [
    (r"barrier\.cluster\..*", _cluster_barrier),
    (r"mapa\..*", _map_to_peer),
    (r"mbarrier\.arrive\.shared::cluster\.b64", _arrive_at_peer),
    (r"st\.async\.shared::cluster\..*|red\.async\..*\.max\.u32", _send_to_peer),
    (r"ld\.(acquire|relaxed)\..*", _load_acquire),
    (r"red\.release\.gpu\.global\.add\.s32", _increment),
    (r"bar\.arrive|barrier(\.cta)?\.arrive", _bar_arrive),
    (r"atom\.add\..*", _atomic_add),
    (r"bar\.sync|barrier\.sync.*", _bar),
    (r"mov\.b64", _mov_64),
    (r"mov\.pred", _mov_predicate),
    (r"cp\.async\.bulk\.tensor\..*", _tensor_copy),
    (r"wgmma\.mma_async\..*", _wgmma),
    (r"stmatrix\..*", _stmatrix),
    (r"cvt\.rn\.f16x2\.e4m3x2", _widen),
    (r"cvt\.f32\.f16", _from_half),
    (r"rsqrt\..*", unary(lambda x: np.float32(1.0) / np.sqrt(x))),
    (r"wgmma\.(fence|commit_group|wait_group)\..*|setmaxnreg\..*", nothing),
]
