"""Schemes: how a model is quantized, as a frozen, printable value that is written into the checkpoint.

A scheme says what is *executed*: formats, granularities, clips, outlier channels, rotation. How the weights were
found (GPTQ or plain rounding, on which data) is calibration's business and stands in its report. Its parts are defined
in tensor_spec.py and linear_scheme.py and are imported from here; the named presets are in presets.py.
"""

from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from .linear_scheme import LinearScheme, OutlierSpec, Override, RotationSpec, parse_parts
from .plain import plain_fields, refuse_unknown
from .tensor_spec import SCALE_FORMATS, Outer, ScaleRule, TensorSpec

__all__ = [
    "SCALE_FORMATS",
    "CacheOverride",
    "KeyOffset",
    "KeyRotation",
    "LinearScheme",
    "Outer",
    "OutlierSpec",
    "Override",
    "RotationSpec",
    "ScaleRule",
    "Scheme",
    "TensorSpec",
]

KeyOffset = Literal["none", "bias", "mean", "centre"]
KeyRotation = Literal["none", "hadamard"]
RECENT = (0, 16, 32, 64)  # what kv_recent may be
CONTEXT = 2048  # tokens of a sequence over which the bits of its recent window are spread


@dataclass(frozen=True)
class CacheOverride:
    """Another format of the keys and values of one layer."""

    layer: int
    kv: TensorSpec

    def to_dict(self) -> dict[str, Any]:
        return plain_fields(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "CacheOverride":
        refuse_unknown(cls, data)
        return cls(data["layer"], TensorSpec.from_dict(data["kv"]))


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
    kv_recent      a query reads the keys and values of so many tokens, its own and those just before it, as they were
                   before rounding; 16, 32 or 64, and 0 for none. They are rounded and stored like all others too
    overrides      first match wins
    kv_overrides   layers whose cache has another format than `kv`; offset and rotation are the same
    fast_sums      of FP8 products: see LinearScheme
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
    fast_sums: bool = False
    kv_recent: int = 0

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
        if self.kv_recent:
            self._check_recent()
        own = [(override.kv, f"kv of layer {override.layer}") for override in self.kv_overrides]
        for spec, what in ((self.activation, "activation"), (self.kv, "kv"), *own):
            if spec is not None and not spec.dynamic:
                raise ValueError(f"{what} scales are chosen at run time; set dynamic=True")

    def _check_recent(self) -> None:
        if self.kv_recent not in RECENT:
            raise ValueError(f"kv_recent must be one of {', '.join(map(str, RECENT))}, got {self.kv_recent}; use 16")
        if self.kv is None:
            raise ValueError("kv_recent keeps the newest tokens of a low-bit cache exact, and kv is None; give kv")
        if self.kv_pre_rope or self.kv_offset in ("bias", "mean"):
            what = "kv_pre_rope" if self.kv_pre_rope else f"kv_offset {self.kv_offset!r}"
            raise ValueError(
                f"kv_recent keeps keys as they are behind RoPE, with nothing to add back, and {what} came; "
                "use kv_offset 'centre' or 'none' and kv_pre_rope=False, or kv_recent=0"
            )

    @property
    def default_linear(self) -> LinearScheme:
        return LinearScheme(
            self.weight, self.activation, self.outliers, self.rotation, self.reorder, self.residual, self.fast_sums
        )

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
    def mirrors_keys(self) -> bool:
        """Heads are reflected behind the rotation, so that zero points keep the queries' main direction; a checkpoint
        holds the mirrors with the centre."""
        return self.stores_key_centre and self.rotates_keys and self.kv is not None and self.kv.zero == "mean"

    @property
    def is_quantized(self) -> bool:
        return self.weight is not None or self.kv is not None or bool(self.overrides)

    @property
    def is_mixed(self) -> bool:
        """Some linear, or some layer's cache, has another format than the rest."""
        return bool(self.overrides or self.kv_overrides)

    def weight_bits(self, K: int) -> float:
        """Effective bits of a weight of a row of K columns, but for overrides: codes, scales and outliers."""
        return self.default_linear.weight_bits(K)

    def activation_bits(self, K: int) -> float:
        """Effective bits of an activation of a token of K channels, but for overrides."""
        return self.default_linear.activation_bits(K)

    def kv_bits(self, head_dim: int, layers: int = 1, tokens: int = CONTEXT) -> float:
        """Effective bits of a cached key or value element of a sequence of `tokens`, the mean over the first `layers`.

        What is kept exactly beside is counted in.
        """
        specs = [self.kv_of(layer) for layer in range(layers)]
        bits = sum(16.0 if spec is None else spec.bits_per_value(head_dim) for spec in specs) / layers
        return bits + 16.0 * min(self.kv_recent, tokens) / tokens

    def with_kv(self, kv: TensorSpec | None) -> "Scheme":
        """This with `kv` as the cache of all layers."""
        return replace(self, kv=kv, kv_overrides=(), kv_recent=0 if kv is None else self.kv_recent)

    def to_dict(self) -> dict[str, Any]:
        data = plain_fields(self, idle=("residual", "kv_overrides", "fast_sums", "kv_recent"))
        data["overrides"] = [override.to_dict() for override in self.overrides]
        if self.kv_overrides:
            data["kv_overrides"] = [override.to_dict() for override in self.kv_overrides]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Scheme":
        """The scheme that `to_dict` wrote; unknown keys are refused, never dropped."""
        refuse_unknown(cls, data)
        values = parse_parts(data)
        values["overrides"] = tuple(Override.from_dict(o) for o in data.get("overrides", ()))
        values["kv_overrides"] = tuple(CacheOverride.from_dict(o) for o in data.get("kv_overrides", ()))
        return cls(**values)
