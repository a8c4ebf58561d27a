"""Producers as implementations of the ops rms_norm_quantize, gated_quantize and permute_quantize on sm_90.

They write what gemm.py reads: codes in bytes [T, columns] (each group padded to 128 columns, outliers to 64) or
bfloat16 values [T, K], and float32 scales, [units, T padded to 16] by group or [1, T] by token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quant.schemes import LinearScheme
from .activation import Activation, QuantizedActivation
from .cache import kernel_key, kernel_path, load_kernel
from .gemm import ARCH, activation_columns, takes_bf16, token_scales
from .producer_config import ProducerConfig, producer_config

HERE = Path(__file__).parent
SOURCES = tuple(
    HERE / name
    for name in (
        "producers_sm90.py",
        "producer_encode_sm90.py",
        "producer_config.py",
        "dsl/arithmetic.py",
        "dsl/memory.py",
    )
)


@dataclass(frozen=True)
class Plan:
    """What one launch of a producer needs to know, found out once for a dtype and width.

    words   32-bit words of a row of codes
    dtype   of the codes as the GEMM takes them
    scales  "group", "token" or "none", see gemm.token_scales
    units   along K
    normal  columns before the outliers
    """

    kernel: Any
    words: int
    dtype: torch.dtype
    scales: str
    units: int
    normal: int

    def scales_shape(self, tokens: int) -> tuple[int, int]:
        if self.scales == "group":
            return self.units, -(-tokens // 16) * 16
        return (1, tokens) if self.scales == "token" else (1, 1)


class QuantizingProducer:
    """One producer of one scheme and permutation."""

    def __init__(self, source: str, linear: LinearScheme, perm: Tensor | None, gain: Tensor | None, eps: float) -> None:
        self.source = source
        self.linear = linear
        self.perm = None if perm is None else perm.to(torch.int32).contiguous()
        self.gain = None if gain is None else gain.float().contiguous()
        self.eps = eps
        self.plans: dict[tuple[torch.dtype, int, bool], Plan] = {}

    @property
    def features(self) -> int:
        """Columns of its input where they are known beforehand, else 0."""
        known = self.gain if self.gain is not None else self.perm
        return 0 if known is None else known.numel()

    def config(self, dtype: torch.dtype, K: int, strided: bool = False) -> ProducerConfig:
        return producer_config(self.source, self.linear, dtype, K, self.perm is not None, strided)

    def __call__(self, x: Tensor, other: Tensor | None = None) -> QuantizedActivation:
        """x [T, K] -> codes and scales, as atom/kernels/gemm.py takes them.

        x      what is rounded, or the gate, or what is added to the residual, and is overwritten with their sum
        other  up, or the residual
        """
        strided = not (x.is_contiguous() and (other is None or other.is_contiguous()))
        if strided and self.source not in ("silu", "gelu_tanh"):
            x, other, strided = x.contiguous(), None if other is None else other.contiguous(), False
        tokens, K = x.shape
        key = (x.dtype, K, strided)
        plan = self.plans.get(key)
        if plan is None:
            plan = self.plans[key] = self.plan(*key)
        words = torch.empty((tokens, plan.words), dtype=torch.int32, device=x.device)
        scales = torch.empty(plan.scales_shape(tokens), dtype=torch.float32, device=x.device)
        if tokens:
            gain = scales.view(-1) if self.gain is None else self.gain
            perm = words.view(-1) if self.perm is None else self.perm
            plan.kernel(x, x if other is None else other, gain, perm, words, scales, plan.normal, self.eps)
        return QuantizedActivation(words.view(plan.dtype), scales)

    def plan(self, dtype: torch.dtype, K: int, strided: bool) -> Plan:
        columns, _, units = activation_columns(self.linear, K)
        is_bf16 = self.linear.weight is None or takes_bf16(self.linear)
        return Plan(
            kernel=producer_kernel(self.config(dtype, K, strided)),
            words=K // 2 if is_bf16 else columns // 4,
            dtype=torch.bfloat16 if is_bf16 else torch.int8,
            scales=token_scales(self.linear),
            units=units,
            normal=K - self.linear.outliers.count,
        )


def producer_kernel(config: ProducerConfig) -> Any:
    """The compiled kernel of a config, from memory, disk or compiled now."""

    def compile() -> Any:
        from .producers_sm90 import compile_producer

        return compile_producer(config)

    return load_kernel("producers_sm90", config, SOURCES, compile, ARCH)


def producer_path(config: ProducerConfig) -> Path:
    """Where the compiled kernel of a config is kept."""
    return kernel_path("producers_sm90", kernel_key("producers_sm90", config, SOURCES, ARCH))


def build_rms_norm_quantize(
    linear: LinearScheme, perm: Tensor | None, weight: Tensor, eps: float
) -> Callable[[Tensor], Activation]:
    """Builder of x [T, K] -> quantize(rms_norm(x)[:, perm])."""
    return QuantizingProducer("norm", linear, perm, weight, eps)


@dataclass(frozen=True)
class AddingProducer:
    """(residual, update) -> (their sum, quantize(rms_norm(sum)[:, perm])); the sum takes the place of the update."""

    producer: QuantizingProducer

    def __call__(self, residual: Tensor, update: Tensor) -> tuple[Tensor, Activation]:
        total = update.contiguous()
        return total, self.producer(total, residual)


def build_add_rms_norm_quantize(
    linear: LinearScheme, perm: Tensor | None, weight: Tensor, eps: float
) -> Callable[[Tensor, Tensor], tuple[Tensor, Activation]]:
    """Builder of (residual, update) [T, K] each -> (residual + update, quantize(rms_norm(that)[:, perm]))."""
    return AddingProducer(QuantizingProducer("add_norm", linear, perm, weight, eps))


def build_gated_quantize(linear: LinearScheme, kind: str) -> Callable[[Tensor, Tensor], Activation]:
    """Builder of (gate, up) [T, K] -> quantize(act(gate) * up)."""
    return QuantizingProducer(kind, linear, None, None, 0.0)


def build_permute_quantize(linear: LinearScheme, perm: Tensor | None) -> Callable[[Tensor], Activation]:
    """Builder of x [T, K] -> quantize(x[:, perm])."""
    return QuantizingProducer("plain", linear, perm, None, 0.0)
