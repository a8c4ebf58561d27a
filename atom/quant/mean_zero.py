"""Zero points that keep the mean: the rule "mean" of TensorSpec.zero.

Codes span the range of a row as it is, which need not hold zero. They are rounded to nearest, and the mean of what
rounding did to them, the same for all channels, goes into the zero point. So whatever all channels of a row have in
common is kept to the zero point's accuracy and costs no range: one direction of the space of rows, that of equal
channels, is stored in 16 bits. Whoever can choose turns what is loudest or matters most into that direction.

The zero point is a bfloat16 number and stored less half the codes, near zero, where bfloat16 is fine. A row whose range
is further from zero than it is long would need a finer one: there the range holds zero and the zero point is whole, 0
or the largest code. Either way a rounded row is rounded to itself.
"""

import torch
from torch import Tensor

from .ordered_sum import sum_in_order
from .scales import round_scale

LARGEST_RANGE = 2.0**126


def choose_mean_zero(x: Tensor, levels: int, scale_format: str) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, zero point and low end [...] of rows x [..., K] in codes 0 to `levels`.

    The zero point less half the codes is a bfloat16 number. The low end has code 0: see `steps_from`.
    """
    low = x.amin(-1).clamp(-LARGEST_RANGE, LARGEST_RANGE)
    high = x.amax(-1).clamp(-LARGEST_RANGE, LARGEST_RANGE)
    span = high - low
    is_far = (low > span) | (-high > span)
    low, high = torch.where(is_far, low.clamp_max(0.0), low), torch.where(is_far, high.clamp_min(0.0), high)
    raw = (high - low) * (1.0 / levels)
    scale = round_scale(torch.where(raw > 0, raw, 1.0), scale_format)
    low = torch.where(is_far, torch.where(low < 0, scale * -levels, 0.0), low)
    inverse = scale.reciprocal()
    steps = steps_from(x, inverse, low, levels)
    more = (steps.round().sum(-1) - sum_in_order(steps)[..., 0]) * (1.0 / x.shape[-1])  # than the steps, each code
    half = half_codes(levels)
    zero = (torch.where(is_far, 0.0, more) - half) - low * inverse
    return scale, zero.to(torch.bfloat16).float() + half, low


def steps_from(x: Tensor, inverse: Tensor, low: Tensor, levels: int) -> Tensor:
    """How many steps of 1 / `inverse` [...] rows x [..., K] lie above `low` [...], 0 to `levels`: rounded, codes."""
    return ((x - low.unsqueeze(-1)) * inverse.unsqueeze(-1)).clamp_(0, levels)


def half_codes(levels: int) -> int:
    """What a stored zero point is less of: half the number of codes."""
    return (levels + 1) // 2
