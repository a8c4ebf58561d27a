"""The producers' own rounding code, run in numpy on rows of values, against atom/quant bit for bit."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from atom.kernels.producer_config import producer_config
from atom.quant.formats import get_format
from atom.quant.presets import get_scheme
from atom.quant.rounding import code_values, quantize
from atom.quant.schemes import TensorSpec

from .linear_schemes import linear_scheme
from .machine_code import needs_dsl
from .uncompiled import uncompiled

pytestmark = [
    needs_dsl,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy tells of overflow
]


def as_e4m3(x: Any) -> Tensor:
    """cvt.rn.satfinite.e4m3x2.f32"""
    return torch.tensor(float(x), dtype=torch.float32).clamp(-448, 448).to(torch.float8_e4m3fn)


def encoder(name: str) -> Any:
    """The ProducerEncode of a preset's activation, without the compiler; `group_max` is the caller's business."""
    module = uncompiled(
        "producer_encode_sm90",
        BFloat16=lambda x: torch.tensor(float(x)).bfloat16().item(),
        reciprocal_of_normal=lambda x: np.float32(1.0) / np.float32(x),
        round_to_e4m3=lambda x: np.float32(as_e4m3(x).float().item()),
        pack_e4m3x2=lambda low, high: np.uint32(int(bits(low)) | int(bits(high)) << 8),
        as_bits=lambda x: np.float32(x).view(np.uint32),
        multiply_exactly=np.multiply,
        multiply_add=lambda a, b, c: np.float32(np.float64(a) * np.float64(b) + np.float64(c)),
        clamp_s16x2=clamp_s16x2,
        add_max=lambda a, b, c: max(np.uint32(a) + np.uint32(b), np.uint32(c)),
        from_bits=lambda x: np.uint32(x).view(np.float32),
        pick_bytes=pick_bytes,
    )
    linear = linear_scheme(name)
    made = module.ProducerEncode()
    made.config = producer_config("plain", linear, torch.bfloat16, 256, linear.reorder, False, tokens=1)
    return made


def pick_bytes(low: Any, high: Any, selector: Any) -> Any:
    """prmt"""
    both = int(low) | int(high) << 32
    return np.uint32(sum((both >> 8 * (int(selector) >> 4 * i & 15) & 255) << 8 * i for i in range(4)))


def clamp_s16x2(pair: Any, high: Any) -> Any:
    """min.relu.s16x2"""
    a, b = (np.array([word], np.uint32).view(np.int16) for word in (pair, high))
    return np.maximum(np.minimum(a, b), 0).astype(np.int16).view(np.uint32)[0]


def bits(x: Any) -> int:
    return int(as_e4m3(x).view(torch.uint8).item())


def rows() -> Tensor:
    """Rows of 128 with what rounding can stumble over: ties, zeros, one huge value, the ends of the range."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 128, generator=generator)
    x[1] = 0
    x[2] = torch.arange(128) / 16 - 4  # many ties
    x[3, ::7] *= 1e4
    x[4] *= 1e-30
    x[5] *= 1e36
    x[6, 16:] = 0
    x[7] = x[7].bfloat16().float()
    x[8] = torch.tensor([6.0, -0.25, 0.25, 0.75, 1.25, 2.5, 3.5, 5.0]).repeat(16)
    x[9] *= torch.exp2(torch.arange(-127.0, -123.0)).repeat_interleave(32)  # scales at the end of their range
    return x


def as_numbers(row: Tensor) -> list[Any]:
    return [np.float32(v) for v in row.tolist()]


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "nvint4"])
def test_small_groups(name: str) -> None:
    """What is written as bfloat16 is code x group scale; what is written as the token's scale is the outer one."""
    made = encoder(name)
    spec = get_scheme(name).activation
    assert spec is not None and spec.group_size is not None
    x = rows()
    wanted = quantize(x, spec)
    size, fmt = spec.group_size, get_format(spec.format)
    values = code_values(wanted.codes, fmt) * wanted.scale.scale.repeat_interleave(size, 1)
    assert torch.equal(values.bfloat16().float(), values), "value x scale is exact in bfloat16"
    for row in range(x.shape[0]):
        numbers = as_numbers(x[row])
        outer = np.float32(1.0)
        if spec.scale_format == "e4m3":
            outer = made.outer_scale(max(abs(v) for v in numbers))
            assert wanted.scale.outer is not None and outer == wanted.scale.outer[row].item()
        for g in range(128 // size):
            group = numbers[size * g : size * (g + 1)]
            raw = made.raw(max(abs(v) for v in group), made.config.ratio)
            scale = made.small_scale(raw, np.float32(1.0) / outer)
            assert scale == wanted.scale.scale[row, g].item(), (row, g)
            inverse = made.inverse(np.float32(scale * outer))
            for at in range(0, size, 8):
                chunk = group[at : at + 8]
                made.round_small(chunk, scale, inverse)
                assert [float(v) for v in chunk] == values[row, size * g + at : size * g + at + 8].tolist()


@pytest.mark.parametrize("name", ["fp8", "w8a8", "w4a4-bf16"])
def test_codes_in_bytes(name: str) -> None:
    made = encoder(name)
    spec = linear_scheme(name).activation
    assert isinstance(spec, TensorSpec)
    x = rows()
    wanted = quantize(x, spec)
    for row in range(x.shape[0]):
        numbers = as_numbers(x[row])
        scale = made.scale(made.raw(max(abs(v) for v in numbers), made.config.ratio), spec.scale_format == "bf16")
        assert scale == wanted.scale.scale[row, 0].item()
        found = []
        for at in range(0, 128, 8):
            words: dict[int, Any] = {}
            if spec.format == "fp8_e4m3":
                made.encode_e4m3(numbers[at : at + 8], made.inverse(scale), words)
            else:
                made.encode(numbers[at : at + 8], made.inverse(scale), *made.config.code_range, words)
            found += [words[0], words[1]]
        assert np.array(found).astype(np.uint32).view(np.uint8).tolist() == wanted.codes[row].view(torch.uint8).tolist()


def test_codes_times_factors() -> None:
    """What is written of w4a4 is code x factor of the group, a byte, under one scale of the token."""
    made = encoder("w4a4")
    spec = linear_scheme("w4a4").activation
    assert isinstance(spec, TensorSpec)
    x = torch.cat((rows(), rows().flip(0) / 5, torch.randn(10, 128) * 3), 1)  # three groups a token
    wanted = quantize(x, spec)
    assert wanted.scale.outer is not None
    written = wanted.codes.float() * wanted.scale.scale.repeat_interleave(128, 1)
    for row in range(x.shape[0]):
        numbers = as_numbers(x[row])
        outer = made.outer_scale(max(abs(v) for v in numbers))
        assert outer == wanted.scale.outer[row].item()
        for g in range(3):
            group = numbers[128 * g : 128 * (g + 1)]
            raw = made.raw(max(abs(v) for v in group), made.config.ratio)
            factor = made.factor_scale(raw, np.float32(1.0) / outer)
            assert factor == wanted.scale.scale[row, g].item()
            words: dict[int, Any] = {}
            for at in range(0, 128, 8):
                inverse = made.inverse(factor * outer)
                made.encode_factored(group[at : at + 8], factor, inverse, *made.config.code_range, words)
                found = np.array([words[0], words[1]]).astype(np.uint32).view(np.int8)
                assert found.tolist() == written[row, 128 * g + at : 128 * g + at + 8].tolist()
