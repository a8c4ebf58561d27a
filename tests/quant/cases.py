"""The specs and inputs that the tests of this folder run over. New formats and presets are covered on arrival."""

from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from atom.quant.formats import FORMATS
from atom.quant.granularity import Channel, Granularity, Group
from atom.quant.granularity import Tensor as PerTensor
from atom.quant.presets import PRESETS
from atom.quant.schemes import SCALE_FORMATS, LinearScheme, OutlierSpec, RotationSpec, TensorSpec

VALUE_FORMATS = [f for f in FORMATS.values() if f.kind != "exponent"]
GRANULARITIES: tuple[Granularity, ...] = (PerTensor(), Channel(), Group(16))
OUTER_OF = {"uint4": "channel", "e4m3": "tensor"}  # the outer scale that makes a narrow scale format useful


def _specs() -> dict[str, TensorSpec]:
    """Every format, granularity and scale format; asymmetric, clipped and on GPTQ's grid where that exists."""
    specs: dict[str, TensorSpec] = {}
    for fmt, granularity, scale_format in product(VALUE_FORMATS, GRANULARITIES, SCALE_FORMATS):
        outer = OUTER_OF.get(scale_format) if isinstance(granularity, Group) else None
        if scale_format == "uint4" and outer is None:
            continue
        plain = {"scale_format": scale_format, "outer": outer}
        variants: dict[str, dict[str, object]] = {"": plain}
        if fmt.is_integer and scale_format in ("bf16", "fp32"):
            variants["-asym"] = {**plain, "symmetric": False}
            variants["-range"] = {**plain, "scale_rule": "range", "clip": 0.85}
        if fmt.name == "e2m1" and scale_format == "e4m3":
            variants["-four-six"] = {**plain, "scale_rule": "four_six"}
            variants["-four-six-mse"] = {**plain, "scale_rule": "four_six", "clip": "mse"}
        if fmt.is_integer and scale_format in ("bf16", "e4m3"):
            variants["-signed"] = {**plain, "scale_rule": "signed", "clip": 0.95}
        if isinstance(granularity, Group) and fmt.bits < 16:
            variants["-mse"] = {**plain, "clip": "mse"}
            if "-asym" in variants:
                variants["-asym-mse"] = {**variants["-asym"], "clip": "mse"}
        if fmt.name == "int2":  # asymmetric or not at all
            variants = {suffix: fields for suffix, fields in variants.items() if suffix.startswith("-asym")}
        for suffix, fields in variants.items():
            specs[f"{fmt.name}-{granularity}-{scale_format}{suffix}"] = TensorSpec(fmt.name, granularity, **fields)
    for name, scheme in PRESETS.items():
        for kind in ("weight", "activation", "kv"):
            if (spec := getattr(scheme, kind)) is not None:
                specs[f"{name}-{kind}"] = replace(spec, zero="whole")  # the other rule: test_mean_zero.py
    return specs


SPECS = _specs()
# Largest relative error of a normal value, and half the step of the subnormal ones, in units of the scale.
FLOAT_ERROR = {
    "e2m1": (1 / 4, 0.25),
    "fp8_e4m3": (2.0**-4, 2.0**-10),
    "fp8_e5m2": (2.0**-3, 2.0**-17),
    "bf16": (2.0**-8, 0.0),
    "fp16": (2.0**-11, 2.0**-25),
    "fp32": (2.0**-22, 0.0),
}


def inputs(rows: int = 3) -> dict[str, Tensor]:
    """Tensors [rows, K] of many kinds; K a multiple of the group, none, smaller than one, SmolLM2's 576 - 128."""
    g = torch.Generator().manual_seed(0)
    randn = torch.randn(rows, 37, generator=g)
    huge = randn.clone()
    huge[1, 5] = 1e30
    sign = torch.where(randn > 0, 1.0, -1.0)
    largest = torch.finfo(torch.float32).max
    return {
        "randn": randn,
        "one-group": torch.randn(rows, 16, generator=g),
        "smaller-than-a-group": torch.randn(rows, 5, generator=g),
        "one-column": torch.randn(rows, 1, generator=g),
        "no-multiple-of-128": torch.randn(rows, 448, generator=g),
        "zeros": torch.zeros(rows, 37),
        "minus-zeros": torch.full((rows, 37), -0.0),
        "one-huge": huge,
        "largest-float32": largest * sign,
        "largest-bfloat16": (torch.finfo(torch.bfloat16).max * sign).bfloat16(),
        "subnormal": randn * 1e-40,
        "subnormal-beside-zeros": torch.cat((torch.full((rows, 16), 1e-38), torch.zeros(rows, 16)), 1),
        "constant-rows": torch.full((rows, 37), 3.7),
        "all-positive": randn.abs() + 5,
        "all-negative": -randn.abs() - 5,
        "not-contiguous": torch.randn(37, rows, generator=g).T,
        "bfloat16": randn.bfloat16(),
        "float16": randn.half(),
        "float64": randn.double(),
        "three-axes": torch.randn(2, rows, 64, generator=g),
        "no-rows": torch.zeros(0, 37),
        "no-columns": torch.zeros(rows, 0),
    }


INPUTS = inputs()


def linear_schemes() -> dict[str, LinearScheme]:
    """Presets' linears with outliers that fit small sizes, and what no preset has."""
    schemes = {
        name: LinearScheme(s.weight, s.activation, OutlierSpec(16 if s.outliers.count else 0), s.rotation, s.reorder)
        for name, s in PRESETS.items()
        if s.weight is not None
    }
    int4 = TensorSpec("int4", Group(16))
    for fmt in ("int8", "fp8_e4m3", "bf16"):
        schemes[f"outliers-{fmt}"] = LinearScheme(int4, None, OutlierSpec(16, fmt), reorder=True)
    schemes["signed"] = LinearScheme(TensorSpec("int4", Group(16), scale_rule="signed", clip="mse"))
    schemes["rotated"] = LinearScheme(int4, rotation=RotationSpec("block_hadamard", 8))
    for fmt in ("int3", "int4", "int8"):
        schemes[f"asymmetric-{fmt}"] = LinearScheme(TensorSpec(fmt, Group(16), symmetric=False))
    schemes["two-level"] = LinearScheme(TensorSpec("int4", Group(16), scale_format="uint4", outer="channel"))
    schemes["tensor"] = LinearScheme(TensorSpec("fp8_e5m2", PerTensor(), scale_format="fp32"))
    schemes["fp16-scales"] = LinearScheme(TensorSpec("int4", Channel(), scale_format="fp16"))
    return schemes


LINEARS = linear_schemes()
