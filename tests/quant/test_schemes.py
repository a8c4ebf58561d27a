"""Schemes: presets as decided, JSON there and back, refusals with their remedies, effective bits."""

import json
from dataclasses import replace
from typing import Any

import pytest

from atom.quant.formats import FORMATS, get_format
from atom.quant.granularity import Channel, Group, Head, Tensor, Token, parse_granularity
from atom.quant.presets import KV4, KV8, KV_SUFFIXES, PRESETS, get_scheme, kv_name
from atom.quant.schemes import CacheOverride, LinearScheme, OutlierSpec, Override, RotationSpec, Scheme, TensorSpec
from atom.quant.switches import Switches

from .cases import LINEARS, SPECS

INT4 = TensorSpec("int4", Group(128))
OVERRIDDEN = replace(
    PRESETS["w4a4"],
    rotation=RotationSpec("block_hadamard", 64),
    overrides=(
        Override("*.mlp.down_proj", LinearScheme(TensorSpec("int8", Channel(), clip="mse"))),
        Override("*.mlp.*", LinearScheme()),
    ),
)


@pytest.mark.parametrize("scheme", [*PRESETS.values(), OVERRIDDEN], ids=[*PRESETS, "overridden"])
@pytest.mark.parametrize("kv", KV_SUFFIXES)
def test_json_round_trip(scheme: Scheme, kv: str) -> None:
    scheme = scheme.with_kv(KV_SUFFIXES[kv])
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_spec_round_trip_and_print(spec: TensorSpec) -> None:
    assert TensorSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.format in str(spec) and str(spec.granularity) in str(spec) and hash(spec) is not None


@pytest.mark.parametrize("path", [(), ("weight",), ("outliers",), ("rotation",), ("overrides", 0)])
def test_unknown_keys_are_refused(path: tuple[str | int, ...]) -> None:
    data: Any = OVERRIDDEN.to_dict()
    inner = data
    for key in path:
        inner = inner[key]
    inner["sparkle"] = 1
    with pytest.raises(ValueError, match=r"does not know sparkle; it has .*upgrade, or quantize again"):
        Scheme.from_dict(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "int5"}, "unknown format 'int5'; use one of int2, int3, int4"),
        ({"format": "int2"}, "one level above zero; use symmetric=False"),
        ({"format": "e8m0"}, "holds scales, not values"),
        ({"scale_format": "fp12"}, "unknown scale format 'fp12'; use one of"),
        ({"format": "e2m1", "symmetric": False}, "asymmetric e2m1 does not exist"),
        ({"symmetric": False, "outer": "channel"}, "asymmetric tensor has no outer scale"),
        ({"format": "e2m1", "scale_rule": "range"}, "counts integer levels"),
        ({"scale_format": "uint4"}, "set outer='channel'"),
        ({"clip": "mse", "dynamic": True}, "too slow at run time"),
        ({"clip": 0.0}, r"in \(0, 1\], got 0.0"),
        ({"clip": 1.5}, r"in \(0, 1\], got 1.5"),
        ({"clip": float("nan")}, r"in \(0, 1\]"),
        ({"scale_rule": "median"}, "unknown scale rule 'median'; use one of max, range"),
        ({"outer": "layer"}, "unknown outer scale 'layer'; use one of tensor, channel, token"),
        ({"granularity": Tensor(), "outer": "channel"}, "needs no outer scale"),
        ({"scale_format": "e8m0", "outer": "tensor"}, "e8m0 scales follow the maximum alone"),
        ({"scale_format": "e8m0", "symmetric": False}, "e8m0 scales follow the maximum alone"),
        ({"scale_format": "e8m0", "scale_rule": "range"}, "e8m0 scales follow the maximum alone"),
    ],
)
def test_refused_specs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(INT4, **change)


def test_refused_parts() -> None:
    for count in (-16, 8, 100):
        with pytest.raises(ValueError, match="multiple of 16 from 0"):
            OutlierSpec(count)
    with pytest.raises(ValueError, match="try 96"):
        OutlierSpec(100)
    with pytest.raises(ValueError, match="int8, fp8_e4m3 or bf16, got 'int4'"):
        OutlierSpec(16, "int4")
    with pytest.raises(ValueError, match="power of two from 2, got 100; use 128"):
        RotationSpec("block_hadamard", 100)
    with pytest.raises(ValueError, match="unknown rotation"):
        RotationSpec("givens")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="need a quantized weight"):
        Scheme("a", activation=replace(INT4, dynamic=True))
    with pytest.raises(ValueError, match="set reorder=True"):
        Scheme("a", INT4, outliers=OutlierSpec(16))
    with pytest.raises(ValueError, match="activation scales are chosen at run time; set dynamic=True"):
        Scheme("a", INT4, INT4)
    with pytest.raises(ValueError, match="kv scales are chosen at run time"):
        Scheme("a", kv=INT4)


def test_granularity() -> None:
    for g in (Tensor(), Channel(), Token(), Head(), Group(1), Group(128)):
        assert parse_granularity(str(g)) == g
    assert Group(128).scale_shape((3, 448)) == (3, 4) and Group(128).scale_shape((2, 3, 5)) == (2, 3, 1)
    assert Tensor().scale_shape((2, 3, 4)) == (1, 1, 1) and Head().scale_shape((2, 3, 4)) == (2, 3, 1)
    for bad in ("group", "group:0", "group:-1", "row", ""):
        with pytest.raises(ValueError, match=r"unknown granularity .*group:128"):
            parse_granularity(bad)
    with pytest.raises(ValueError, match="at least one column"):
        Group(0)


def test_formats() -> None:
    assert get_format("int4").code_range(True) == (-8, 7) and get_format("int8").code_range(False) == (0, 255)
    with pytest.raises(ValueError, match="no integer codes"):
        get_format("e2m1").code_range(True)
    assert all(get_format(name).name == name for name in FORMATS)


def test_atoms_bits_are_the_published_ones() -> None:
    """4.25 bits for weights, activations and cache at K = 4096 and head_dim 128 (arXiv:2310.19102)."""
    scheme = Switches(group_scales="bf16").apply(PRESETS["w4a4"])
    assert scheme.weight_bits(4096) == pytest.approx(4.25, abs=0.005)
    assert scheme.activation_bits(4096) == pytest.approx(4.25, abs=0.005)
    assert scheme.kv_bits(128) == 4.25
    with_factors = PRESETS["w4a4"]
    assert with_factors.weight_bits(4096) == pytest.approx((3968 * 4 + 31 * 4 + 32 + 128 * 8 + 16) / 4096)
    assert with_factors.activation_bits(4096) == with_factors.weight_bits(4096)


@pytest.mark.parametrize(
    ("name", "weight", "activation", "kv"),
    [
        ("w4a8", 4 + 4 / 128 + 32 / 4096, 8 + 32 / 4096, 4.25),
        ("w4a16", 4 + 4 / 128 + 32 / 4096, 16, 16),
        ("w8a8", 8 + 32 / 4096, 8 + 32 / 4096, 8.25),
        ("fp8", 8 + 32 / 4096, 8 + 32 / 4096, 8.125),
        ("nvfp4", 4.5, 4.5 + 32 / 4096, 8.125),
        ("mxfp4", 4.25, 4.25, 8.125),
        ("nvint4", 4.5, 4.5 + 32 / 4096, 4.25),
        ("bf16", 16, 16, 16),
    ],
)
def test_effective_bits(name: str, weight: float, activation: float, kv: float) -> None:
    scheme = PRESETS[name]
    found = (scheme.weight_bits(4096), scheme.activation_bits(4096), scheme.kv_bits(128))
    assert found == pytest.approx((weight, activation, kv))


def test_a_recent_window_is_counted_written_and_read() -> None:
    scheme = replace(PRESETS["w4a8"], kv_recent=16)
    assert scheme.kv_bits(128) == 4.25 + 0.125 and scheme.kv_bits(128, tokens=4096) == 4.25 + 0.0625
    assert scheme.kv_bits(128, tokens=8) == 4.25 + 16
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert "kv_recent" not in PRESETS["w4a8"].to_dict()
    assert get_scheme("w4a8+kv4r16") == scheme and kv_name(scheme) == "int4r16"
    assert get_scheme("w4a8+kv4r0").kv_recent == 0
    for name in ("w4a8+kv4r", "w4a8+kv4r8", "w4a8+r16", "w4a8+kv4r16+kv8"):
        with pytest.raises(ValueError, match="use"):
            get_scheme(name)
    assert scheme.with_kv(KV8).kv_recent == 16 and scheme.with_kv(None).kv_recent == 0
    with pytest.raises(ValueError, match="kv is None; give kv"):
        replace(PRESETS["bf16"], kv_recent=16)


def test_single_layers_have_caches_of_their_own() -> None:
    scheme = replace(PRESETS["w4a4"], kv_overrides=(CacheOverride(1, KV8),))
    assert [scheme.kv_of(layer) for layer in range(3)] == [KV4, KV8, KV4]
    assert scheme.kv_bits(128) == 4.25 and scheme.kv_bits(128, 2) == pytest.approx((4.25 + 8.25) / 2)
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert kv_name(scheme) == "int4+int8"
    assert "kv_overrides" not in PRESETS["w4a4"].to_dict() and scheme.with_kv(KV4) == PRESETS["w4a4"]
    with pytest.raises(ValueError, match="kv is None; give kv"):
        replace(PRESETS["bf16"], kv_overrides=(CacheOverride(1, KV8),))
    with pytest.raises(ValueError, match="kv of layer 1 scales are chosen at run time"):
        replace(PRESETS["w4a4"], kv_overrides=(CacheOverride(1, replace(KV8, dynamic=False)),))


def test_formats_have_labels() -> None:
    labels = [PRESETS[name].default_linear.label for name in ("w4a4", "w4a8-hadamard", "w8a8", "w4a16", "bf16")]
    assert labels == ["w4a4+128", "w4a8 h64", "w8a8", "w4a16", "w16a16"]
    assert OVERRIDDEN.is_mixed and not PRESETS["w4a4"].is_mixed
    assert replace(PRESETS["w4a4"], kv_overrides=(CacheOverride(1, KV8),)).is_mixed


@pytest.mark.parametrize("name", PRESETS)
def test_names_users_type(name: str) -> None:
    assert get_scheme(name) is PRESETS[name] and PRESETS[name].name == name
    for suffix, spec in KV_SUFFIXES.items():
        scheme = get_scheme(f"{name}+{suffix}")
        assert scheme.kv == spec and scheme.name == name and scheme.weight == PRESETS[name].weight
    assert [kv_name(get_scheme(f"{name}+{s}")) for s in KV_SUFFIXES] == [
        *("int2", "int3", "int4", "int8", "fp8", "bf16")
    ]


@pytest.mark.parametrize("text", ["w5a5", "", "w4a4+kv5", "w4a4+kv4+kv8", "w4a4+"])
def test_unknown_names_list_the_known(text: str) -> None:
    with pytest.raises(ValueError, match=r"unknown (scheme|KV format) .*kv4, .*kv8"):
        get_scheme(text)


def test_overrides_first_match_wins() -> None:
    down = OVERRIDDEN.for_linear("model.layers.3.mlp.down_proj")
    assert down.weight is not None and down.weight.format == "int8"
    assert OVERRIDDEN.for_linear("model.layers.3.mlp.up_proj") == LinearScheme()
    assert OVERRIDDEN.for_linear("model.layers.3.self_attn.q_proj") == OVERRIDDEN.default_linear
    assert Scheme("a", overrides=OVERRIDDEN.overrides).is_quantized and not PRESETS["bf16"].is_quantized
    assert all(linear.weight is not None for linear in LINEARS.values())
