"""What PTX instructions compute, each lane for itself."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .ptx_memory import LANES
from .ptx_numbers import F32, S32, S64, TYPES, U32, U64, e4m3, from_bf16, halves_bf16, to_bf16
from .ptx_warp import Warp


def binary(function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[Warp, str, list[Any]], None]:
    def run(warp: Warp, op: str, args: list[Any]) -> None:
        dtype = TYPES[op.split(".")[-1]]
        with np.errstate(all="ignore"):
            warp.write(args[0], function(warp.read(args[1], dtype), warp.read(args[2], dtype)).astype(dtype))

    return run


def unary(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Warp, str, list[Any]], None]:
    def run(warp: Warp, op: str, args: list[Any]) -> None:
        dtype = TYPES[op.split(".")[-1]]
        with np.errstate(all="ignore"):
            warp.write(args[0], function(warp.read(args[1], dtype)).astype(dtype))

    return run


WIDER = {"s16": (np.int16, S32), "u16": (np.uint16, U32), "s32": (S32, S64), "u32": (U32, U64)}


def wide(warp: Warp, op: str, args: list[Any]) -> None:
    narrow, wide = WIDER[op.split(".")[-1]]
    product = warp.read(args[1], narrow).astype(wide) * warp.read(args[2], narrow).astype(wide)
    if len(args) == 4:
        product = product + warp.read(args[3], wide)
    warp.write(args[0], product)


def high(warp: Warp, op: str, args: list[Any]) -> None:
    narrow, wide = WIDER[op.split(".")[-1]]
    product = warp.read(args[1], narrow).astype(wide) * warp.read(args[2], narrow).astype(wide)
    warp.write(args[0], (product >> wide(8 * np.dtype(narrow).itemsize)).astype(narrow))


def mad(warp: Warp, op: str, args: list[Any]) -> None:
    dtype = TYPES[op.split(".")[-1]]
    a, b, c = (warp.read(x, dtype) for x in args[1:])
    with np.errstate(all="ignore"):
        warp.write(args[0], a * b + c)


def fma(warp: Warp, op: str, args: list[Any]) -> None:
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


def bf16x2(warp: Warp, op: str, args: list[Any]) -> None:
    """24 bits are enough that rounding to float32 first changes nothing."""
    function = PAIRS[op.split(".")[0]]
    (a0, a1), (b0, b1) = halves_bf16(warp.read(args[1], U32)), halves_bf16(warp.read(args[2], U32))
    with np.errstate(all="ignore"):
        warp.write(args[0], to_bf16(function(a0, b0)) | to_bf16(function(a1, b1)) << U32(16))


def add_bf16(warp: Warp, op: str, args: list[Any]) -> None:
    a, b = (from_bf16(warp.read(x, np.uint16)) for x in args[1:])
    warp.write(args[0], to_bf16(a + b).astype(np.uint16))


def shift(left: bool) -> Callable[[Warp, str, list[Any]], None]:
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


def funnel(warp: Warp, op: str, args: list[Any]) -> None:
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


def setp(warp: Warp, op: str, args: list[Any]) -> None:
    _, relation, kind = op.split(".")
    dtype = TYPES[kind]
    warp.write(args[0], COMPARE[relation](warp.read(args[1], dtype), warp.read(args[2], dtype)))


def selp(warp: Warp, op: str, args: list[Any]) -> None:
    dtype = TYPES[op.split(".")[-1]]
    warp.write(args[0], np.where(warp.read(args[3], bool), warp.read(args[1], dtype), warp.read(args[2], dtype)))


def prmt(warp: Warp, op: str, args: list[Any]) -> None:
    a, b, selector = (warp.read(x, U32) for x in args[1:])
    source = np.stack([(w >> U32(8 * i)) & U32(255) for w in (a, b) for i in range(4)], -1)
    found = np.zeros(LANES, dtype=U32)
    for i in range(4):
        nibble = (selector >> U32(4 * i)) & U32(15)
        assert (nibble < 8).all(), "prmt with signs is not modelled"
        found |= source[np.arange(LANES), nibble] << U32(8 * i)
    warp.write(args[0], found)


def mov(warp: Warp, op: str, args: list[Any]) -> None:
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


def cvt(warp: Warp, op: str, args: list[Any]) -> None:
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


def s16x2(warp: Warp, op: str, args: list[Any]) -> None:
    low, high = (
        PAIRS[op.split(".")[0]](*(half(warp.read(x, U32)).astype(np.int16) for x in args[1:])).astype(np.uint16)
        for half in (lambda word: word & U32(0xFFFF), lambda word: word >> U32(16))
    )
    if ".relu" in op:
        low, high = (np.where(half >> 15, 0, half).astype(np.uint16) for half in (low, high))
    warp.write(args[0], low.astype(U32) | high.astype(U32) << U32(16))


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    return (np.sign(a) * np.sign(b) * (np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64)))).astype(a.dtype)
