"""The low-bit GEMM as an implementation of op `linear`: what it refuses, how a weight is packed, the launch.

It takes what the producers of producers.py hand on (codes in bytes, scales by unit) and writes bfloat16. The kernel
itself is gemm_sm90.py; this file and gemm_config.py start no compiler.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quant.mixed import MixedWeight
from ..quant.rounding import Quantized
from ..quant.schemes import LinearScheme
from .activation import Activation, QuantizedActivation
from .allocation import allocator
from .cache import kept_argument, kernel_key, kernel_path, load_kernel
from .gemm_choice import choose_config
from .gemm_config import COUNTER_WORDS, GemmConfig
from .gemm_kinds import KINDS
from .gemm_pack import (
    INT4_COLUMNS,
    PackedWeight,
    pack_channel_scaled,
    pack_group_scaled,
    pack_verbatim,
)
from .gemm_pack_bf16 import pack_by_factor_bf16, pack_group_of_16, pack_group_of_32, pack_row_scaled
from .refusals_sm90 import weight_kind

Launch = tuple[Any, Any, Any, Any, Any, int, int]
"""Kernel, weights, channel scales, bias, scratch memory, INT4 units, most CTAs."""
Output = tuple[tuple[int, int], tuple[int, int], torch.dtype]
"""Shape, strides and dtype."""

ARCH = "sm_90a"
MOST_KEPT = 1024  # tokens of a launch that is looked up by their number; the GPU takes long over more
SCRATCH_WORDS = (
    COUNTER_WORDS + 132 * 2 * 128 * 256
)  # the largest exchange of a split: two CTAs an SM of 128 tokens x 256 rows


def pack_weight(linear: LinearScheme, weight: MixedWeight) -> PackedWeight:
    """A quantized weight as the kernel reads it; on the weight's device."""
    spec, codes, scale, kind = linear.weight, weight.normal.codes, weight.normal.scale, weight_kind(linear)
    assert spec is not None
    if KINDS[kind].is_verbatim:
        return pack_verbatim(codes, scale.scale, kind)
    if kind == "int4_bf16":
        return pack_row_scaled(codes, scale.scale)
    if kind == "int4_uint4_bf16":
        assert scale.outer is not None
        return pack_by_factor_bf16(codes, scale.scale.to(torch.uint8), scale.outer)
    if kind == "e2m1_g32":
        return pack_group_of_32(codes, scale.scale)
    if kind in ("int4_g16", "e2m1_g16"):
        assert scale.outer is not None
        return pack_group_of_16(codes, scale.scale, scale.outer, is_float=spec.format == "e2m1")
    outliers, outlier_scale = None, None
    if weight.outlier is not None:
        assert isinstance(weight.outlier, Quantized)
        outliers, outlier_scale = weight.outlier.codes, weight.outlier.scale.scale
    if kind in ("int4_uint4", "int4_uint4_g32"):
        assert scale.outer is not None and spec.group_size is not None
        factors = scale.scale.to(torch.uint8)
        return pack_channel_scaled(codes, factors, scale.outer, outliers, outlier_scale, spec.group_size)
    return pack_group_scaled(codes, scale.scale, outliers, outlier_scale)


def token_scales(linear: LinearScheme) -> str:
    """Which scales an activation brings with it: "group", "token" or "none".

    "token" is float32 [1, T], with a second row for the scales of INT8 outliers where there are any.
    """
    spec = linear.activation
    if spec is None or (spec.outer is None and spec.scale_format == "e8m0"):
        return "none"
    return "group" if spec.group_size == INT4_COLUMNS and spec.outer is None else "token"


def takes_bf16(linear: LinearScheme) -> bool:
    """Whether activations arrive as bfloat16 values [T, K], not as bytes."""
    return KINDS[weight_kind(linear)].operand == "bf16"


def build_linear(linear: LinearScheme, weight: MixedWeight, bias: Tensor | None) -> Callable[[Activation], Tensor]:
    """Builder of QuantizedActivation of T tokens -> y bfloat16 [T, N]."""
    offset = None if bias is None else bias.to(torch.bfloat16).contiguous()
    return LinearSm90(Gemm(pack_weight(linear, weight), token_scales(linear), offset))


def build_linear_add(
    linear: LinearScheme, weight: MixedWeight, bias: Tensor | None
) -> Callable[[Activation, Tensor], Tensor]:
    """Builder of (QuantizedActivation of T tokens, residual bfloat16 [T, N]) -> residual + y, bfloat16 [T, N]."""
    offset = None if bias is None else bias.to(torch.bfloat16).contiguous()
    return AddingLinearSm90(Gemm(pack_weight(linear, weight), token_scales(linear), offset, adds=True))


class LinearSm90:
    """A Gemm as a quantized linear calls it, again and again: one frame of Python around the kernel."""

    __slots__ = ("allocate", "chosen", "gemm")
    writes_out = True

    def __init__(self, gemm: "Gemm") -> None:
        self.gemm = gemm
        self.chosen = gemm.chosen
        self.allocate = gemm.allocate

    def __call__(self, x: Any, out: Tensor | None = None) -> Tensor:
        """x (a QuantizedActivation) -> y bfloat16 [T, N], in `out` if given: of that shape, contiguous."""
        known = self.chosen.get(x.num_tokens)
        if known is None:  # the first of so many tokens
            return self.gemm(x.packed, x.scale, out)
        (kernel, units, channel, bias, scratch, int4_units, limit), output = known
        y = self.allocate(*output) if out is None else out
        kernel(units, x.packed, x.scale, channel, bias, y, scratch, int4_units, limit)
        return y


@dataclass(frozen=True)
class AddingLinearSm90:
    """A Gemm that adds its products to a residual."""

    gemm: "Gemm"

    def __call__(self, x: Activation, residual: Tensor, out: Tensor | None = None) -> Tensor:
        """residual + y bfloat16 [T, N], in `out` if given: contiguous, and `residual` itself if it pleases."""
        assert isinstance(x, QuantizedActivation), "the GEMM takes what its own producers hand on"
        return self.gemm(x.packed, x.scale, out, residual)


class Gemm:
    """One packed weight, ready to be multiplied with any number of tokens.

    adds   calls bring a residual, to which the products are added
    """

    def __init__(self, weight: PackedWeight, token_scales: str, bias: Tensor | None = None, adds: bool = False) -> None:
        self.weight = weight
        self.adds = adds
        self.token_scales = token_scales
        self.features = weight.features
        self.units = weight.units.view(torch.int32).view(torch.uint32)
        device = self.units.device
        self.bias = torch.empty(1, dtype=torch.bfloat16, device=device) if bias is None else bias
        self.has_bias = bias is not None
        self.channel = weight.channel_scale if weight.channel_scale.numel() else torch.empty(1, device=device)
        self.ctas = 132 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count
        self.device = device
        self.allocate = allocator(device)
        self.buckets: dict[int, Launch] = {}
        self.chosen: dict[int, tuple[Launch, Output]] = {}  # the same and what it writes, by tokens: of few

    def config(self, tokens: int) -> GemmConfig:
        """What runs with so many tokens."""
        weight = self.weight
        config = choose_config(
            weight=weight.kind,
            token_scales=self.token_scales,
            tokens=tokens,
            features=weight.features,
            units=weight.units.shape[1],
            int8_units=weight.int4_units < weight.units.shape[1],
            bias=self.has_bias,
            sms=self.ctas,
        )
        return replace(config, residual=True) if self.adds else config

    def __call__(
        self, codes: Tensor, scales: Tensor, out: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """codes int8 [T, columns] or bfloat16 [T, K], scales float32: see token_scales. Returns bfloat16 [T, N].

        Raises ValueError where a residual is not a contiguous bfloat16 [T, N], or there is none where it adds one.
        """
        tokens = codes.shape[0]
        if self.adds or residual is not None:
            self.check_residual(tokens, residual)
        known = self.chosen.get(tokens)
        if known is None:
            output = output_of(tokens, self.features)
            if tokens == 0:
                return self.allocate(*output) if out is None else out
            known = self.launch_of(token_bucket(tokens)), output
            if tokens <= MOST_KEPT:
                self.chosen[tokens] = known
        (kernel, units, channel, bias, scratch, int4_units, limit), output = known
        y = self.allocate(*output) if out is None else out
        if residual is None:
            kernel(units, codes, scales, channel, bias, y, scratch, int4_units, limit)
        else:
            kernel(units, codes, scales, channel, bias, y, residual, scratch, int4_units, limit)
        return y

    def launch_of(self, bucket: int) -> Launch:
        """What a launch with so many tokens takes, but for what changes from call to call."""
        if bucket not in self.buckets:
            config = self.config(bucket)
            kept = (self.units, self.channel, self.bias, scratch_words(self.device))
            units, channel, bias, scratch = (kept_argument(tensor) for tensor in kept)
            most = config.most_ctas(self.ctas)
            self.buckets[bucket] = (gemm_kernel(config), units, channel, bias, scratch, self.weight.int4_units, most)
        return self.buckets[bucket]

    def check_residual(self, tokens: int, residual: Tensor | None) -> None:
        """Raise ValueError if a call's residual does not fit the kernel."""
        if not self.adds:
            raise ValueError("this GEMM adds no residual, but got one; build it by op linear_add")
        shape = (tokens, self.features)
        if residual is None or residual.shape != shape or residual.dtype != torch.bfloat16:
            got = "none" if residual is None else f"{residual.dtype} {list(residual.shape)}"
            raise ValueError(
                f"a residual must be bfloat16 {list(shape)}, got {got}; use op linear where nothing is added"
            )
        if not residual.is_contiguous():
            raise ValueError(f"a residual must be contiguous, got strides {residual.stride()}; call contiguous()")


@lru_cache(maxsize=4 * MOST_KEPT)
def output_of(tokens: int, features: int) -> Output:
    """What a product writes."""
    return (tokens, features), (features, 1), torch.bfloat16


def token_bucket(tokens: int) -> int:
    """The number of tokens whose config runs `tokens`: a power of two from 16 to 4096, or 96, 192 or 384."""
    for between in (96, 192, 384):
        if between * 2 // 3 < tokens <= between:
            return between
    return min(1 << max(4, (tokens - 1).bit_length()), 4096)


@lru_cache
def scratch_words(device: torch.device) -> Tensor:
    """Where the CTAs of a split exchange partial sums; one for a device, since a stream runs one GEMM's at a time."""
    return torch.zeros(SCRATCH_WORDS, dtype=torch.float32, device=device)


def gemm_kernel(config: GemmConfig) -> Any:
    """The compiled kernel of a config, from memory, disk or compiled now."""

    def compile() -> Any:
        from .gemm_sm90 import compile_gemm

        return compile_gemm(config)

    return load_kernel("gemm_sm90", config, compile, ARCH)


def gemm_path(config: GemmConfig) -> Path:
    """Where the compiled kernel of a config is kept."""
    return kernel_path("gemm_sm90", kernel_key("gemm_sm90", config, ARCH))


def activation_columns(linear: LinearScheme, K: int) -> tuple[int, int, int]:
    """(padded columns of the codes, INT4 units, all units along K) of an input with K features."""
    normal, outliers = linear.split(K)
    groups = -(-normal // INT4_COLUMNS)
    halves = -(-outliers // 64)
    return groups * INT4_COLUMNS + halves * 64, groups, groups + halves
