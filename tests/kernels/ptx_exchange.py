"""PTX instructions by which lanes, warps and memory exchange values: loads, shuffles, matrices, barriers, copies."""

import re
from typing import Any

import numpy as np

from .ptx_memory import LANES, Barrier
from .ptx_numbers import F32, S32, U32, U64, WIDTH, halves_bf16, halves_f16
from .ptx_warp import Warp


def memory_op(warp: Warp, op: str, args: list[Any]) -> None:
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


def atomic(warp: Warp, op: str, args: list[Any]) -> None:
    """atom.add: lanes one after another."""
    assert op.startswith("atom.add.") and op.endswith(".s32")
    old, value = np.zeros(LANES, S32), warp.read(args[2], S32)
    addresses = warp.address(args[1], U64)
    for lane in np.flatnonzero(warp.active):
        at = warp.memory.index(addresses[lane : lane + 1], 4)[0]
        old[lane] = warp.memory.bytes[at].view(S32)[0]
        warp.memory.bytes[at] = (old[lane : lane + 1] + value[lane]).view(np.uint8)
    warp.write(args[0], old)


def shfl(warp: Warp, op: str, args: list[Any]) -> None:
    warp.need_all(op)
    value = warp.read(args[1], U32)
    lanes = np.arange(LANES)
    offset = warp.read(args[2], U32).astype(np.int64)
    above = np.where(lanes >= offset, lanes - offset, lanes)
    source = {"idx": offset % LANES, "bfly": lanes ^ offset, "up": above}[op.split(".")[2]]
    warp.write(args[0].split("|")[0], value[source])


def redux(warp: Warp, op: str, args: list[Any]) -> None:
    warp.need_all(op)
    assert op.endswith("max.u32")
    warp.write(args[0], np.full(LANES, warp.read(args[1], U32).max()))


def vote(warp: Warp, op: str, args: list[Any]) -> None:
    warp.need_all(op)
    assert ".any." in op
    warp.write(args[0], np.full(LANES, warp.read(args[1], bool).any()))


def elect(warp: Warp, op: str, args: list[Any]) -> None:
    warp.need_all(op)
    lane, predicate = args[0].split("|")
    warp.write(lane, np.zeros(LANES, U32))
    warp.write(predicate, np.arange(LANES) == 0)


def movmatrix(warp: Warp, op: str, args: list[Any]) -> None:
    warp.need_all(op)
    matrix = warp.read(args[1], U32).view(np.uint16).reshape(8, 8)  # row g holds columns 2t, 2t + 1 of lanes 4g + t
    warp.write(args[0], np.ascontiguousarray(matrix.T).view(U32).reshape(LANES))


def ldmatrix(warp: Warp, op: str, args: list[Any]) -> None:
    """x4, not transposed: lanes 8 i ... 8 i + 7 give the rows of matrix i."""
    warp.need_all(op)
    assert ".x4." in op and "trans" not in op
    at = warp.cta.shared.index(warp.address(args[1], U32), 16)  # [32, 16 bytes]
    rows = np.ascontiguousarray(warp.cta.shared.bytes[at]).view(U32)  # [32, 4]
    for i, name in enumerate(args[0]):
        warp.write(
            name, rows[8 * i : 8 * i + 8].reshape(LANES).copy()
        )  # lane 4 g + t holds columns 2 t, 2 t + 1 of row g


def mma(warp: Warp, op: str, args: list[Any]) -> None:
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


def bar(warp: Warp, op: str, args: list[Any]) -> bool | None:
    warp.need_all(op)
    name = int(warp.read(args[0], U32)[0])
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


def arrive(warp: Warp, op: str, args: list[Any]) -> None:
    """bar.arrive: counted, and not kept; it stands among those that wait as ~warp."""
    warp.need_all(op)
    name, count, cta = int(args[0]), int(args[1]) // LANES, warp.cta
    waiting = cta.waiting.setdefault(name, set())
    waiting.add(~warp.index)
    cta.events += 1
    if len(waiting) == count:
        cta.passed.setdefault(name, set()).update(w for w in waiting if w >= 0)
        waiting.clear()


def mbarrier(warp: Warp, op: str, args: list[Any]) -> None:
    cta = warp.cta
    action = op.split(".")[1]
    if action == "init":
        for address in warp.address(args[0], U32)[warp.active]:
            count = int(warp.read(args[1], U32)[0])
            cta.barriers[int(address)] = Barrier(count, count)
        return
    waits = action in ("try_wait", "test_wait")
    where = args[0] if waits and args[0].startswith("[") else next(a for a in args if a.startswith("["))
    addresses = warp.address(where, U32)[warp.active]
    if waits:
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


def count(warp: Warp, op: str, args: list[Any]) -> None:
    """red.shared.add: lanes that meet in one place add one after another."""
    shared = warp.cta.shared
    at, adds = shared.index(warp.address(args[0], U32)[warp.active], 4), warp.read(args[1], S32)[warp.active]
    for place, add in zip(at, adds, strict=True):
        shared.bytes[place] = (np.ascontiguousarray(shared.bytes[place]).view(S32) + add).view(np.uint8)


def bulk(warp: Warp, op: str, args: list[Any]) -> None:
    targets, barriers = (warp.address(a, U32)[warp.active] for a in (args[0], args[3]))
    sources, sizes = warp.address(args[1])[warp.active], warp.read(args[2], U32)[warp.active]
    for copy in zip(targets.tolist(), sources.tolist(), sizes.tolist(), barriers.tolist(), strict=True):
        warp.cta.copies.append(copy)
        warp.cta.events += 1


def nothing(warp: Warp, op: str, args: list[Any]) -> None:
    pass
