"""Number formats: how many bits a value has and which values it can take.

A format is a value on a grid, nothing else: what a scale covers is the granularity's business, and how the codes
lie in bytes is packing's. Integers are two's complement codes in int8; floats of 8 bits are torch's own dtypes; E2M1
codes are the four bits sign, exponent, exponent, mantissa in a uint8.
"""

from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["int", "float", "exponent"]


@dataclass(frozen=True)
class Format:
    """A number format.

    name       how schemes and checkpoints call it
    bits       bits of one packed value
    kind       "int" (two's complement), "float", or "exponent" (E8M0: powers of two)
    max        largest magnitude of a symmetric grid: 7 for INT4 (whose codes still reach -8), 6.0 for E2M1
    dtype      dtype of unpacked codes
    """

    name: str
    bits: int
    kind: Kind
    max: float
    dtype: torch.dtype

    @property
    def is_integer(self) -> bool:
        return self.kind == "int"

    @property
    def is_packed(self) -> bool:
        """True if several values share a byte on disk."""
        return self.bits < 8

    def code_range(self, symmetric: bool) -> tuple[int, int]:
        """(qmin, qmax) of an integer format: two's complement if symmetric, else unsigned from 0."""
        if not self.is_integer:
            raise ValueError(f"{self.name} has no integer codes; use its values")
        if symmetric:
            return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
        return 0, (1 << self.bits) - 1


INT2 = Format("int2", 2, "int", 1, torch.int8)
INT3 = Format("int3", 3, "int", 3, torch.int8)
INT4 = Format("int4", 4, "int", 7, torch.int8)
INT8 = Format("int8", 8, "int", 127, torch.int8)
FP8_E4M3 = Format("fp8_e4m3", 8, "float", 448.0, torch.float8_e4m3fn)
FP8_E5M2 = Format("fp8_e5m2", 8, "float", 57344.0, torch.float8_e5m2)
E2M1 = Format("e2m1", 4, "float", 6.0, torch.uint8)
E8M0 = Format("e8m0", 8, "exponent", 2.0**127, torch.uint8)
BF16 = Format("bf16", 16, "float", torch.finfo(torch.bfloat16).max, torch.bfloat16)
FP16 = Format("fp16", 16, "float", torch.finfo(torch.float16).max, torch.float16)
FP32 = Format("fp32", 32, "float", torch.finfo(torch.float32).max, torch.float32)

FORMATS: dict[str, Format] = {
    f.name: f for f in (INT2, INT3, INT4, INT8, FP8_E4M3, FP8_E5M2, E2M1, E8M0, BF16, FP16, FP32)
}


def get_format(name: str) -> Format:
    """The format called `name`; ValueError lists the known ones."""
    try:
        return FORMATS[name]
    except KeyError:
        raise ValueError(f"unknown format {name!r}; use one of {', '.join(FORMATS)}") from None
