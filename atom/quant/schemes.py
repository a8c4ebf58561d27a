"""Schemes: how a model is quantized, as a frozen, printable value that is written into the checkpoint.

A scheme says what is *executed*: formats, granularities, clips, outlier channels, rotation. How the weights were
found (GPTQ or plain rounding, on which data) is calibration's business and stands in its report. The named presets
are in presets.py.
"""

from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from .formats import get_format
from .granularity import Granularity, Group, Tensor, parse_granularity

ScaleRule = Literal["max", "range", "signed", "four_six"]
KeyOffset = Literal["none", "bias", "mean", "centre"]
KeyRotation = Literal["none", "hadamard"]
Outer = Literal["tensor", "channel", "token"]
SIGNED_SCALES = ("fp32", "bf16", "fp16", "e4m3")
SCALE_FORMATS = {"fp32": 32, "bf16": 16, "fp16": 16, "e4m3": 8, "e8m0": 8, "uint4": 4}  # name -> bits of one scale


@dataclass(frozen=True)
class TensorSpec:
    """How one kind of tensor (weights, activations, keys and values) becomes codes and scales.

    format        name of a Format
    granularity   what one scale covers
    symmetric     x ~ scale * q, or x ~ scale * (q - zero_point) with unsigned codes (integers only)
    dynamic       scales are chosen at run time (activations, KV) or in calibration (weights)
    clip          share of the largest magnitude that the grid reaches, or "mse" to search it (static tensors only)
    scale_format  how a scale is stored; codes are chosen after the scale was rounded to it
    scale_rule    "max": scale = clip * max|x| / qmax; "range": clip * 2 max|x| / (2^bits - 1), GPTQ's grid (integers);
                  "signed": clip * max|x| / 2^(bits - 1), negative where the largest value is positive, so that it
                  takes the lowest code (integers); "four_six": as "max", or half as large again so that the largest
                  value lies at 4 instead of 6, whichever leaves less squared error (e2m1)
    outer         a second FP32 scale over the scales: one per tensor (NVFP4), channel or token, or None
    """

    format: str
    granularity: Granularity
    symmetric: bool = True
    dynamic: bool = False
    clip: float | Literal["mse"] = 1.0
    scale_format: str = "bf16"
    scale_rule: ScaleRule = "max"
    outer: Outer | None = None

    def __post_init__(self) -> None:
        fmt = get_format(self.format)
        if fmt.kind == "exponent":
            raise ValueError(f"{self.format} holds scales, not values; use it as scale_format with e2m1")
        if self.scale_format not in SCALE_FORMATS:
            raise ValueError(f"unknown scale format {self.scale_format!r}; use one of {', '.join(SCALE_FORMATS)}")
        if not self.symmetric and not fmt.is_integer:
            raise ValueError(f"asymmetric {self.format} does not exist; use an integer format or symmetric=True")
        if self.symmetric and fmt.is_integer and fmt.bits == 2:
            raise ValueError(f"symmetric {self.format} would have one level above zero; use symmetric=False")
        if not self.symmetric and self.outer is not None:
            raise ValueError("an asymmetric tensor has no outer scale; use symmetric=True or outer=None")
        if self.scale_rule not in get_args(ScaleRule):
            raise ValueError(f"unknown scale rule {self.scale_rule!r}; use one of {', '.join(get_args(ScaleRule))}")
        if self.outer is not None and self.outer not in get_args(Outer):
            raise ValueError(f"unknown outer scale {self.outer!r}; use one of {', '.join(get_args(Outer))}, or None")
        if self.outer is not None and isinstance(self.granularity, Tensor):
            raise ValueError(f"one scale per tensor needs no outer scale per {self.outer}; use groups, or outer=None")
        if self.scale_format == "e8m0" and (self.outer or not self.symmetric or self.scale_rule != "max"):
            raise ValueError("e8m0 scales follow the maximum alone; use symmetric=True, scale_rule='max', outer=None")
        if self.scale_rule == "range" and not fmt.is_integer:
            raise ValueError(f"scale_rule 'range' counts integer levels, {self.format} has none; use 'max'")
        if self.scale_rule == "four_six" and self.format != "e2m1":
            raise ValueError(f"scale_rule 'four_six' is about e2m1's values 4 and 6, got {self.format}; use 'max'")
        if self.scale_rule == "signed" and not (
            fmt.is_integer and self.symmetric and self.scale_format in SIGNED_SCALES
        ):
            raise ValueError(
                "scale_rule 'signed' needs symmetric integer codes under scales that have a sign "
                f"({', '.join(SIGNED_SCALES)}), got {self.format} under {self.scale_format}; use 'max'"
            )
        if self.scale_format == "uint4" and self.outer is None:
            raise ValueError("uint4 scales are multiples of an outer scale; set outer='channel'")
        if self.clip == "mse":
            if self.dynamic:
                raise ValueError("clip 'mse' is a search, too slow at run time; give dynamic tensors a number, 0.9 say")
        elif not 0.0 < self.clip <= 1.0:
            raise ValueError(f"clip is a share of the maximum in (0, 1], got {self.clip}; use 1.0 for none")

    @property
    def group_size(self) -> int | None:
        return self.granularity.size if isinstance(self.granularity, Group) else None

    def bits_per_value(self, columns: int) -> float:
        """Bits of one value of a row of `columns`, its share of scales, zero points and outer scales included."""
        if columns == 0:
            return 0.0
        scales = self.granularity.scale_shape((1, columns))[-1]
        per_scale = SCALE_FORMATS[self.scale_format] + (0 if self.symmetric else 16)
        row = scales * per_scale + (32 if self.outer in ("channel", "token") else 0)
        if isinstance(self.granularity, Tensor):
            row = 0
        return get_format(self.format).bits + row / columns

    def to_dict(self) -> dict[str, Any]:
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "TensorSpec":
        _refuse_unknown(cls, data)
        return cls(**{**data, "granularity": parse_granularity(data["granularity"])})

    def __str__(self) -> str:
        parts = [self.format, str(self.granularity)]
        parts += [] if self.symmetric else ["asym"]
        parts += [] if self.clip == 1.0 else [f"clip {self.clip}"]
        scale = self.scale_format if self.outer is None else f"{self.scale_format} under fp32 per {self.outer}"
        return ", ".join([*parts, f"{scale} scales"])


@dataclass(frozen=True)
class OutlierSpec:
    """The channels kept in higher precision: the last `count` after the permutation, one scale per row, no clip.

    `format` is int8, fp8_e4m3 or bf16 (kept as they are).
    """

    count: int = 0
    format: str = "int8"

    def __post_init__(self) -> None:
        if self.count < 0 or self.count % 16:
            raise ValueError(
                f"the outlier count is a multiple of 16 from 0, got {self.count}; try {max(0, self.count // 16) * 16}"
            )
        if self.format not in ("int8", "fp8_e4m3", "bf16"):
            raise ValueError(f"outliers can be int8, fp8_e4m3 or bf16, got {self.format!r}; use int8")

    def spec(self, granularity: Granularity, dynamic: bool) -> TensorSpec | None:
        """How the outlier columns are rounded, or None where they keep bf16."""
        return None if self.format == "bf16" else TensorSpec(self.format, granularity, dynamic=dynamic)

    @property
    def bits(self) -> int:
        return get_format(self.format).bits

    def to_dict(self) -> dict[str, Any]:
        return {"count": self.count, "format": self.format}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "OutlierSpec":
        _refuse_unknown(cls, data)
        return cls(**data)


@dataclass(frozen=True)
class RotationSpec:
    """An orthogonal transform of the normal columns of every linear's input, and of its weight's columns.

    kind   "block_hadamard": blocks of `block` columns, a tail shorter than a block stays as it is
           "hadamard": all normal columns at once (their number must be a Hadamard order)
    """

    kind: Literal["hadamard", "block_hadamard"]
    block: int = 128

    def __post_init__(self) -> None:
        if self.kind not in ("hadamard", "block_hadamard"):
            raise ValueError(f"unknown rotation {self.kind!r}; use hadamard or block_hadamard")
        if self.block < 2 or self.block & (self.block - 1):
            raise ValueError(f"a Hadamard block is a power of two from 2, got {self.block}; use 128")

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "block": self.block}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "RotationSpec":
        _refuse_unknown(cls, data)
        return cls(**data)


@dataclass(frozen=True)
class LinearScheme:
    """What one linear layer runs: a scheme after its overrides. `weight` None means full precision."""

    weight: TensorSpec | None = None
    activation: TensorSpec | None = None
    outliers: OutlierSpec = field(default_factory=OutlierSpec)
    rotation: RotationSpec | None = None
    reorder: bool = False
    residual: int = 0

    def __post_init__(self) -> None:
        if self.weight is None and (self.activation is not None or self.outliers.count or self.rotation is not None):
            raise ValueError("quantized activations, outliers or a rotation need a quantized weight; give `weight`")
        if self.outliers.count and not self.reorder:
            raise ValueError("outlier channels are the last after the permutation; set reorder=True")
        if self.residual < 0 or self.residual % 16:
            raise ValueError(f"residual channels are a multiple of 16 from 0, got {self.residual}; try 64")
        if self.residual and (self.activation is None or not self.reorder or self.rotation is not None):
            raise ValueError(
                "residual channels are the last normal ones after the permutation, of activations that are rounded and "
                "not rotated; set reorder=True, or residual=0"
            )

    def split(self, K: int) -> tuple[int, int]:
        """(normal columns, outlier columns) of a linear with K inputs."""
        if self.outliers.count >= K:
            raise ValueError(f"{self.outliers.count} outlier channels do not fit in {K} inputs; use fewer than {K}")
        return K - self.outliers.count, self.outliers.count


@dataclass(frozen=True)
class Override:
    """A different treatment of the linears whose full name matches `pattern` (shell wildcards)."""

    pattern: str
    linear: LinearScheme


@dataclass(frozen=True)
class CacheOverride:
    """Another format of the keys and values of one layer."""

    layer: int
    kv: TensorSpec


@dataclass(frozen=True)
class Scheme:
    """How a whole model is quantized. None for weight, activation or kv means full precision (16 bits).

    reorder        sort the input channels of every linear by energy, ascending; the last are the outliers
    residual       of so many of the last normal channels, what rounding leaves of an activation is rounded again in the
                   same format, and multiplied with the same weights: so many columns more in the product (ARCQuant)
    kv_pre_rope    keys are rounded before RoPE and rotated when read
    kv_offset      what keys are rounded less of: "none"; "centre", a constant after RoPE, measured in calibration, that
                   nobody needs back, since softmax does not see what all scores of a query have in common; or what is
                   added back when keys are read: "bias", that of their projection (Qwen2) where there is one, "mean",
                   the mean key of each channel before RoPE, measured in calibration
    kv_rotation    "hadamard" turns every head of keys, less their centre, and of queries after RoPE (keys.py);
                   their products stay the same
    overrides      first match wins
    kv_overrides   layers whose cache has another format than `kv`; offset and rotation are the same
    """

    name: str
    weight: TensorSpec | None = None
    activation: TensorSpec | None = None
    kv: TensorSpec | None = None
    outliers: OutlierSpec = field(default_factory=OutlierSpec)
    rotation: RotationSpec | None = None
    reorder: bool = False
    kv_pre_rope: bool = False
    kv_offset: KeyOffset = "bias"
    kv_rotation: KeyRotation = "none"
    overrides: tuple[Override, ...] = ()
    residual: int = 0
    kv_overrides: tuple[CacheOverride, ...] = ()

    def __post_init__(self) -> None:
        self.default_linear  # noqa: B018  its checks are ours too
        if self.kv_offset not in get_args(KeyOffset):
            raise ValueError(f"unknown kv_offset {self.kv_offset!r}; use one of {', '.join(get_args(KeyOffset))}")
        if self.kv_rotation not in get_args(KeyRotation):
            raise ValueError(f"unknown kv_rotation {self.kv_rotation!r}; use one of {', '.join(get_args(KeyRotation))}")
        if self.kv_pre_rope and (self.kv_offset == "centre" or self.kv_rotation != "none"):
            raise ValueError("kv_offset 'centre' and kv_rotation act after RoPE; use kv_pre_rope=False, or neither")
        if self.kv_rotation != "none" and self.kv_offset in ("bias", "mean"):
            raise ValueError(
                f"kv_rotation goes with kv_offset 'centre' or 'none', not with {self.kv_offset!r}, which is added back "
                "when keys are read; use 'centre'"
            )
        if self.kv_overrides and self.kv is None:
            raise ValueError("kv_overrides change single layers of a low-bit cache, and kv is None; give kv")
        own = [(override.kv, f"kv of layer {override.layer}") for override in self.kv_overrides]
        for spec, what in ((self.activation, "activation"), (self.kv, "kv"), *own):
            if spec is not None and not spec.dynamic:
                raise ValueError(f"{what} scales are chosen at run time; set dynamic=True")

    @property
    def default_linear(self) -> LinearScheme:
        return LinearScheme(self.weight, self.activation, self.outliers, self.rotation, self.reorder, self.residual)

    def for_linear(self, name: str) -> LinearScheme:
        """What the linear called `name` runs (model.layers.3.mlp.down_proj, say)."""
        for override in self.overrides:
            if fnmatchcase(name, override.pattern):
                return override.linear
        return self.default_linear

    def kv_of(self, layer: int) -> TensorSpec | None:
        """How keys and values of layer `layer` are cached."""
        return next((override.kv for override in self.kv_overrides if override.layer == layer), self.kv)

    @property
    def stores_key_offset(self) -> bool:
        """A checkpoint holds the mean key of every layer."""
        return self.kv is not None and self.kv_offset == "mean"

    @property
    def stores_key_centre(self) -> bool:
        """A checkpoint holds the centre of every layer's keys."""
        return self.kv is not None and self.kv_offset == "centre"

    @property
    def rotates_keys(self) -> bool:
        """Keys and queries are turned by a Hadamard matrix before keys are rounded."""
        return self.kv is not None and self.kv_rotation == "hadamard"

    @property
    def is_quantized(self) -> bool:
        return self.weight is not None or self.kv is not None or bool(self.overrides)

    def weight_bits(self, K: int) -> float:
        """Effective bits of a weight of a row of K columns: codes, scales and outliers."""
        return _mixed_bits(self.weight, self.default_linear, K)

    def activation_bits(self, K: int) -> float:
        """Effective bits of an activation of a token of K channels; those that are rounded twice count twice."""
        bits = _mixed_bits(self.activation, self.default_linear, K)
        if self.activation is None or not self.residual:
            return bits
        return bits + self.residual * self.activation.bits_per_value(K) / K

    def kv_bits(self, head_dim: int, layers: int = 1) -> float:
        """Effective bits of a cached key or value element, the mean over the first `layers`."""
        specs = [self.kv_of(layer) for layer in range(layers)]
        return sum(16.0 if spec is None else spec.bits_per_value(head_dim) for spec in specs) / layers

    def with_kv(self, kv: TensorSpec | None) -> "Scheme":
        """This with `kv` as the cache of all layers."""
        return replace(self, kv=kv, kv_overrides=())

    def to_dict(self) -> dict[str, Any]:
        data = _without_idle({f.name: _plain(getattr(self, f.name)) for f in fields(self)})
        data["overrides"] = [{"pattern": o.pattern, **_linear_dict(o.linear)} for o in self.overrides]
        if self.kv_overrides:
            data["kv_overrides"] = [{"layer": o.layer, "kv": o.kv.to_dict()} for o in self.kv_overrides]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Scheme":
        """The scheme that `to_dict` wrote; unknown keys are refused, never dropped."""
        _refuse_unknown(cls, data)
        values = _parse_parts(data)
        values["overrides"] = tuple(_parse_override(o) for o in data.get("overrides", ()))
        values["kv_overrides"] = tuple(_parse_cache_override(o) for o in data.get("kv_overrides", ()))
        return cls(**values)


def _mixed_bits(spec: TensorSpec | None, linear: LinearScheme, K: int) -> float:
    if spec is None:
        return 16.0
    normal, outliers = linear.split(K)
    total = normal * spec.bits_per_value(normal)
    if outliers:
        total += outliers * linear.outliers.bits + (0 if linear.outliers.format == "bf16" else 16)
    return total / K


_PARTS: dict[str, Any] = {
    "weight": TensorSpec,
    "activation": TensorSpec,
    "kv": TensorSpec,
    "outliers": OutlierSpec,
    "rotation": RotationSpec,
}


def _parse_parts(data: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _PARTS[key].from_dict(value) if key in _PARTS and value is not None else value
        for key, value in data.items()
    }


def _linear_dict(linear: LinearScheme) -> dict[str, Any]:
    return _without_idle({f.name: _plain(getattr(linear, f.name)) for f in fields(linear)})


def _without_idle(data: dict[str, Any]) -> dict[str, Any]:
    """Without what only some schemes have, so that the others' checkpoints read as they did before it was there."""
    return {key: value for key, value in data.items() if key not in ("residual", "kv_overrides") or value}


def _parse_override(data: dict[str, Any]) -> Override:
    values = dict(data)
    pattern = values.pop("pattern")
    _refuse_unknown(LinearScheme, values)
    return Override(pattern, LinearScheme(**_parse_parts(values)))


def _parse_cache_override(data: dict[str, Any]) -> CacheOverride:
    _refuse_unknown(CacheOverride, data)
    return CacheOverride(data["layer"], TensorSpec.from_dict(data["kv"]))


def _plain(value: Any) -> Any:
    if isinstance(value, Granularity):
        return str(value)
    return value.to_dict() if hasattr(value, "to_dict") else value


def _refuse_unknown(cls: type, data: dict[str, Any]) -> None:
    if not isinstance(data, dict):
        raise ValueError(f"a {cls.__name__} is a JSON object, got {data!r}; quantize again")
    known = [f.name for f in fields(cls)]
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise ValueError(
            f"{cls.__name__} does not know {', '.join(unknown)}; it has {', '.join(known)}. "
            "A newer version of Atom may have written this: upgrade, or quantize again."
        )
