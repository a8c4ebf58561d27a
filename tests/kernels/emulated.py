"""The GEMM and the producers as plain arithmetic on what their launches are given: a GPU's numbers without one.

The GEMM decodes packed units with the kernel's own code (uncompiled.py) and multiplies in float64; a producer rounds
with atom/quant. Both read and write exactly the tensors that a launch gets, and count launches.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from atom.kernels import gemm, producers
from atom.kernels.gated import gated_activation
from atom.kernels.gemm_config import GemmConfig
from atom.kernels.gemm_kinds import KINDS
from atom.kernels.gemm_pack import PackedWeight, fragment_index
from atom.kernels.norm import rms_norm
from atom.kernels.producers import Plan, QuantizingProducer
from atom.quant.formats import get_format
from atom.quant.granularity import Token
from atom.quant.rotation import rotate
from atom.quant.rounding import code_values, quantize

from .uncompiled import uncompiled

Words = Any  # numpy uint32, one for each thread


def as_floats(words: Words) -> tuple[np.ndarray, np.ndarray]:
    """The two bfloat16 of each word, the low half first, as float64."""
    low, high = (words << 16) & np.uint32(0xFFFF0000), words & np.uint32(0xFFFF0000)
    return low.view(np.float32).astype(np.float64), high.view(np.float32).astype(np.float64)


def as_words(low: np.ndarray, high: np.ndarray) -> Words:
    """Two float64 arrays as words of bfloat16, which must hold them exactly."""
    words = np.zeros(low.shape, np.uint32)
    for values, shift in ((low, 16), (high, 0)):
        bits = values.astype(np.float32).view(np.uint32)
        assert not (bits & 0xFFFF).any() and (values.astype(np.float32) == values).all(), "not a bfloat16"
        words |= bits >> np.uint32(shift)
    return words


def multiply_add(a: Words, b: Words, c: Words | None = None) -> Words:
    a, b = np.broadcast_arrays(np.asarray(a, np.uint32), np.asarray(b, np.uint32))
    pairs = [x * y for x, y in zip(as_floats(a.copy()), as_floats(b.copy()), strict=True)]
    if c is not None:
        wide = np.broadcast_to(np.asarray(c, np.uint32), a.shape).copy()
        pairs = [x + z for x, z in zip(pairs, as_floats(wide), strict=True)]
    return as_words(*pairs)


def select_bytes(word: Words, selector: int) -> Words:
    picked = np.zeros_like(word)
    for place in range(4):
        which = (int(selector) >> (4 * place)) & 15
        byte = (word >> np.uint32(8 * which)) & np.uint32(255) if which < 4 else np.uint32(0)
        picked |= byte << np.uint32(8 * place)
    return picked


def decoder() -> Callable[[str], Any]:
    """decoder(kind) of gemm_decode_sm90.py, whose `decode` runs on numpy words."""
    instructions = {"multiply_bf16x2": multiply_add, "multiply_add_bf16x2": multiply_add, "select_bytes": select_bytes}
    found: Callable[[str], Any] = uncompiled("gemm_decode_sm90", **instructions).decoder
    return found


def registers(packed: PackedWeight, tile: int, unit: int, decode: Any) -> list[Words]:
    """The A registers that the 128 threads of a warpgroup hold for one unit."""
    codec = decode(packed.kind)
    words = packed.units[tile, unit].contiguous().numpy().view(np.uint32)
    thread = np.arange(128)
    raw = [words[(j // 4) * 512 + thread * 4 + j % 4] for j in range(8)]  # two loads of 16 bytes
    row = thread // 32 * 16 + thread % 32 // 4
    if packed.kind == "int4_uint4":
        factors = words[1024:].view(np.uint8)
        scale = [factors[row + 8 * r].astype(np.uint32) for r in range(2)]
    elif packed.kind == "int4_uint4_g32":
        scale = [words[1024 + thread // 32 * 8 + thread % 32 // 4]]
    elif packed.kind == "int4_uint4_bf16":
        factors = words[1024:].view(np.uint16)
        scale = [factors[row + 8 * r].astype(np.uint32) * np.uint32(0x00010001) for r in range(2)]
    elif packed.kind in ("int4", "int4_bf16"):
        scale = []  # the promotion multiplies with it
    else:
        at = 1024 + (thread // 32 * 8 + thread % 32 // 4) * codec.scale_words
        scale = [words[at + i] for i in range(codec.scale_words)]
    out: list[Words] = [None] * (16 if KINDS[packed.kind].operand == "int8" else 32)
    codec.decode(raw, scale, out)
    return out


def matrix(words: list[Words], operand: str) -> np.ndarray:
    """The 64 x 128 operand that wgmma reads: PTX ISA, matrix A of m64nNk16 (bf16) and m64nNk32 (s8)."""
    found = np.full((64, 128), np.nan)
    for t in range(128):
        g, q = t % 32 // 4, t % 4
        for i, word in enumerate(words):
            step, r = divmod(i, 4)
            row = 16 * (t // 32) + g + 8 * (r % 2)
            if operand == "bf16":
                column = 16 * step + 8 * (r // 2) + 2 * q
                low, high = as_floats(word[t : t + 1].copy())
                found[row, column : column + 2] = low[0], high[0]
            else:
                column = 32 * step + 16 * (r // 2) + 4 * q
                found[row, column : column + 4] = word[t : t + 1].view(np.int8)
    return found


def operand_matrix(packed: PackedWeight, decode: Any) -> np.ndarray:
    """The whole weight as wgmma reads it: [padded N, padded K]."""
    tiles, units = packed.units.shape[:2]
    kind = KINDS[packed.kind]
    return np.block(
        [[matrix(registers(packed, t, u, decode), kind.operand) for u in range(units)] for t in range(tiles)]
    )


class EmulatedGpu:
    """Stands in for compiled kernels from `install` on; `launches` says what ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: list[str] = []
        self.decode = decoder()
        self.weights: dict[int, Any] = {}
        plan = QuantizingProducer.plan

        def emulated_plan(producer: QuantizingProducer, *problem: Any) -> Plan:
            return dataclasses.replace(plan(producer, *problem), kernel=self.producer(producer))

        monkeypatch.setattr(producers, "producer_kernel", lambda config: None)
        monkeypatch.setattr(QuantizingProducer, "plan", emulated_plan)
        monkeypatch.setattr(gemm, "gemm_kernel", self.gemm)

    def producer(self, producer: QuantizingProducer) -> Callable[..., None]:
        linear = producer.linear

        def launch(
            x: Any, other: Any, total: Any, gain: Any, columns: Any, codes: Any, scales: Any, *rest: Any
        ) -> None:
            self.launches.append(producer.source)
            codes.view(torch.int8).fill_(0x7F)
            scales.fill_(float("nan"))
            if producer.source == "add_norm":
                x = total.copy_(x + other)
            if producer.source in ("silu", "gelu_tanh"):
                values = gated_activation(x.float(), other.float(), producer.source)  # type: ignore[arg-type]
            else:
                values = x.float() if producer.gain is None else rms_norm(x, producer.gain, producer.eps)
            if producer.perm is not None:
                values = values[:, producer.perm.long()]
            spec, normal = linear.activation, x.shape[1] - linear.outliers.count
            if spec is None:
                codes.copy_(values)
                return
            turned = values[:, :normal]
            if linear.rotation is not None:
                turned = rotate(turned, linear.rotation)
            found, tokens = quantize(turned, spec), x.shape[0]
            if spec.scale_format in ("e4m3", "e8m0"):  # code x scale as bfloat16
                expanded = found.scale.scale.repeat_interleave(spec.group_size, 1)[:, : x.shape[1]]
                codes.copy_(code_values(found.codes, get_format(spec.format)) * expanded)
                if found.scale.outer is not None:
                    scales[0] = found.scale.outer[:, 0]
                return
            codes.zero_()
            codes[:, :normal] = found.codes.view(torch.int8)
            groups = -(-normal // 128)
            at = groups * 128
            if not spec.group_size:
                scales[0] = found.scale.scale[:, 0]
                return
            if found.scale.outer is not None:
                factors = found.scale.scale.to(torch.int8).repeat_interleave(spec.group_size or 0, 1)
                codes[:, :normal] *= factors[:, :normal]
                scales[0] = found.scale.outer[:, 0]
                groups = 1
            else:
                scales[:groups, :tokens] = found.scale.scale.T
            if linear.outliers.count:
                tail_spec = linear.outliers.spec(Token(), dynamic=True)
                assert tail_spec is not None
                tail = quantize(values[:, normal:], tail_spec)
                codes[:, at : at + linear.outliers.count] = tail.codes
                scales[groups:, :tokens] = tail.scale.scale.T

        return launch

    def gemm(self, config: GemmConfig) -> Callable[..., None]:
        kind = KINDS[config.weight]

        def launch(units: Any, x: Any, scales: Any, channel: Any, bias: Any, y: Any, *rest: Any) -> None:
            self.launches.append("gemm")
            (M, N), int4_units = y.shape, rest[1]
            assert config.aligned == (N % 8 == 0) and config.tile_m * -(-M // config.tile_m) >= M
            if kind.operand == "e4m3":
                x = x.view(torch.float8_e4m3fn).float()
            x = torch.nn.functional.pad(x.double(), (0, -x.shape[1] % 64))
            key = units.data_ptr()
            if key not in self.weights:
                self.weights[key] = list(self.operands(config.weight, units, int4_units))
            total, at = torch.zeros(M, units.shape[0] * 64, dtype=torch.float64), 0
            for unit, (weight, row_scale) in enumerate(self.weights[key]):
                part = x[:, at : at + weight.shape[1]] @ weight[:, : x.shape[1] - at].T
                at += weight.shape[1]
                if config.token_scales == "group":
                    part *= scales[unit, :M, None].double()
                if config.scaled_early and unit < int4_units:
                    row_scale = torch.nn.functional.pad(channel.double(), (0, part.shape[1] - N))
                if config.scaled_early:
                    part *= scales[int(unit >= int4_units), :M, None].double()
                total += part * row_scale
            if config.token_scales == "token" and not config.scaled_early:
                total *= scales[0, :M, None].double()
            total = total[:, :N]
            if kind.channel_scaled and not config.scaled_early:
                total *= channel.double()
            y.copy_(total + bias.double() if config.bias else total)

        return launch

    def operands(self, name: str, units: torch.Tensor, int4_units: int) -> Any:
        """(weight [padded N, columns], scale of its rows) of each unit along K."""
        raw = units.view(torch.uint8)
        packed = PackedWeight(name, raw, int4_units, torch.empty(0), 0)
        tiles, count = raw.shape[:2]
        kind = KINDS[name]
        for unit in range(count):
            scale = torch.ones(tiles * 64, dtype=torch.float64)
            if (kind.promoted and not kind.is_verbatim) or unit >= int4_units:
                bytes_ = raw[:, unit, kind.code_bytes : kind.code_bytes + 128].contiguous()
                scale = bytes_.view(torch.bfloat16).double().flatten()
            if kind.is_verbatim:
                weight = torch.cat([unswizzled(raw[t, unit], kind.operand) for t in range(tiles)])
            elif unit < int4_units:
                blocks = [matrix(registers(packed, t, unit, self.decode), kind.operand) for t in range(tiles)]
                weight = torch.from_numpy(np.concatenate(blocks))
            else:
                weight = torch.cat([outlier_columns(raw[t, unit]) for t in range(tiles)])
            yield weight, scale


def unswizzled(unit: torch.Tensor, operand: str) -> torch.Tensor:
    """A unit of codes that are multiplied as they stand: float64 [64, 128]."""
    row, column = torch.meshgrid(torch.arange(64), torch.arange(128), indexing="ij")
    codes = unit[row * 128 + ((column // 16) ^ (row % 8)) * 16 + column % 16]
    return codes.view(torch.int8 if operand == "int8" else torch.float8_e4m3fn).double()


def outlier_columns(unit: torch.Tensor) -> torch.Tensor:
    """A unit of INT8 outlier columns: float64 [64, 64]."""
    words = unit[:4096].view(2, 128, 4, 4).permute(1, 0, 2, 3).reshape(128, 8, 4)  # [thread, word, byte]
    found = torch.zeros(64, 64, dtype=torch.float64)
    found[fragment_index(64)] = words.view(torch.int8).double()
    return found
