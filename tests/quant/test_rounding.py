"""Rounding against independent references, its bounds, and its extremes."""

import math
from bisect import bisect_left
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atom.quant.formats import get_format
from atom.quant.granularity import Channel, Group
from atom.quant.presets import PRESETS
from atom.quant.rounding import (
    Scale,
    choose_scale,
    code_values,
    decode,
    dequantize,
    encode,
    encode_float,
    expand_scale,
    fake_quantize,
    quantize,
)
from atom.quant.schemes import TensorSpec

from .cases import FLOAT_ERROR, INPUTS, SPECS

every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
FINITE = st.floats(-1e4, 1e4, width=32)


@every_spec
def test_codes_and_fake_quantize_agree_on_every_input(spec: TensorSpec) -> None:
    for name, x in INPUTS.items():
        q = quantize(x, spec)
        values = dequantize(q, spec)
        assert torch.equal(values, fake_quantize(x, spec)), name
        assert torch.equal(decode(encode(x, q.scale, spec), q.scale, spec), values), name
        assert values.shape == x.shape and values.dtype == torch.float32, name
        assert torch.isfinite(values).all(), name
        assert q.scale.scale.shape == spec.granularity.scale_shape(tuple(x.shape)), name
        assert (q.scale.scale > 0).all() or (spec.scale_rule == "signed" and (q.scale.scale != 0).all()), name


@every_spec
def test_zero_is_exact(spec: TensorSpec) -> None:
    x = INPUTS["randn"].clone()
    x[:, ::3] = 0
    assert (fake_quantize(x, spec)[:, ::3] == 0).all()
    assert (fake_quantize(INPUTS["zeros"], spec) == 0).all()


def check_bound(x: torch.Tensor, spec: TensorSpec) -> None:
    """Inside the clip range the error is half a step; outside, the value is the end of the range."""
    fmt = get_format(spec.format)
    scale = choose_scale(x, spec)
    s = expand_scale(scale.effective, x.shape[-1], spec).double()
    x = x.double()
    got = fake_quantize(x, spec).double()
    error = (got - x).abs()
    slack = 1e-6 * x.abs()  # reciprocal and product, each rounded once in float32
    if fmt.is_integer:
        qmin, qmax = fmt.code_range(spec.symmetric)
        zero = 0.0 if scale.zero_point is None else expand_scale(scale.zero_point, x.shape[-1], spec).double()
        ends = (qmin - zero) * s, (qmax - zero) * s
        low, high = torch.minimum(*ends), torch.maximum(*ends)
        bound = s.abs() / 2
    else:
        low, high = -fmt.max * s, fmt.max * s
        relative, step = FLOAT_ERROR[fmt.name]
        bound = torch.maximum(relative * x.abs(), step * s)
    inside = (x >= low) & (x <= high)
    assert (error <= bound + slack)[inside].all()
    outside = torch.where(x < low, low, high).broadcast_to(x.shape) if not inside.all() else got
    assert torch.allclose(got[~inside], outside[~inside], rtol=1e-6, atol=0)


@every_spec
def test_error_bound(spec: TensorSpec) -> None:
    for name in (
        "randn",
        "no-multiple-of-128",
        "constant-rows",
        "all-positive",
        "all-negative",
        "bfloat16",
        "one-huge",
    ):
        check_bound(INPUTS[name], spec)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(SPECS)), st.lists(FINITE, min_size=1, max_size=40))
def test_error_bound_of_any_values(name: str, values: list[float]) -> None:
    check_bound(torch.tensor([values]), SPECS[name])


def is_idempotent(spec: TensorSpec) -> bool:
    """Where the largest code is always used and the scale, of few bits, is found again from it to the bit.

    Not so for clipped, asymmetric, two-level and float32 scales, 16-bit values, and integers under E8M0 (-8 * 2^e).
    """
    found_again = spec.scale_format in ("bf16", "fp16", "e8m0") and spec.outer is None and spec.clip == 1.0
    integer_e8m0 = spec.scale_format == "e8m0" and get_format(spec.format).is_integer
    return found_again and spec.symmetric and not integer_e8m0 and get_format(spec.format).bits < 16


@pytest.mark.parametrize("name", [n for n, s in SPECS.items() if is_idempotent(s)])
def test_rounding_again_changes_nothing(name: str) -> None:
    for kind in ("randn", "no-multiple-of-128", "constant-rows", "zeros", "bfloat16"):
        once = fake_quantize(INPUTS[kind], SPECS[name])
        assert torch.equal(fake_quantize(once, SPECS[name]), once), kind


@every_spec
def test_decoding_and_encoding_again_keeps_the_codes(spec: TensorSpec) -> None:
    q = quantize(INPUTS["randn"], spec)
    again = encode(dequantize(q, spec), q.scale, spec)
    assert torch.equal(code_values(again, get_format(spec.format)), code_values(q.codes, get_format(spec.format)))


def integer_loop(x: list[float], spec: TensorSpec, scale: float, zero: float) -> list[float]:
    """Pure Python: float32 reciprocal and product (each rounded from double), ties to even, clamp."""
    qmin, qmax = get_format(spec.format).code_range(spec.symmetric)
    f32 = lambda v: torch.tensor(v, dtype=torch.float64).float().item()  # noqa: E731
    reciprocal = f32(1.0 / scale)
    return [f32((min(max(round(f32(v * reciprocal)) + zero, qmin), qmax) - zero) * scale) for v in x]


@pytest.mark.parametrize("fmt", ["int3", "int4", "int8"])
@pytest.mark.parametrize("symmetric", [True, False])
@settings(max_examples=15, deadline=None)
@given(values=st.lists(FINITE, min_size=1, max_size=20))
def test_integers_against_a_python_loop(fmt: str, symmetric: bool, values: list[float]) -> None:
    spec = TensorSpec(fmt, Channel(), symmetric=symmetric)
    row = torch.tensor([values])
    scale = choose_scale(row, spec)
    zero = 0.0 if scale.zero_point is None else scale.zero_point.item()
    bits = get_format(fmt).bits
    low, high = min(0.0, *values, 0.0), max(0.0, *values, 0.0)
    raw = (high - low) / (2**bits - 1) if not symmetric else max(-low, high) / (2 ** (bits - 1) - 1)
    assert scale.scale.item() == pytest.approx(raw, rel=2.0**-8) or raw < 2.0**-120
    assert fake_quantize(row, spec)[0].tolist() == integer_loop(row[0].tolist(), spec, scale.scale.item(), zero)


def grid(exponent_bits: int, mantissa_bits: int, largest: float) -> list[float]:
    """The non-negative values of a float format by its definition, in code order."""
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for e in range(2**exponent_bits):
        for m in range(2**mantissa_bits):
            fraction = m / 2**mantissa_bits
            values.append((fraction if e == 0 else 1 + fraction) * 2.0 ** (max(e, 1) - bias))
    return [v for v in values if v <= largest]


def nearest(x: float, values: list[float]) -> int:
    """Index of the nearest value: brute force, ties to the even code, saturating."""
    distances = [abs(min(abs(x), values[-1]) - v) for v in values]
    best = min(distances)
    ties = [i for i, d in enumerate(distances) if d == best]
    return next((i for i in ties if i % 2 == 0), ties[0])


GRIDS = {"e2m1": grid(2, 1, 6.0), "fp8_e4m3": grid(4, 3, 448.0), "fp8_e5m2": grid(5, 2, 57344.0)}


@pytest.mark.parametrize("name", GRIDS)
def test_small_floats_against_brute_force(name: str) -> None:
    """All values, all midpoints (ties), a little beside both, saturation, both signs, random values."""
    values = GRIDS[name]
    middles = [(a + b) / 2 for a, b in pairwise(values)]
    marks = torch.tensor([*values, *middles, values[-1] * 2, 1e30])
    up = torch.nextafter(marks, torch.tensor(math.inf))
    down = torch.nextafter(marks, torch.tensor(-math.inf))
    random = torch.randn(300, generator=torch.Generator().manual_seed(1)) * values[-1] / 3
    x = torch.cat((marks, up, down, random))
    x = torch.cat((x, -x))
    fmt = get_format(name)
    codes = encode_float(x, fmt)
    expected = torch.tensor([nearest(v, values) for v in x.tolist()], dtype=torch.uint8)
    sign = torch.signbit(x).to(torch.uint8) << (fmt.bits - 1)
    assert torch.equal(codes.view(torch.uint8), expected | sign)
    assert torch.equal(code_values(codes, fmt), torch.tensor(values)[expected.long()].copysign(x))


def test_e2m1_grid_is_the_published_one() -> None:
    assert GRIDS["e2m1"] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert bisect_left(GRIDS["fp8_e4m3"], 448.0) == 126 and bisect_left(GRIDS["fp8_e5m2"], 57344.0) == 123


@pytest.mark.parametrize("searched_spec", [n for n, s in SPECS.items() if s.clip == "mse"])
def test_searched_clip_is_never_worse(searched_spec: str) -> None:
    spec = SPECS[searched_spec]
    for name in ("randn", "no-multiple-of-128", "all-positive"):
        x = INPUTS[name]
        searched = (fake_quantize(x, spec) - x).square()
        plain = (fake_quantize(x, replace(spec, clip=1.0)) - x).square()
        size = spec.group_size or x.shape[-1]
        short = -x.shape[-1] % size
        by_group = [torch.nn.functional.pad(e, (0, short)).unflatten(-1, (-1, size)).sum(-1) for e in (searched, plain)]
        assert (by_group[0] <= by_group[1] * (1 + 1e-6)).all(), name


def test_searched_clip_finds_a_better_one() -> None:
    x = INPUTS["no-multiple-of-128"]
    spec = TensorSpec("int4", Group(128), clip="mse")
    error = (fake_quantize(x, spec) - x).square().sum()
    assert error < 0.95 * (fake_quantize(x, replace(spec, clip=1.0)) - x).square().sum()


@pytest.mark.parametrize(("bits", "symmetric_max", "levels"), [(3, 3, 7), (4, 7, 15), (8, 127, 255)])
def test_scale_rules(bits: int, symmetric_max: int, levels: int) -> None:
    """Atom: clip * max / qmax for activations; GPTQ's grid for weights: clip * 2 max / (2^bits - 1)."""
    x = torch.tensor([[0.5, -3.0, 2.0]])
    for rule, expected in (("max", 0.85 * 3 / symmetric_max), ("range", 0.85 * 2 * 3 / levels)):
        spec = TensorSpec(f"int{bits}", Channel(), clip=0.85, scale_format="fp32", scale_rule=rule)
        assert choose_scale(x, spec).scale.item() == pytest.approx(expected, rel=1e-6)


def test_e8m0_scale_is_the_ocp_rule() -> None:
    """2^(floor(log2(max)) - 2) for E2M1, whose largest value has exponent 2."""
    spec = TensorSpec("e2m1", Channel(), scale_format="e8m0")
    for largest in (1.0, 1.99, 2.0, 6.0, 7.99, 8.0, 1e-20, 1e20):
        scale = choose_scale(torch.tensor([[largest, -largest / 3]]), spec).scale.item()
        assert scale == 2.0 ** (math.floor(math.log2(torch.tensor(largest).item())) - 2)


def test_nvfp4_scales_fill_e4m3() -> None:
    """The outer scale maps the largest group scale to 448, NVFP4's convention."""
    x = INPUTS["no-multiple-of-128"]
    scale = choose_scale(x, PRESETS["nvfp4"].weight)
    assert scale.outer is not None
    assert scale.outer.item() == pytest.approx(x.abs().max().item() / (6 * 448), rel=1e-6)
    assert scale.scale.max() == 448
    uint4 = choose_scale(x, TensorSpec("int4", Group(16), scale_format="uint4", outer="channel"))
    assert (uint4.scale.amax(-1) == 10).all() and (uint4.scale == uint4.scale.round()).all()
    dynamic = TensorSpec("int4", Group(16), dynamic=True, scale_format="uint4", outer="token")
    assert (choose_scale(x, dynamic).scale.amax(-1) == 15).all()
    spec = TensorSpec("int4", Group(16), scale_format="uint4", outer="channel")
    grown = choose_scale(x * 1.5, spec, uint4.outer)  # as error feedback makes weights grow after the outer scale
    assert (grown.scale.amax(-1) == 15).all()


def test_outer_scale_can_be_given() -> None:
    spec = PRESETS["nvfp4"].weight
    x = INPUTS["no-multiple-of-128"]
    whole = choose_scale(x, spec)
    part = choose_scale(x[:, 16:32], spec, outer=whole.outer)
    assert torch.equal(part.scale, whole.scale[:, 1:2])


def test_two_level_scales_survive_subnormals_beside_zeros() -> None:
    """A tiny outer scale times E4M3's smallest must stay invertible: 0 * inf would be NaN."""
    for spec in (PRESETS["nvfp4"].weight, PRESETS["nvfp4"].activation, PRESETS["nvint4"].weight):
        assert spec is not None
        assert (fake_quantize(INPUTS["subnormal-beside-zeros"], spec)[:, 16:] == 0).all()


@every_spec
def test_largest_values_saturate(spec: TensorSpec) -> None:
    """Never infinite; a symmetric grid with a wide scale still reaches half of the value."""
    for name in ("largest-float32", "largest-bfloat16"):
        x = INPUTS[name].float()
        got = fake_quantize(x, spec)
        assert torch.isfinite(got).all()
        if spec.symmetric and spec.scale_format in ("fp32", "bf16"):
            assert (got.abs() >= x.abs() / 2).all() and torch.equal(got.sign(), x.sign())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_by_name(bad: float) -> None:
    x = torch.ones(2, 16)
    x[1, 3] = bad
    with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp holds NaN or infinity"):
        quantize(x, SPECS["w4a4-weight"], "model.layers.3.mlp")


def test_float64_beyond_float32_is_refused() -> None:
    with pytest.raises(ValueError, match="w holds NaN or infinity"):
        quantize(torch.full((1, 4), 1e300, dtype=torch.float64), SPECS["w4a4-weight"], "w")


def test_one_outlier_harms_only_its_group() -> None:
    x = INPUTS["no-multiple-of-128"].clone()
    x[0, 40] = 1e30
    spec = TensorSpec("int4", Group(16))
    got, plain = fake_quantize(x, spec), fake_quantize(INPUTS["no-multiple-of-128"], spec)
    harmed = (got != plain).nonzero()
    assert (harmed[:, 0] == 0).all() and ((harmed[:, 1] >= 32) & (harmed[:, 1] < 48)).all()


def test_given_scales_broadcast() -> None:
    spec = TensorSpec("int8", Group(16))
    x = INPUTS["randn"]
    codes = encode(x, Scale(torch.full((3, 3), 0.25)), spec)
    assert torch.equal(codes, (x / 0.25).round().clamp(-128, 127).to(torch.int8))


def test_a_signed_scale_gives_the_largest_value_the_lowest_code() -> None:
    spec = TensorSpec("int4", Group(4), scale_rule="signed", scale_format="fp32")
    x = torch.tensor([[8.0, -3.0, 1.0, 0.0, -8.0, 3.0, 1.0, 0.0, 4.0, -4.0, 0.0, 2.0]])
    q = quantize(x, spec)
    assert q.scale.scale.tolist() == [[-1.0, 1.0, 0.5]]  # of two alike the negative value has the lowest code
    assert q.codes.tolist() == [[-8, 3, -1, 0, -8, 3, 1, 0, 7, -8, 0, 4]]


@pytest.mark.parametrize(("size", "share"), [(16, 0.82), (32, 0.81), (128, 0.80)])
def test_signed_scales_leave_less_error_at_the_same_bits(size: int, share: float) -> None:
    x = torch.randn(200, 8 * size, generator=torch.Generator().manual_seed(0))
    errors = [
        float((fake_quantize(x, TensorSpec("int4", Group(size), scale_rule=rule)) - x).square().mean())
        for rule in ("signed", "max")
    ]
    assert errors[0] < share * errors[1]


@pytest.mark.parametrize("fields", [{"scale_format": "uint4", "outer": "channel"}, {"symmetric": False}])
def test_signed_scales_need_a_sign(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="use 'max'"):
        TensorSpec("int4", Group(16), scale_rule="signed", **fields)


def test_four_or_six_takes_the_better_scale() -> None:
    spec = TensorSpec("e2m1", Group(4), scale_format="fp32", scale_rule="four_six")
    x = torch.tensor([[8.0, 6.0, 0.0, 0.0, 6.0, 4.0, 3.0, 0.0]])  # 8 and 6 lie at 4 and 3, or at 6 and 4.5
    q = quantize(x, spec)
    assert q.scale.scale.tolist() == [[2.0, 1.0]]
    assert torch.equal(dequantize(q, spec), x)
    random = torch.randn(100, 160, generator=torch.Generator().manual_seed(0))
    errors = {}
    for rule in ("max", "four_six"):
        nvfp4 = TensorSpec("e2m1", Group(16), scale_format="e4m3", outer="tensor", scale_rule=rule)
        errors[rule] = float((fake_quantize(random, nvfp4) - random).square().mean())
    assert errors["four_six"] < 0.85 * errors["max"]
    with pytest.raises(ValueError, match="e2m1's values 4 and 6, got int4"):
        TensorSpec("int4", Group(16), scale_rule="four_six")
