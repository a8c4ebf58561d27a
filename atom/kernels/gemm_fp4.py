"""NVFP4 and MXFP4 linears on Blackwell, both operands in E2M1 to the end: packing, launches, and what feeds them.

The GEMMs are gemm_fp4_sm100.py (tcgen05, compute capability 10.0) and gemm_fp4_sm120.py (mma.sync, 12.0). Neither has
run on a GPU. Activations are rounded by torch and packed here, op by op: right before it is fast, until somebody with
the hardware has seen the rest run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..quant.mixed import MixedWeight
from ..quant.rounding import Quantized, quantize
from ..quant.schemes import LinearScheme
from .activation import Activation, QuantizedActivation
from .cache import load_kernel
from .fp4_config import Fp4Config
from .fp4_layout import fragment_order, pack_codes, pack_scales
from .gated import Gate, gated_activation
from .norm import rms_norm
from .registry import device_arch


@dataclass(frozen=True)
class Fp4Weight:
    """A weight [N, K] as a kernel reads it.

    codes   uint8 [N, padded K / 2] for sm_100, int32 [row tiles, steps, 32, 4] for sm_120 (fp4_layout.py)
    scales  uint8, in tiles of 128 x 4
    outer   float32 [1], or [N] where each row has its own
    """

    codes: Tensor
    scales: Tensor
    outer: Tensor
    features: int


def pack_weight(weight: Quantized, linear: LinearScheme, arch: str) -> Fp4Weight:
    """Codes uint8 [N, K] and their scales, packed for the kernel of an architecture."""
    spec = linear.weight
    assert spec is not None and spec.group_size is not None
    features, K = weight.codes.shape
    outer = torch.ones(1, device=weight.codes.device) if weight.scale.outer is None else weight.scale.outer.reshape(-1)
    packed = pack_codes(weight.codes)
    return Fp4Weight(
        codes=packed if arch == "sm_100" else fragment_order(packed),
        scales=pack_scales(weight.scale.scale, K, spec.group_size),
        outer=outer.float().contiguous(),
        features=features,
    )


def quantize_fp4(values: Tensor, linear: LinearScheme) -> QuantizedActivation:
    """float32 [T, K] -> packed codes, tiles of scales, and the float32 scale of each token where the scheme has one."""
    spec = linear.activation
    assert spec is not None and spec.group_size is not None
    found = quantize(values, spec)
    outer = None if found.scale.outer is None else found.scale.outer[:, 0].contiguous()
    scales = pack_scales(found.scale.scale, values.shape[1], spec.group_size)
    return QuantizedActivation(pack_codes(found.codes), scales, len(values), outer=outer)


class LinearFp4:
    """x @ w.T + bias for one packed weight and any number of tokens."""

    def __init__(self, linear: LinearScheme, weight: MixedWeight, bias: Tensor | None) -> None:
        self.arch = device_arch(weight.normal.codes.device)
        self.weight = pack_weight(weight.normal, linear, self.arch)
        spec = linear.activation
        assert spec is not None and spec.group_size is not None
        device = self.weight.codes.device
        self.bias = torch.zeros(1, dtype=torch.bfloat16, device=device) if bias is None else bias.to(torch.bfloat16)
        self.config = Fp4Config(
            group_size=spec.group_size,
            token_scaled=spec.outer == "token",
            channel_scaled=self.weight.outer.numel() > 1,
            bias=bias is not None,
        )
        self.kernel = fp4_kernel(self.config, self.arch)

    def __call__(self, x: Activation) -> Tensor:
        """What quantize_fp4 makes of [T, K] -> bfloat16 [T, N]."""
        assert isinstance(x, QuantizedActivation), "the GEMM takes what its own producers hand on"
        w, tokens = self.weight, x.num_tokens
        y = torch.empty((tokens, w.features), dtype=torch.bfloat16, device=w.codes.device)
        if tokens:
            outer = w.outer if x.outer is None else x.outer
            operands = [w.codes, w.scales, x.packed, x.scale]
            if self.arch == "sm_120":
                operands = [t.view(torch.int32).view(torch.uint32) for t in operands]
            self.kernel(*operands, w.outer, outer, self.bias, y)
        return y


def fp4_kernel(config: Fp4Config, arch: str) -> Any:
    """The compiled kernel of a config, from memory, disk or compiled now."""
    name = f"gemm_fp4_{arch.replace('_', '')}"

    def compile() -> Any:
        if arch == "sm_100":
            from .gemm_fp4_sm100 import compile_gemm
        else:
            from .gemm_fp4_sm120 import compile_gemm
        return compile_gemm(config)

    return load_kernel(name, config, compile, f"{arch}a")


def build_linear(linear: LinearScheme, weight: MixedWeight, bias: Tensor | None) -> Callable[[Activation], Tensor]:
    """Builder of QuantizedActivation of T tokens -> y bfloat16 [T, N]."""
    return LinearFp4(linear, weight, bias)


def permuted(values: Tensor, perm: Tensor | None, linear: LinearScheme) -> QuantizedActivation:
    return quantize_fp4(values.float() if perm is None else values.float()[:, perm], linear)


def build_permute_quantize(linear: LinearScheme, perm: Tensor | None) -> Callable[[Tensor], Activation]:
    """Builder of x [T, K] -> quantize(x[:, perm])."""
    return partial(permuted, perm=perm, linear=linear)


def build_rms_norm_quantize(
    linear: LinearScheme, perm: Tensor | None, weight: Tensor, eps: float
) -> Callable[[Tensor], Activation]:
    """Builder of x [T, K] -> quantize(rms_norm(x)[:, perm])."""
    return lambda x: permuted(rms_norm(x, weight, eps), perm, linear)


def build_gated_quantize(linear: LinearScheme, kind: Gate) -> Callable[[Tensor, Tensor], Activation]:
    """Builder of (gate, up) [T, K] -> quantize(act(gate) * up)."""
    return lambda gate, up: permuted(gated_activation(gate.float(), up.float(), kind), None, linear)
