"""Rounding: from values to codes and scales, and back. Every quantized number in Atom comes from here.

All functions work along the last axis, in float32, for any leading shape. Codes are chosen *after* the scale was
rounded to its storage format, so what is dequantized is exactly what is stored. Ties round to even. Values are
multiplied by the scale's float32 reciprocal, and maxima by a float32 constant, never divided: a kernel that does the
same gets the same bits.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import floor, frexp, ldexp

import torch
from torch import Tensor

from .formats import Format, get_format
from .granularity import Group
from .granularity import Tensor as PerTensor
from .mean_zero import LARGEST_RANGE, choose_mean_zero, steps_from
from .scales import LARGEST, LARGEST_DYNAMIC, floor_log2, power_of_two, round_scale
from .schemes import TensorSpec

MSE_RATIOS = tuple(1.0 - 0.025 * i for i in range(21))  # clips that clip="mse" tries: 1.0 down to 0.5
_E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Scale:
    """Scales of a tensor, all float32 and on the grid of their storage formats.

    scale        granularity.scale_shape(x.shape), never zero; negative only under the rule "signed"
    zero_point   same shape, whole numbers unless the spec's zero is "mean"; None if symmetric
    outer        [1, ..., 1] (tensor) or [..., 1] (channel, token); None if the spec has none
    low          like scale: what has code 0, where the zero point does not say it (zero "mean")
    """

    scale: Tensor
    zero_point: Tensor | None = None
    outer: Tensor | None = None
    low: Tensor | None = None

    @property
    def effective(self) -> Tensor:
        """What a code is multiplied with: scale times outer."""
        return self.scale if self.outer is None else self.scale * self.outer


@dataclass(frozen=True)
class Quantized:
    """Codes [..., K] in the format's dtype, and their scales."""

    codes: Tensor
    scale: Scale


def quantize(x: Tensor, spec: TensorSpec, name: str = "tensor") -> Quantized:
    """Codes and scales of x [..., K] in any float dtype. Raises ValueError naming the tensor on NaN or infinity."""
    x = x.float()
    refuse_nonfinite(x, name)
    scale = choose_scale(x, spec)
    return Quantized(encode(x, scale, spec), scale)


def refuse_nonfinite(x: Tensor, name: str) -> None:
    """Raise ValueError naming the tensor if x holds NaN or infinity."""
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} holds NaN or infinity; quantization needs finite values. Check the source of {name}")


def dequantize(q: Quantized, spec: TensorSpec) -> Tensor:
    """The float32 values [..., K] that the codes stand for."""
    return decode(q.codes, q.scale, spec)


def fake_quantize(x: Tensor, spec: TensorSpec) -> Tensor:
    """x rounded to what `spec` can hold, as float32 [..., K]: dequantize(quantize(x)) in one pass.

    NaN and infinity are not looked for. A zero of an integer format may keep its minus sign, which codes cannot.
    """
    blocks = _blocks(x.float(), spec)
    return _round_blocks(blocks, choose_scale(x, spec), spec).flatten(-2)[..., : x.shape[-1]]


def choose_scale(x: Tensor, spec: TensorSpec, outer: Tensor | None = None) -> Scale:
    """The scales of x [..., K] by the spec's rule and clip, under `outer` [..., 1] if it was chosen before."""
    blocks = _blocks(x.float(), spec)  # [..., groups, columns of a group]
    ratios = MSE_RATIOS if spec.clip == "mse" else (float(spec.clip),)
    if spec.scale_rule == "four_six":  # the largest value at 4 instead of 6, between which there is nothing
        ratios = (*ratios, *(1.5 * ratio for ratio in ratios))
    best = _choose(blocks, spec, ratios[0], outer)
    if len(ratios) == 1:
        return best
    best_error = _block_error(blocks, best, spec)
    for ratio in ratios[1:]:
        trial = _choose(blocks, spec, ratio, best.outer)
        error = _block_error(blocks, trial, spec)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        zero = None
        if best.zero_point is not None and trial.zero_point is not None:
            zero = torch.where(better, trial.zero_point, best.zero_point)
        best = Scale(torch.where(better, trial.scale, best.scale), zero, best.outer)
    return best


def encode(x: Tensor, scale: Scale, spec: TensorSpec) -> Tensor:
    """Codes [..., K] of x [..., K] under given scales: int8, uint8 for E2M1, or an 8-bit float dtype."""
    fmt = get_format(spec.format)
    columns = x.shape[-1]
    if scale.low is not None:
        levels = fmt.code_range(symmetric=False)[1]
        steps = steps_from(x.float(), scale.scale[..., 0].reciprocal(), scale.low[..., 0], levels)
        return steps.round_().to(torch.uint8)
    scaled = x.float() * expand_scale(scale.effective, columns, spec).reciprocal()
    if not fmt.is_integer:
        return encode_float(scaled, fmt)
    qmin, qmax = fmt.code_range(spec.symmetric)
    codes = scaled.round()
    if scale.zero_point is not None:
        codes = codes + expand_scale(scale.zero_point, columns, spec)
    return codes.clamp(qmin, qmax).to(fmt.dtype if spec.symmetric else torch.uint8)


def decode(codes: Tensor, scale: Scale, spec: TensorSpec) -> Tensor:
    """float32 values [..., K] of codes [..., K]."""
    columns = codes.shape[-1]
    values = code_values(codes, get_format(spec.format))
    if scale.zero_point is not None:
        values = values - expand_scale(scale.zero_point, columns, spec)
    return values * expand_scale(scale.effective, columns, spec)


def expand_scale(scale: Tensor, columns: int, spec: TensorSpec) -> Tensor:
    """A scale of the spec's granularity repeated, where it is per group, to one per column; broadcastable to x."""
    if isinstance(spec.granularity, Group) and scale.shape[-1] > 1:
        return scale.repeat_interleave(spec.granularity.size, -1)[..., :columns]
    return scale


def code_values(codes: Tensor, fmt: Format) -> Tensor:
    """The float32 numbers that codes stand for before any scale."""
    if fmt.name == "e2m1":
        return _e2m1_values(codes.device)[codes.long()]
    return codes.float()


@lru_cache
def _e2m1_values(device: torch.device) -> Tensor:
    """Values by code; kept on the device, since a CUDA graph cannot copy them there while it is recorded."""
    magnitude = torch.tensor(_E2M1_VALUES, device=device)
    return torch.cat((magnitude, -magnitude))


def encode_float(x: Tensor, fmt: Format) -> Tensor:
    """Codes of already scaled values in a float format: saturating, ties to even."""
    if fmt.name != "e2m1":
        return x.clamp(-fmt.max, fmt.max).to(fmt.dtype)
    magnitude = _round_float(x, fmt).abs()
    code = torch.where(magnitude < 2, magnitude * 2, torch.where(magnitude < 4, magnitude + 2, magnitude / 2 + 4))
    return code.to(torch.uint8) | (torch.signbit(x).to(torch.uint8) << 3)


def _round_float(x: Tensor, fmt: Format) -> Tensor:
    """The nearest values of a float format, as float32: saturating, ties to even."""
    x = x.clamp(-fmt.max, fmt.max)
    if fmt.name != "e2m1":
        return x.to(fmt.dtype).float()
    magnitude = x.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return (x / step).round() * step


def _choose(blocks: Tensor, spec: TensorSpec, clip: float, outer: Tensor | None = None) -> Scale:
    """Scales of blocks [..., groups, columns] at a given clip; `outer` is kept if given."""
    fmt = get_format(spec.format)
    if not spec.symmetric:
        return _choose_asymmetric(blocks, spec, fmt, clip)
    whole = isinstance(spec.granularity, PerTensor)
    largest = _extreme(blocks.abs(), whole)
    if spec.scale_format == "e8m0":  # OCP MX: the exponent of the maximum less that of the format's largest value
        log2 = floor_log2(largest * clip) - (frexp(fmt.max)[1] - 1)
        log2_cap = frexp(largest_scale(fmt))[1] - 1
        return Scale(torch.where(largest > 0, power_of_two(log2.clamp_max(log2_cap)), 1.0))
    levels = {"range": (2**fmt.bits - 1) / 2, "signed": 2 ** (fmt.bits - 1)}.get(spec.scale_rule, fmt.max)
    raw = (largest * (clip / levels)).clamp_max(largest_scale(fmt))
    is_negative = torch.zeros_like(raw, dtype=torch.bool)
    if spec.scale_rule == "signed":  # the largest value takes the lowest code, which has no counterpart
        is_negative = _extreme(blocks, whole) > -_extreme(blocks, whole, lowest=True)
    if spec.outer is None:
        scale = torch.where(raw > 0, raw, 1.0)
        return Scale(round_scale(torch.where(is_negative, -scale, scale), spec.scale_format))
    if outer is None:
        over = _extreme(raw, spec.outer == "tensor").unsqueeze(-1)
        largest_inner = LARGEST_DYNAMIC if spec.dynamic else LARGEST
        known = spec.scale_format in largest_inner
        over = over * (1.0 / largest_inner[spec.scale_format]) if known else torch.ones_like(over)
        outer = torch.where(over > 0, over.clamp_min(2.0**-117), 1.0)  # scale * outer stays a normal number
    inner = raw * outer.reciprocal()
    return Scale(round_scale(torch.where(is_negative, -inner, inner), spec.scale_format), None, outer)


def _choose_asymmetric(blocks: Tensor, spec: TensorSpec, fmt: Format, clip: float) -> Scale:
    """Unsigned codes over a range that always holds zero, so that zero itself is exact."""
    _, qmax = fmt.code_range(symmetric=False)
    if spec.zero == "mean" and blocks.numel():
        scale, zero, low = choose_mean_zero(blocks, qmax, spec.scale_format)
        return Scale(scale, zero, low=low)
    whole = isinstance(spec.granularity, PerTensor)
    low = _extreme(blocks, whole, lowest=True).clamp(-LARGEST_RANGE, 0.0)  # their difference stays finite
    high = _extreme(blocks, whole).clamp(0.0, LARGEST_RANGE)
    raw = (high - low) * (clip / qmax)
    scale = round_scale(torch.where(raw > 0, raw, 1.0), spec.scale_format)
    zero = (low * (-clip) * scale.reciprocal()).round().clamp(0, qmax)
    return Scale(scale, zero)


@lru_cache
def largest_scale(fmt: Format) -> float:
    """The largest bfloat16 that is finite in float32 times any code of a symmetric format; larger values saturate."""
    code = -fmt.code_range(symmetric=True)[0] if fmt.is_integer else fmt.max
    mantissa, exponent = frexp(torch.finfo(torch.float32).max / code)
    return ldexp(floor(mantissa * 256) / 256, exponent)


def _extreme(x: Tensor, whole: bool, lowest: bool = False) -> Tensor:
    """Maximum (or minimum) of x [..., n] over the last axis, [...], or over the whole, [1, ...]; of nothing it is 0."""
    one = (1,) * (x.ndim - 1)
    if x.numel() == 0:
        return x.new_zeros(one if whole else x.shape[:-1])
    if whole:
        return (x.amin() if lowest else x.amax()).reshape(one)
    return x.amin(-1) if lowest else x.amax(-1)


def _blocks(x: Tensor, spec: TensorSpec) -> Tensor:
    """View x [..., K] as [..., groups, columns]; a short last group is filled with zeros, which no rule notices."""
    size = spec.group_size
    if size is None:
        return x.unsqueeze(-2)
    short = -x.shape[-1] % size
    if short:
        x = torch.nn.functional.pad(x, (0, short))
    blocks: Tensor = x.unflatten(-1, (-1, size))
    return blocks


def _round_blocks(blocks: Tensor, scale: Scale, spec: TensorSpec) -> Tensor:
    """Blocks [..., groups, columns] rounded under scales [..., groups]."""
    fmt = get_format(spec.format)
    effective = scale.effective.unsqueeze(-1)
    if scale.low is not None and scale.zero_point is not None:
        steps = steps_from(blocks, scale.scale.reciprocal(), scale.low, fmt.code_range(symmetric=False)[1])
        return steps.round_().sub_(scale.zero_point.unsqueeze(-1)).mul_(effective)
    scaled = blocks * effective.reciprocal()
    if not fmt.is_integer:
        return _round_float(scaled, fmt).mul_(effective)
    qmin, qmax = fmt.code_range(spec.symmetric)
    codes = scaled.round_()
    if scale.zero_point is None:
        return codes.clamp_(qmin, qmax).mul_(effective)
    zero = scale.zero_point.unsqueeze(-1)
    return codes.add_(zero).clamp_(qmin, qmax).sub_(zero).mul_(effective)


def _block_error(blocks: Tensor, scale: Scale, spec: TensorSpec) -> Tensor:
    """Squared rounding error per scale, shaped like the scale."""
    error = (_round_blocks(blocks, scale, spec) - blocks).square()
    if isinstance(spec.granularity, PerTensor):
        return error.sum().reshape((1,) * (blocks.ndim - 1))
    return error.sum(-1)
