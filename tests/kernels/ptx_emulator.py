"""Runs a kernel's PTX on a CPU, so that kernels can be tested where there is no GPU.

Warps of 32 lanes in numpy, each lane with its own program counter: of the lanes of a warp those with the smallest
counter go on, so that they meet again where branches join. Warps take turns when they wait. Global and shared memory
are bytes with a map of what may be touched: reading or writing anything else is an error, and so is a warp-wide
instruction that some lanes miss. Bulk copies arrive late, shared memory begins as NaN. Products of matrices are exact
before they are rounded to float32; approximate functions are exact to float32. What ptxas makes of the PTX, timing and
memory order are not modelled.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .ptx_instructions import handler
from .ptx_memory import LANES, SHARED_BASE, Address, Cta, Memory, Tensor, deliver, descriptor
from .ptx_numbers import F32, S32
from .ptx_warp import Warp


@dataclass
class Instruction:
    guard: tuple[str, bool] | None  # predicate, negated
    op: str
    args: list[Any]


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
                data = np.uint64(address).tobytes() if is_bare else descriptor(address, argument)
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
                run(warps[warp])
            deliver(cta, memory, draw)
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


def run(warp: Warp) -> None:
    """Go on until the warp waits or ends."""
    warp.yields = False
    while not warp.yields and warp.alive.any():
        counter = int(warp.counters[warp.alive].min())
        warp.lanes = warp.alive & (warp.counters == counter)
        warp.is_whole = bool(warp.lanes.all())
        _step(warp, warp.kernel.code[counter], counter)


def _step(warp: Warp, instruction: Instruction, counter: int) -> None:
    active = warp.lanes
    if instruction.guard is not None:
        name, negated = instruction.guard
        active = active & (warp.registers[name] != negated)
    warp.active = active
    warp.counters[warp.lanes] = counter + 1
    op = instruction.op
    if op.startswith("bra"):
        warp.counters[active] = warp.kernel.labels[instruction.args[0]]
        return
    if not active.any():
        return
    if op in ("ret", "exit"):
        warp.alive &= ~active
        warp.cta.events += 1
        return
    if handler(op)(warp, op, instruction.args) is False:  # must be tried again
        warp.counters[warp.lanes] = counter
        warp.yields = True
