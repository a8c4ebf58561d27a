"""Key channels brought to like reach before a cache rounds them, which queries undo.

One scale covers a token's key of a head, so its loudest channel sets the error of all. Dividing k's rows by a factor
and multiplying q's by it leaves every product of query and key as it was, and costs nothing at run time. RoPE turns
channels i and i + head_dim / 2 into each other: they share a factor. Factors are powers of two, so that weights,
biases and scales change in their exponents alone and the model without a quantized cache stays the same.

Source: SmoothAttention of QoQ, arXiv:2405.04532.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from atom.models.attention import Attention
from atom.models.norm import RMSNorm
from atom.quant.scales import power_of_two

STRENGTH = 0.6  # of the reach, in powers: 1 makes all channels alike, 0 none


@dataclass(frozen=True)
class KeyStats:
    """Keys before RoPE over the calibration text: their mean, lowest and highest, each [num_kv_heads, head_dim]."""

    mean: Tensor
    low: Tensor
    high: Tensor

    @property
    def reach(self) -> Tensor:
        """How far each channel goes from its mean."""
        return torch.maximum(self.high - self.mean, self.mean - self.low)


def smoothing(reach: Tensor) -> Tensor:
    """What keys are divided by: powers of two [heads, head_dim] around 1, for channels of this reach."""
    half = reach.shape[-1] // 2
    pair = torch.maximum(reach[:, :half], reach[:, half:])
    loudest = pair.amax(-1, keepdim=True).clamp_min(2.0**-100)
    power = STRENGTH * (pair / loudest).clamp_min(2.0**-16).log2()
    factor = power_of_two((power - power.mean(-1, keepdim=True)).round())
    return torch.cat((factor, factor), -1)


def smooth_keys_(attention: Attention, stats: KeyStats) -> tuple[Tensor, dict[str, Tensor]]:
    """Scale q's and k's rows in place, or the gains of their norms.

    Returns the factors [num_kv_heads, head_dim] that keys are now divided by, and those [N] by which the outputs of
    projections have grown, by name; ones and nothing where a norm stores its gain less an offset, which a factor
    would not leave exact.
    """
    q_norm, k_norm = attention.q_norm, attention.k_norm
    if isinstance(k_norm, RMSNorm) and isinstance(q_norm, RMSNorm):
        if k_norm.offset:
            return torch.ones_like(stats.mean), {}
        factor = smoothing(stats.reach.amax(0, keepdim=True))  # one gain for all heads
        q_norm.weight = nn.Parameter(q_norm.weight * factor[0], requires_grad=False)
        k_norm.weight = nn.Parameter(k_norm.weight / factor[0], requires_grad=False)
        return factor.expand_as(stats.mean), {}
    factor = smoothing(stats.reach)
    repeats = attention.q_proj.out_features // attention.k_proj.out_features
    grown = {
        "self_attn.q_proj": factor.repeat_interleave(repeats, 0).flatten(),
        "self_attn.k_proj": 1.0 / factor.flatten(),
    }
    for name, rows in grown.items():
        linear = attention.get_submodule(name.removeprefix("self_attn."))
        assert isinstance(linear, nn.Linear)
        linear.weight = nn.Parameter(linear.weight * rows[:, None], requires_grad=False)
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias * rows, requires_grad=False)
    return factor, grown
