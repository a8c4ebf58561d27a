"""The methods that docs/accuracy-methods.md compares, each as a scheme and how its weights are found.

Every one stands for W4A4 and for W4A8, under a cache given to all of them; some stand for a 4-bit cache alone.
Published methods are as published where a scheme can say that: Atom's constants, QuaRot's rotations with groups of 128,
NVFP4's own scales.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from atom.quant.granularity import Channel, Group, Token
from atom.quant.presets import get_scheme
from atom.quant.schemes import LinearScheme, OutlierSpec, Override, RotationSpec, Scheme, TensorSpec

from .config import CalibrationConfig
from .flatquant import ALL, Learned
from .ladder import PAPER_ACTIVATION_CLIP, PAPER_WEIGHT_CLIP

Bits = Literal["kv4", "w4a4", "w4a8"]
A8 = TensorSpec("int8", Token(), dynamic=True, scale_format="fp32")


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    scheme    with a 16-bit cache, or with its own where the cache is all that is compared
    changes   fields of CalibrationConfig that it sets
    learned   what flatquant.py learns, in memory; where it is nothing, a checkpoint is written, loaded and run
    """

    name: str
    scheme: Scheme
    changes: dict[str, Any] = field(default_factory=dict)
    learned: tuple[Learned, ...] = ()

    def config(self, base: CalibrationConfig) -> CalibrationConfig:
        return replace(base, **self.changes)


def methods(bits: Bits) -> dict[str, Method]:
    """All methods for weights of 4 bits and activations of 4 or 8, or for the cache, by name, full precision first."""
    found = _caches() if bits == "kv4" else [make(bits) for make in _MAKERS]
    return {method.name: method for method in found if method is not None}


def _fp(bits: Bits) -> Method:
    return Method("fp", get_scheme("bf16"))


def _rtn(bits: Bits) -> Method:
    """One scale a weight row and token, the largest magnitude, rounded to nearest."""
    weight, activation = TensorSpec("int4", Channel()), TensorSpec("int4", Token(), dynamic=True)
    return Method("rtn", Scheme(bits, weight, _activation(bits, activation)), {"gptq": False, "clip": "constant"})


def _atom(bits: Bits) -> Method:
    """Atom as published: order by energy, 128 INT8 outliers, groups of 128, clips 0.85 and 0.9, GPTQ.

    With 8-bit activations the paper's own W4A8 has the same weights; outliers are INT8 on both sides then.
    """
    weight = TensorSpec("int4", Group(128), clip=PAPER_WEIGHT_CLIP, scale_rule="range")
    activation = TensorSpec("int4", Group(128), dynamic=True, clip=PAPER_ACTIVATION_CLIP)
    scheme = Scheme(bits, weight, _activation(bits, activation), outliers=OutlierSpec(128), reorder=True)
    return Method("atom", scheme, {"clip": "constant"})


def _quarot(bits: Bits) -> Method:
    """QuaRot (arXiv:2404.00456) with groups of 128: the residual stream and values rotated in the weights, the inputs
    of o and down at run time, GPTQ, activations clipped at 0.9."""
    weight = TensorSpec("int4", Group(128), clip="mse", scale_rule="range")
    activation = TensorSpec("int4", Group(128), dynamic=True, clip=PAPER_ACTIVATION_CLIP)
    scheme = rotated_online(Scheme(bits, weight, _activation(bits, activation)), RotationSpec("hadamard"))
    return Method("quarot", scheme, {"clip": "constant", "rotate": "residual"})


def _quarot_token(bits: Bits) -> Method:
    """The same rotations under one scale a weight row and token, to be read beside `rtn` and `flatquant`."""
    weight, activation = (
        TensorSpec("int4", Channel(), clip="mse", scale_rule="range"),
        TensorSpec("int4", Token(), dynamic=True),
    )
    activation = replace(activation, clip=PAPER_ACTIVATION_CLIP)
    scheme = rotated_online(Scheme(bits, weight, _activation(bits, activation)), RotationSpec("hadamard"))
    return Method("quarot-token", scheme, {"clip": "constant", "rotate": "residual"})


def _quarot_token_rtn(bits: Bits) -> Method:
    """The same rounded to nearest, as `flatquant` is: what a learned transform has over a fixed one."""
    token = _quarot_token(bits)
    return replace(token, name="quarot-token-rtn", changes={**token.changes, "gptq": False})


def _flatquant(bits: Bits, name: str = "flatquant", learned: tuple[Learned, ...] = ALL) -> Method:
    """FlatQuant in small (flatquant.py): learned transforms and clips, one scale a weight row and token."""
    weight, activation = TensorSpec("int4", Channel()), TensorSpec("int4", Token(), dynamic=True)
    return Method(name, Scheme(bits, weight, _activation(bits, activation)), learned=learned)


def _flatquant_transforms(bits: Bits) -> Method:
    """The same with its transforms alone, and without them: which part of it helps most."""
    return _flatquant(bits, "flatquant-transforms", ("transforms",))


def _flatquant_rest(bits: Bits) -> Method:
    return _flatquant(bits, "flatquant-rest", ("factors", "clips"))


def _nvfp4_rtn(bits: Bits) -> Method | None:
    if bits == "w4a8":
        return None  # NVFP4 has no 8-bit activations
    return Method("nvfp4-rtn", get_scheme("nvfp4+kv16"), {"gptq": False})


def _nvfp4_gptq(bits: Bits) -> Method | None:
    """MR-GPTQ (arXiv:2509.23202) in its essentials: Hadamard blocks of a group's size, searched scales, GPTQ."""
    if bits == "w4a8":
        return None
    scheme = get_scheme("nvfp4+kv16")
    assert scheme.weight is not None
    scheme = replace(scheme, weight=replace(scheme.weight, clip="mse"), rotation=RotationSpec("block_hadamard", 16))
    return Method("nvfp4-gptq", scheme, {"balance": False, "rotate": "none"})


def _ours(bits: Bits) -> Method:
    """4.13 bits without outlier channels, as the kernels run them: groups of 32 under whole factors behind Hadamard
    blocks, balance, GPTQ, values turned, distillation."""
    return Method("ours", get_scheme(f"{bits}-hadamard+kv16"), {"distill_steps": 2000})


def _caches() -> list[Method]:
    """A 4-bit cache alone: rounded as keys come, as the paper does it before RoPE, and as ours."""
    plain = replace(get_scheme("bf16+kv4"), kv_offset="none", kv_rotation="none")
    return [
        _fp("kv4"),
        Method("rtn", plain),
        Method("atom", replace(plain, kv_pre_rope=True)),
        Method("ours", get_scheme("bf16+kv4"), {"rotate": "values", "distill_steps": 2000}),
    ]


_MAKERS: tuple[Callable[[Bits], Method | None], ...] = (
    _fp,
    _rtn,
    _atom,
    _quarot,
    _quarot_token,
    _quarot_token_rtn,
    _flatquant,
    _flatquant_transforms,
    _flatquant_rest,
    _nvfp4_rtn,
    _nvfp4_gptq,
    _ours,
)


def with_cache(scheme: Scheme, kv: str) -> Scheme:
    """`scheme` with the cache that the presets have under this suffix: kv4, kv8, kvfp8 or kv16."""
    cache = get_scheme(f"w4a4+{kv}")
    names = ("kv", "kv_offset", "kv_rotation", "kv_recent")
    return replace(scheme, **{name: getattr(cache, name) for name in names})


def rotated_online(scheme: Scheme, rotation: RotationSpec) -> Scheme:
    """`scheme` with the inputs of o and down rotated at run time, where a folded rotation does not reach."""
    linear: LinearScheme = replace(scheme.default_linear, rotation=rotation)
    return replace(scheme, overrides=tuple(Override(f"*.{name}", linear) for name in ("o_proj", "down_proj")))


def _activation(bits: Bits, four: TensorSpec) -> TensorSpec:
    return four if bits == "w4a4" else A8
