"""Producers as implementations of the ops rms_norm_quantize, gated_quantize and permute_quantize on sm_90.

They write what gemm.py reads: codes in bytes [T, columns] (each group padded to 128 columns, outliers to 64) and
float32 scales, [units, T padded to 16] by group or [1, T] by token.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quant.formats import get_format
from ..quant.granularity import Group
from ..quant.rounding import _largest_scale
from ..quant.schemes import LinearScheme
from .activation import Activation, QuantizedActivation
from .cache import kernel_key, kernel_path, load_kernel
from .gemm import ARCH, activation_columns
from .producer_config import ProducerConfig

HERE = Path(__file__).parent
SOURCES = tuple(HERE / name for name in ("producers_sm90.py", "producer_config.py", "dsl/arithmetic.py"))


class QuantizingProducer:
    """One producer of one scheme and permutation."""

    def __init__(self, source: str, linear: LinearScheme, perm: Tensor | None, gain: Tensor | None, eps: float) -> None:
        self.source = source
        self.linear = linear
        self.perm = None if perm is None else perm.to(torch.int32).contiguous()
        self.gain = None if gain is None else gain.float().contiguous()
        self.eps = eps
        self.kernels: dict[tuple[torch.dtype, int], Any] = {}

    @property
    def features(self) -> int:
        """Columns of its input where they are known beforehand, else 0."""
        known = self.gain if self.gain is not None else self.perm
        return 0 if known is None else known.numel()

    def config(self, dtype: torch.dtype, K: int) -> ProducerConfig:
        spec = self.linear.activation
        assert spec is not None
        fmt = get_format(spec.format)
        qmin, qmax = fmt.code_range(True)
        levels = (2**fmt.bits - 1) / 2 if spec.scale_rule == "range" else fmt.max
        assert spec.clip != "mse"
        return ProducerConfig(
            source=self.source,
            granularity="group" if isinstance(spec.granularity, Group) else "token",
            qmin=qmin,
            qmax=qmax,
            ratio=float(spec.clip) / levels,
            bf16_scale=spec.scale_format == "bf16",
            largest_scale=_largest_scale(fmt),
            permuted=self.perm is not None,
            outliers=self.linear.outliers.count > 0,
            dtype=str(dtype).removeprefix("torch."),
            max_columns=-(-K // 1024) * 1024,
        )

    def __call__(self, x: Tensor, up: Tensor | None = None) -> QuantizedActivation:
        """x [T, K] (gate, with up) -> codes and scales."""
        x = x.contiguous()
        tokens, K = x.shape
        columns, _, units = activation_columns(self.linear, K)
        by_group = self.linear.activation is not None and isinstance(self.linear.activation.granularity, Group)
        codes = torch.empty(tokens, columns, dtype=torch.int8, device=x.device)
        shape = (units, -(-tokens // 16) * 16) if by_group else (1, tokens)
        scales = torch.empty(shape, dtype=torch.float32, device=x.device)
        if tokens:
            key = (x.dtype, K)
            if key not in self.kernels:
                self.kernels[key] = producer_kernel(self.config(*key))
            spare = scales.view(-1)
            self.kernels[key](
                x,
                x if up is None else up.contiguous(),
                spare if self.gain is None else self.gain,
                codes.view(torch.int32).view(-1) if self.perm is None else self.perm,
                codes.view(torch.int32),
                scales,
                K - self.linear.outliers.count,
                self.eps,
            )
        return QuantizedActivation(codes, scales)


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


def build_gated_quantize(linear: LinearScheme, kind: str) -> Callable[[Tensor, Tensor], Activation]:
    """Builder of (gate, up) [T, K] -> quantize(act(gate) * up)."""
    return QuantizingProducer(kind, linear, None, None, 0.0)


def build_permute_quantize(linear: LinearScheme, perm: Tensor | None) -> Callable[[Tensor], Activation]:
    """Builder of x [T, K] -> quantize(x[:, perm])."""
    return QuantizingProducer("plain", linear, perm, None, 0.0)
