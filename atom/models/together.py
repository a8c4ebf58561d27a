"""Linears that share an input, run as one product where they were fused (q, k and v; gate and up).

`Attention` and `MLP` call `run_together`. In full precision, and on the reference path, each linear runs on its own; a
quantized layer may hold `LinearPart`s instead, which stand for rows of one stacked linear. A part can also be called
alone: then the whole product is computed and a slice of it returned.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..quant.mixed import MixedWeight
from ..quant.rounding import Quantized, Scale


class LinearPart(nn.Module):
    """Rows `start` to `start + size` of a stacked linear."""

    def __init__(self, whole: nn.Module, start: int, size: int, bias: Tensor | None) -> None:
        super().__init__()
        self.whole = whole
        self.start = start
        self.size = size
        self.bias = bias

    def forward(self, x: object) -> Tensor:
        """What the linear's producer hands on, of T tokens -> [T, size]."""
        return self.cut(self.whole(x))

    def cut(self, y: Tensor) -> Tensor:
        """This part of the whole output, a view with its row pitch."""
        return y[:, self.start : self.start + self.size]

    def extra_repr(self) -> str:
        return f"rows {self.start} to {self.start + self.size}"


def run_together(linears: Sequence[nn.Module], x: object) -> list[Tensor]:
    """The outputs of linears that share the input x, in their order."""
    first = linears[0]
    if isinstance(first, LinearPart):
        y: Tensor = first.whole(x)
        return [part.cut(y) for part in linears if isinstance(part, LinearPart)]
    return [linear(x) for linear in linears]


def stack_rows(weights: Sequence[MixedWeight]) -> MixedWeight:
    """Quantized weights of one scheme and input, one below the other. Scales per tensor become scales per row."""
    outliers = [weight.outlier for weight in weights]
    stacked: Quantized | Tensor | None = None
    if isinstance(outliers[0], Quantized):
        stacked = _stack([outlier for outlier in outliers if isinstance(outlier, Quantized)])
    elif isinstance(outliers[0], Tensor):
        stacked = torch.cat([outlier for outlier in outliers if isinstance(outlier, Tensor)])
    return MixedWeight(_stack([weight.normal for weight in weights]), stacked)


def stack_biases(biases: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    """Their biases, zeros where only some have one; None if none has."""
    known = next((bias for bias in biases if bias is not None), None)
    if known is None:
        return None
    return torch.cat([known.new_zeros(n) if b is None else b for b, n in zip(biases, sizes, strict=True)])


def _stack(parts: Sequence[Quantized]) -> Quantized:
    def rows(of: str) -> Tensor | None:
        found = []
        for part in parts:
            tensor: Tensor | None = getattr(part.scale, of)
            if tensor is not None:
                found.append(tensor.expand(part.codes.shape[0], -1))
        return torch.cat(found) if found else None

    scale = rows("scale")
    assert scale is not None
    return Quantized(torch.cat([part.codes for part in parts]), Scale(scale, rows("zero_point"), rows("outer")))
