"""What a FlashInfer-Trace solution of ours calls: stored tensors in, our kernels, plain tensors out."""

from typing import Any

import torch
from torch import Tensor

from ..quant.presets import get_scheme
from ..quant.schemes import LinearScheme
from ..quant.stored import load_weight, stored_tensors
from .activation import PERMUTE_QUANTIZE, QuantizedActivation
from .gated import GATED_QUANTIZE
from .linear import LINEAR
from .norm import ADD_RMS_NORM_QUANTIZE, RMS_NORM_QUANTIZE
from .registry import Problem, device_arch

_weights: dict[tuple[str, int], Any] = {}


def run_linear(scheme: str, tensors: dict[str, Tensor]) -> Tensor:
    """round(x) @ w.T, bfloat16 [M, N]. The weight is packed at its first use and kept under its address."""
    linear = get_scheme(scheme).for_linear("x")
    x, packed = tensors["x"], tensors["weight_packed"]
    problem = Problem(device_arch(x.device), linear, packed.shape[0], x.shape[1])
    key = (scheme, packed.data_ptr())
    if key not in _weights:
        stored = stored_tensors(packed.shape[0], x.shape[1], linear)
        own = {name: tensors[name].view(stored[name].dtype) for name in stored}
        weight = load_weight(own, x.shape[1], linear)
        produce = PERMUTE_QUANTIZE.choose(problem).build(linear, None)
        _weights[key] = (produce, LINEAR.choose(problem).build(linear, weight, None))
    produce, multiply = _weights[key]
    y: Tensor = multiply(produce(x))
    return y.to(torch.bfloat16)


def run_producer(op: str, scheme: str, tensors: dict[str, Tensor]) -> Any:
    """The op's output, dequantized to float32 [M, K]; with the sum before it where it adds."""
    linear = get_scheme(scheme).for_linear("x")
    x = tensors["gate" if op == "gated_quantize" else "x"]
    perm = tensors["perm"].long() if "perm" in tensors else None
    problem = Problem(device_arch(x.device), linear, K=x.shape[1])
    if op == "gated_quantize":
        return dequantized(GATED_QUANTIZE.choose(problem).build(linear, "silu")(x, tensors["up"]), linear, x.shape[1])
    if op == "permute_quantize":
        return dequantized(PERMUTE_QUANTIZE.choose(problem).build(linear, perm)(x), linear, x.shape[1])
    if op == "rms_norm_quantize":
        run = RMS_NORM_QUANTIZE.choose(problem).build(linear, perm, tensors["weight"], 1e-5)
        return dequantized(run(x), linear, x.shape[1])
    run = ADD_RMS_NORM_QUANTIZE.choose(problem).build(linear, perm, tensors["weight"], 1e-5)
    total, y = run(tensors["residual"], x)
    return total, dequantized(y, linear, x.shape[1])


def dequantized(found: Any, linear: LinearScheme, K: int) -> Tensor:
    """What a producer handed on as float32 [M, K]: reference producers hand on just that."""
    if isinstance(found, Tensor):
        return found
    assert isinstance(found, QuantizedActivation)
    spec, codes, M = linear.activation, found.packed, found.packed.shape[0]
    if codes.dtype == torch.bfloat16:
        values = codes[:, :K].float()
        return values if spec is None or spec.outer is None else values * found.scale.T
    assert spec is not None
    normal, outliers = linear.split(K)
    values = codes.view(torch.float8_e4m3fn).float() if spec.format == "fp8_e4m3" else codes.float()
    if not spec.group_size:
        return values[:, :K] * found.scale.T
    groups = -(-normal // spec.group_size)
    units = groups if spec.outer is None else 1  # scales of a token, before that of its outliers
    scale = found.scale[:units, :M].T
    if units == groups:
        scale = scale.repeat_interleave(spec.group_size, 1)[:, :normal]
    whole: Tensor = values[:, :normal] * scale
    if outliers:
        start = -(-normal // 128) * 128
        whole = torch.cat((whole, values[:, start : start + outliers] * found.scale[units, :M, None]), 1)
    return whole
