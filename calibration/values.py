"""What calibration finds for values that a low-bit cache rounds: a mirror, folded into the weights.

A head's values have a main direction, the first eigenvector of their second moment. The reflection that takes it to the
direction of equal channels puts it into the zero point where that keeps the mean of a row (atom/quant/mean_zero.py): it
costs no range, and has no error. o undoes the reflection, so it is free. Where o's input is rounded in blocks behind a
Hadamard matrix of its own, equal channels would be one loud channel: there values stay as they are.
"""

from torch import Tensor, nn

from atom.models.attention import Attention
from atom.quant.keys import reflect_head

from .keys import mirror_of, second_moments


class ValueStatistics:
    """Second moments of the values of a layer."""

    def __init__(self, num_kv_heads: int) -> None:
        self.num_kv_heads = num_kv_heads
        self._moments: Tensor | None = None

    def add(self, v: Tensor) -> None:
        """v [T, num_kv_heads * head_dim]."""
        found = second_moments(v.unflatten(-1, (self.num_kv_heads, -1)), self.num_kv_heads)
        self._moments = found if self._moments is None else self._moments + found

    def mirror(self) -> Tensor:
        """float32 [num_kv_heads, head_dim], see `mirror_of`."""
        assert self._moments is not None
        return mirror_of(self._moments, is_rotated=False)


def mirror_values_(attention: Attention, mirror: Tensor, sample: Tensor) -> Tensor:
    """Reflect what v gives, and what o takes, in the weights; returns `sample` [T, N] of v's outputs so reflected."""
    v, o = attention.v_proj, attention.o_proj
    assert isinstance(v, nn.Linear) and isinstance(o, nn.Linear)
    v.weight = nn.Parameter(_reflect(v.weight.T, mirror).T.contiguous(), requires_grad=False)
    if v.bias is not None:
        v.bias = nn.Parameter(_reflect(v.bias[None], mirror)[0], requires_grad=False)
    repeats = o.in_features // mirror.numel()
    o.weight = nn.Parameter(_reflect(o.weight, mirror.repeat_interleave(repeats, 0)), requires_grad=False)
    return _reflect(sample, mirror)


def _reflect(x: Tensor, mirror: Tensor) -> Tensor:
    """x [..., heads * head_dim]."""
    return reflect_head(x.unflatten(-1, mirror.shape), mirror).flatten(-2)
