"""Producers as implementations of the ops rms_norm_quantize, gated_quantize and permute_quantize on sm_90.

They write what gemm.py reads: codes in bytes [T, columns] (each group padded to 128 columns, outliers to 64) or
bfloat16 values [T, K padded to 8], and float32 scales: [units, T padded to 16] by group, [1, T] by token, or [2, T] by
token with outliers under one of their own. What pads is zero.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quant.schemes import LinearScheme
from .activation import Activation, QuantizedActivation
from .allocation import Allocate, allocator
from .cache import kept_argument, kernel_key, kernel_path, load_kernel
from .filled_rows import FilledRows
from .gather_order import gather_orders, selector
from .gemm import ARCH, activation_columns, token_scales
from .producer_config import CHUNK, FEW_TOKENS, ProducerConfig, producer_config


@dataclass(frozen=True, slots=True)
class Plan:
    """What one launch of a producer needs to know, found out once for a dtype, a width and a range of token counts.

    allocate memory for what is written
    width    columns of a row of codes
    dtype    of the codes
    scales   what stands for scales where there are none, [1, 1]
    rows     of the scales, 0 where there are none
    pads     whether their rows are filled up to a multiple of 16 tokens
    gain     of the norm in the order of the kernel's slots (producer_config.py), or anything
    columns  that the slots hold, behind the permutation, or anything
    unused   for what the kernel does not read: a row of the input's dtype
    limit    CTAs that fit the GPU at a time
    """

    kernel: Any
    allocate: Allocate
    width: int
    dtype: torch.dtype
    scales: Tensor
    rows: int
    pads: bool
    gain: Any
    columns: Any
    unused: Any
    limit: int


class QuantizingProducer:
    """One producer of one scheme and permutation."""

    def __init__(self, source: str, linear: LinearScheme, perm: Tensor | None, gain: Tensor | None, eps: float) -> None:
        self.source = source
        self.linear = linear
        self.perm = None if perm is None else perm.to(torch.int32).contiguous()
        self.gain = None if gain is None else gain.float().contiguous()
        self.eps = eps
        self.plans: dict[tuple[torch.dtype, int, bool, bool], Plan] = {}

    @property
    def features(self) -> int:
        """Columns of its input where they are known beforehand, else 0."""
        known = self.gain if self.gain is not None else self.perm
        return 0 if known is None else known.numel()

    def config(self, dtype: torch.dtype, K: int, strided: bool = False, tokens: int = 1) -> ProducerConfig:
        return producer_config(self.source, self.linear, dtype, K, self.perm is not None, strided, tokens)

    def configs(self, dtype: torch.dtype, K: int, strided: bool = False) -> set[ProducerConfig]:
        """Every kernel that any number of tokens runs with."""
        return {self.config(dtype, K, strided, tokens) for tokens in (1, FEW_TOKENS + 1)}

    def __call__(
        self,
        x: Tensor,
        other: Tensor | None = None,
        total: Tensor | None = None,
        *,
        out: QuantizedActivation | None = None,
    ) -> QuantizedActivation:
        """x [T, K], other (up, or the residual) [T, K] -> codes and scales, as atom/kernels/gemm.py takes them.

        total   [T, K], takes the sum with the residual
        out     what a call with as many tokens returned: written anew, so that nothing is allocated
        """
        tokens, K = x.shape
        strided = not x.is_contiguous() or (other is not None and not other.is_contiguous())
        if strided and (K % CHUNK or self.source not in ("silu", "gelu_tanh")):
            x, other, strided = x.contiguous(), None if other is None else other.contiguous(), False
        key = (x.dtype, K, strided, tokens > FEW_TOKENS)
        plan = self.plans.get(key)
        if plan is None:
            plan = self.plans[key] = self.plan(x.dtype, K, strided, tokens, x.device)
        if out is None:
            allocate, width, scales = plan.allocate, plan.width, plan.scales
            codes = allocate((tokens, width), (width, 1), plan.dtype)
            if plan.rows:
                columns = -(-tokens // 16) * 16 if plan.pads else tokens
                scales = allocate((plan.rows, columns), (columns, 1), torch.float32)
            out = QuantizedActivation(codes, scales, tokens)
        if tokens:
            unused = plan.unused
            other, total = unused if other is None else other, unused if total is None else total
            plan.kernel(x, other, total, plan.gain, plan.columns, out.packed, out.scale, self.eps, plan.limit)
        return out

    def plan(self, dtype: torch.dtype, K: int, strided: bool, tokens: int, device: torch.device) -> Plan:
        _, _, units = activation_columns(self.linear, K)
        config = self.config(dtype, K, strided, tokens)
        gain, columns = self.in_slots(config, device)
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        scales, kernel = token_scales(self.linear), producer_kernel(config)
        return Plan(
            kernel=FilledRows(kernel, config) if K % CHUNK else kernel,
            allocate=allocator(device),
            width=config.width,
            dtype=torch.bfloat16 if config.writes_bf16 else torch.int8,
            scales=torch.empty(1, 1, device=device),
            rows={"group": units, "token": 1 + (config.outliers > 0), "none": 0}[scales],
            pads=scales == "group",
            gain=kept_argument(gain),
            columns=kept_argument(columns),
            unused=kept_argument(torch.empty(1, config.row_chunks * CHUNK, dtype=dtype, device=device)),
            limit=multiprocessors * config.ctas_per_sm,
        )

    def in_slots(self, config: ProducerConfig, device: torch.device) -> tuple[Tensor, Tensor]:
        """(gain, columns) in the order in which a kernel's slots take them, one word where there is none.

        Where the kernel reorders, the words that put each chunk's codes back in place follow the columns.
        """
        K = config.columns
        gain, columns = (torch.zeros(1, dtype=dtype, device=device) for dtype in (torch.float32, torch.int32))
        if self.gain is None and self.perm is None:
            return gain, columns
        held = torch.tensor(config.slot_columns(), device=device)
        if self.perm is not None:
            columns = held = torch.cat((self.perm, self.perm.new_tensor([K])))[held]
            if config.reorders:
                orders = gather_orders(held.tolist(), config.run, config.dtype_bytes)
                moved = [CHUNK * chunk + place for chunk, order in enumerate(orders) for place in order]
                held = held[torch.tensor(moved, device=device)]
                back = torch.tensor([selector(order) for order in orders], device=device)  # int64: of 32 bits
                columns = torch.cat((held, (back - (back >> 31 << 32)).to(torch.int32)))
        if self.gain is not None:
            gain = torch.cat((self.gain, self.gain.new_zeros(1)))[held.long()]
        if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(device).synchronize()  # a launch reads both before what is in front has ended
        return gain, columns


def producer_kernel(config: ProducerConfig) -> Any:
    """The compiled kernel of a config, from memory, disk or compiled now."""

    def compile() -> Any:
        from .producers_sm90 import compile_producer

        return compile_producer(config)

    return load_kernel("producers_sm90", config, compile, ARCH)


def producer_path(config: ProducerConfig) -> Path:
    """Where the compiled kernel of a config is kept."""
    return kernel_path("producers_sm90", kernel_key("producers_sm90", config, ARCH))


def build_rms_norm_quantize(
    linear: LinearScheme, perm: Tensor | None, weight: Tensor, eps: float
) -> Callable[[Tensor], Activation]:
    """Builder of x [T, K] -> quantize(rms_norm(x)[:, perm])."""
    return QuantizingProducer("norm", linear, perm, weight, eps)


class AddingProducer:
    """(residual, update) -> (their sum, quantize(rms_norm(sum)[:, perm]))."""

    def __init__(self, producer: QuantizingProducer) -> None:
        assert producer.gain is not None
        self.producer = producer
        self.allocate = allocator(producer.gain.device)

    def __call__(
        self, residual: Tensor, update: Tensor, *, total: Tensor | None = None, out: QuantizedActivation | None = None
    ) -> tuple[Tensor, Activation]:
        """total   takes the sum if given: a contiguous [T, K] that is neither of the inputs

        out     see QuantizingProducer
        """
        if total is None:
            tokens, K = residual.shape
            total = self.allocate((tokens, K), (K, 1), residual.dtype)
        return total, self.producer(update, residual, total, out=out)


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
