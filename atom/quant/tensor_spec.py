"""How one kind of tensor (weights, activations, keys and values) becomes codes and scales, as a frozen value."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from .formats import get_format
from .granularity import Granularity, Group, Tensor, parse_granularity
from .plain import plain_fields, refuse_unknown

ScaleRule = Literal["max", "range", "signed", "four_six"]
Outer = Literal["tensor", "channel", "token"]
ZeroRule = Literal["whole", "mean"]
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
    zero          of asymmetric codes. "whole": the range holds zero, which is exact; the zero point is a code. "mean":
                  the range is that of the values, and the zero point a bfloat16 number, stored less half the codes,
                  under which rounding leaves the mean of a row as it was: what all channels of a row have in common
                  costs neither range nor accuracy
    """

    format: str
    granularity: Granularity
    symmetric: bool = True
    dynamic: bool = False
    clip: float | Literal["mse"] = 1.0
    scale_format: str = "bf16"
    scale_rule: ScaleRule = "max"
    outer: Outer | None = None
    zero: ZeroRule = "whole"

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
        if self.zero not in get_args(ZeroRule):
            raise ValueError(f"unknown zero rule {self.zero!r}; use one of {', '.join(get_args(ZeroRule))}")
        if self.zero == "mean" and (self.symmetric or self.clip != 1.0 or isinstance(self.granularity, Group | Tensor)):
            raise ValueError(
                "zero 'mean' goes with asymmetric codes over the whole range of a row or head; use symmetric=False, "
                "clip=1.0 and granularity head, or zero='whole'"
            )
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
        found = plain_fields(self)
        return {name: item for name, item in found.items() if name != "zero" or item != "whole"}  # as before there was

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "TensorSpec":
        refuse_unknown(cls, data)
        return cls(**{**data, "granularity": parse_granularity(data["granularity"])})

    def __str__(self) -> str:
        parts = [self.format, str(self.granularity)]
        parts += [] if self.symmetric else ["asym"] if self.zero == "whole" else ["asym, mean kept"]
        parts += [] if self.clip == 1.0 else [f"clip {self.clip}"]
        scale = self.scale_format if self.outer is None else f"{self.scale_format} under fp32 per {self.outer}"
        return ", ".join([*parts, f"{scale} scales"])
