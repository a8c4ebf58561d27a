"""The steps of the recipe as switches over a preset: what the command line may change about a scheme."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from .granularity import Channel, Group, Token
from .schemes import KeyOffset, KeyRotation, Outer, OutlierSpec, RotationSpec, ScaleRule, Scheme, TensorSpec


@dataclass(frozen=True)
class Switches:
    """Changes to a scheme; what is left out stays as the preset has it."""

    reorder: bool | None = None
    """Sort input channels by energy."""

    outliers: int | None = None
    """Channels kept in higher precision: a multiple of 16; needs the reordering."""

    outlier_format: Literal["int8", "fp8_e4m3", "bf16"] | None = None
    """What the outlier channels are kept in."""

    residual: int | None = None
    """Of so many of the loudest channels, round again what rounding leaves of an activation: a multiple of 16; needs
    the reordering, and runs on the reference path."""

    group_size: int | None = None
    """Columns under one scale, for weights and activations; 0 gives one scale a channel and token."""

    group_scales: Literal["uint4", "bf16"] | None = None
    """Scales of groups: whole factors under one float32 a row and a token, or bfloat16."""

    scale_rule: ScaleRule | None = None
    """How a group's scale follows its largest value, in weights and activations: max, range, signed, four_six."""

    weight_clip: float | Literal["mse"] | None = None
    """Share of the maximum that the weight grid reaches, or mse to search it."""

    activation_clip: float | None = None
    """Share of the maximum that the activation grid reaches, for all layers; without it calibration measures it."""

    rotation: Literal["hadamard", "block_hadamard"] | None = None
    """Rotate the normal columns of every linear's input and weight."""

    rotation_block: int = 128
    """Columns of a Hadamard block."""

    fast_sums: bool = False
    """Leave sums of FP8 products to the tensor cores (14 bits or so, as vLLM does): faster with many tokens."""

    kv_pre_rope: bool = False
    """Round keys before RoPE instead of after."""

    kv_offset: KeyOffset | None = None
    """What the cache leaves out of keys before it rounds them: a centre or mean from calibration, the bias, or none."""

    kv_rotation: KeyRotation | None = None
    """Turn the heads of keys and queries by a Hadamard matrix after RoPE, or none."""

    kv_recent: int | None = None
    """Tokens before each query, its own among them, whose keys and values are read as they were before rounding: 16, 32
    or 64, or 0 for none."""

    def apply(self, scheme: Scheme, gptq: bool = True) -> Scheme:
        """`scheme` with these changes; ValueError if they do not fit together.

        gptq   False takes the paper's grid for rounding to nearest where the preset has GPTQ's
        """
        self._refuse_idle(scheme)
        weight, activation, outliers = scheme.weight, scheme.activation, scheme.outliers
        if self.group_size is not None:
            group = Group(self.group_size) if self.group_size else None
            weight = weight and replace(weight, granularity=group or Channel())
            activation = activation and replace(activation, granularity=group or Token())
        if self.group_scales is not None or self.group_size == 0:
            weight = weight and _with_group_scales(weight, self.group_scales or "bf16", "channel")
            activation = activation and _with_group_scales(activation, self.group_scales or "bf16", "token")
        if self.weight_clip is not None:
            weight = weight and replace(weight, clip=self.weight_clip)
        if self.activation_clip is not None:
            activation = activation and replace(activation, clip=self.activation_clip)
        if not gptq:
            weight = weight and replace(weight, scale_rule="max")
        if self.scale_rule is not None:
            weight = weight and replace(weight, scale_rule=self.scale_rule)
            activation = activation and replace(activation, scale_rule=self.scale_rule)
        if self.outliers is not None or self.outlier_format is not None:
            count = outliers.count if self.outliers is None else self.outliers
            outliers = OutlierSpec(count, self.outlier_format or outliers.format)
        residual = scheme.residual if self.residual is None else self.residual
        reorder = bool(outliers.count or residual) or scheme.reorder if self.reorder is None else self.reorder
        rotation = scheme.rotation if self.rotation is None else RotationSpec(self.rotation, self.rotation_block)
        return replace(
            scheme,
            weight=weight,
            activation=activation,
            outliers=outliers,
            reorder=reorder,
            rotation=rotation,
            residual=residual,
            fast_sums=self.fast_sums or scheme.fast_sums,
            **self._keys(scheme),
        )

    def _keys(self, scheme: Scheme) -> dict[str, Any]:
        """The fields of keys. One that was asked for turns off what of the preset does not go with it."""
        pre_rope = self.kv_pre_rope or scheme.kv_pre_rope
        offset, rotation = self.kv_offset, self.kv_rotation
        if offset is None:
            offset = "mean" if pre_rope and scheme.kv_offset == "centre" else scheme.kv_offset
        if rotation is None:
            rotation = "none" if pre_rope or offset in ("bias", "mean") else scheme.kv_rotation
        recent = self.kv_recent
        if recent is None:
            recent = 0 if pre_rope or offset in ("bias", "mean") else scheme.kv_recent
        return {"kv_pre_rope": pre_rope, "kv_offset": offset, "kv_rotation": rotation, "kv_recent": recent}

    def _refuse_idle(self, scheme: Scheme) -> None:
        """Raise ValueError for a switch that would change nothing, since the scheme has nothing it applies to."""
        needs = {
            "activation_clip": ("quantized activations", scheme.activation),
            "group_size": ("quantized weights", scheme.weight),
            "group_scales": ("quantized weights", scheme.weight),
            "weight_clip": ("quantized weights", scheme.weight),
            "scale_rule": ("quantized weights", scheme.weight),
            "outliers": ("quantized weights", scheme.weight),
            "outlier_format": ("quantized weights", scheme.weight),
            "residual": ("quantized activations", scheme.activation),
            "rotation": ("quantized weights", scheme.weight),
            "kv_pre_rope": ("a quantized cache", scheme.kv),
            "kv_offset": ("a quantized cache", scheme.kv),
            "kv_rotation": ("a quantized cache", scheme.kv),
            "kv_recent": ("a quantized cache", scheme.kv),
        }
        if self.fast_sums and (scheme.weight is None or scheme.weight.format != "fp8_e4m3"):
            raise ValueError(f"--fast-sums needs FP8 weights, which {scheme.name} has not; leave it out, or take fp8")
        for name, (what, found) in needs.items():
            if getattr(self, name) not in (None, False) and found is None:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} needs {what}, which {scheme.name} has not; leave it out, or take w4a4")


def _with_group_scales(spec: TensorSpec, scale_format: Literal["uint4", "bf16"], outer: Outer) -> TensorSpec:
    """Integer groups with scales of `scale_format`; what has no such groups stays, but for factors of no group."""
    if spec.scale_format not in ("uint4", "bf16") or (spec.group_size is None and spec.scale_format == "bf16"):
        return spec
    factors = scale_format == "uint4" and spec.group_size is not None
    return replace(spec, scale_format="uint4" if factors else "bf16", outer=outer if factors else None)
