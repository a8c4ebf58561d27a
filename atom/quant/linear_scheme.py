"""What one linear layer runs, as a frozen value: its tensors' specs, outlier channels, rotation, order of channels."""

from dataclasses import dataclass, field
from typing import Any, Literal

from .formats import get_format
from .granularity import Granularity
from .plain import Plain, plain_fields, refuse_unknown
from .tensor_spec import TensorSpec


@dataclass(frozen=True)
class OutlierSpec(Plain):
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


@dataclass(frozen=True)
class RotationSpec(Plain):
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


@dataclass(frozen=True)
class LinearScheme:
    """What one linear layer runs: a scheme after its overrides. `weight` None means full precision.

    fast_sums   of FP8 products stay in the tensor cores, with some 14 bits, as vLLM's and torch's `use_fast_accum`
    """

    weight: TensorSpec | None = None
    activation: TensorSpec | None = None
    outliers: OutlierSpec = field(default_factory=OutlierSpec)
    rotation: RotationSpec | None = None
    reorder: bool = False
    residual: int = 0
    fast_sums: bool = False

    def __post_init__(self) -> None:
        if self.fast_sums and (self.weight is None or self.weight.format != "fp8_e4m3"):
            raise ValueError("fast sums are those of FP8 products; take fp8, or fast_sums=False")
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

    def weight_bits(self, K: int) -> float:
        """Effective bits of a weight of a row of K columns: codes, scales and outliers."""
        return self._bits(self.weight, K)

    def activation_bits(self, K: int) -> float:
        """Effective bits of an activation of a token of K channels; those that are rounded twice count twice."""
        bits = self._bits(self.activation, K)
        if self.activation is None or not self.residual:
            return bits
        return bits + self.residual * self.activation.bits_per_value(K) / K

    def _bits(self, spec: TensorSpec | None, K: int) -> float:
        if spec is None:
            return 16.0
        normal, outliers = self.split(K)
        total = normal * spec.bits_per_value(normal)
        if outliers:
            total += outliers * self.outliers.bits + (0 if self.outliers.format == "bf16" else 16)
        return total / K

    @property
    def label(self) -> str:
        """Bits of weights and activations, outlier channels (+64) and Hadamard blocks (h64): w4a4+64, w4a8 h64."""
        weight, activation = (16 if s is None else get_format(s.format).bits for s in (self.weight, self.activation))
        outliers = f"+{self.outliers.count}" if self.outliers.count else ""
        blocks = "" if self.rotation is None else f" h{self.rotation.block if 'block' in self.rotation.kind else ''}"
        return f"w{weight}a{activation}{outliers}{blocks}"

    def to_dict(self) -> dict[str, Any]:
        return plain_fields(self, idle=("residual", "fast_sums"))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "LinearScheme":
        refuse_unknown(cls, data)
        return cls(**parse_parts(data))


@dataclass(frozen=True)
class Override:
    """A different treatment of the linears whose full name matches `pattern` (shell wildcards)."""

    pattern: str
    linear: LinearScheme

    def to_dict(self) -> dict[str, Any]:
        return {"pattern": self.pattern, **self.linear.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Override":
        values = dict(data)
        return cls(values.pop("pattern"), LinearScheme.from_dict(values))


_PARTS: dict[str, Any] = {
    "weight": TensorSpec,
    "activation": TensorSpec,
    "kv": TensorSpec,
    "outliers": OutlierSpec,
    "rotation": RotationSpec,
}


def parse_parts(data: dict[str, Any]) -> dict[str, Any]:
    """`data` with each part that it has by name, of a scheme or of a linear's, as the value it was."""
    return {
        key: _PARTS[key].from_dict(value) if key in _PARTS and value is not None else value
        for key, value in data.items()
    }
