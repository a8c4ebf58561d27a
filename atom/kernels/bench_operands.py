"""Random operands over the whole range of a scheme's codes, as the GEMM takes them, and their product in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..quant.formats import get_format
from ..quant.granularity import Channel, Token
from ..quant.mixed import MixedWeight, dequantize_weight
from ..quant.rounding import Quantized, Scale, code_values
from ..quant.schemes import LinearScheme, TensorSpec
from .gemm import activation_columns, takes_bf16, token_scales


@dataclass(frozen=True)
class RandomActivation:
    """What a producer would hand on, and what it stands for.

    codes   int8 [M, columns] or bfloat16 [M, K]
    scales  float32, see gemm.token_scales
    values  float64 [M, K], the columns in the weight's order
    """

    codes: Tensor
    scales: Tensor
    values: Tensor


def random_weight(linear: LinearScheme, N: int, K: int, device: torch.device | str) -> MixedWeight:
    """A weight [N, K] of random codes and scales; -8 and the other ends of the range occur."""
    assert linear.weight is not None
    normal, outliers = linear.split(K)
    main = _random(linear.weight, N, normal, device)
    if not outliers:
        return MixedWeight(main)
    spec = linear.outliers.spec(Channel(), dynamic=False)
    assert spec is not None
    return MixedWeight(main, _random(spec, N, outliers, device))


def random_activation(linear: LinearScheme, M: int, K: int, device: torch.device | str) -> RandomActivation:
    """An activation of M tokens of random codes and scales, in the layout of the producers."""
    spec, kind = linear.activation, token_scales(linear)
    if spec is None:
        x = torch.randn(M, K, device=device).bfloat16()
        return RandomActivation(aligned_rows(x), torch.ones(1, 1, device=device), x.double())
    normal, outliers = linear.split(K)
    found = _random(spec, M, normal, device)
    values = code_values(found.codes, get_format(spec.format)).double()
    size = spec.group_size
    inner = found.scale.scale.repeat_interleave(size, 1)[:, :normal] if size else found.scale.scale
    outer = found.scale.outer if found.scale.outer is not None else torch.ones(M, 1, device=device)
    dense = values * inner.double() * outer.double()
    if takes_bf16(linear):
        scales = outer.T.contiguous() if kind == "token" else torch.ones(1, 1, device=device)
        return RandomActivation(aligned_rows((values * inner).to(torch.bfloat16)), scales, dense)
    columns, groups, units = activation_columns(linear, K)
    codes = torch.zeros(M, columns, dtype=torch.int8, device=device)
    codes[:, :normal] = found.codes.view(torch.int8)
    by_factor = spec.scale_format == "uint4"
    if by_factor:
        codes[:, :normal] = values * inner
    if kind == "token" and not outliers:
        return RandomActivation(codes, (outer if by_factor else found.scale.scale).T.contiguous(), dense)
    scales = torch.full((2, M) if by_factor else (units, -(-M // 16) * 16), float("nan"), device=device)
    groups_of_scales = 1 if by_factor else groups
    scales[:groups_of_scales, :M] = (outer if by_factor else found.scale.scale).T
    if outliers:
        tail_spec = linear.outliers.spec(Token(), dynamic=True)
        assert tail_spec is not None
        tail = _random(tail_spec, M, outliers, device)
        codes[:, groups * 128 : groups * 128 + outliers] = tail.codes
        scales[groups_of_scales:, :M] = tail.scale.scale.T
        dense = torch.cat((dense, tail.codes.double() * tail.scale.scale.double()), 1)
    return RandomActivation(codes, scales, dense)


def aligned_rows(x: Tensor) -> Tensor:
    """bfloat16 [M, K] as the GEMM reads it: each row at a multiple of 16 bytes, and no number behind its end."""
    if x.shape[1] % 8 == 0:
        return x
    apart = torch.full((x.shape[0], -(-x.shape[1] // 8) * 8), float("nan"), dtype=x.dtype, device=x.device)
    apart[:, : x.shape[1]] = x
    return apart[:, : x.shape[1]]


def product(x: RandomActivation, weight: MixedWeight, linear: LinearScheme) -> Tensor:
    """float64 [M, N] of what the operands stand for."""
    return x.values @ dequantize_weight(weight, linear).double().T


def _random(spec: TensorSpec, rows: int, columns: int, device: torch.device | str) -> Quantized:
    fmt = get_format(spec.format)
    if fmt.is_integer:
        low, high = fmt.code_range(True)
        codes = torch.randint(low, high + 1, (rows, columns), device=device).to(torch.int8)
    elif fmt.name == "e2m1":
        codes = torch.randint(0, 16, (rows, columns), device=device).to(torch.uint8)
    else:
        codes = torch.randn(rows, columns, device=device).to(fmt.dtype)
    shape = spec.granularity.scale_shape((rows, columns))
    draw = torch.rand(shape, device=device)
    scale = {
        "uint4": (draw * 15 + 1).floor(),
        "e8m0": torch.exp2((draw * 8).floor() - 8),
        "e4m3": (draw * 300 + 0.01).to(torch.float8_e4m3fn).float(),
        "bf16": (draw * 1e-2 + 1e-3).bfloat16().float(),
    }.get(spec.scale_format, draw * 1e-2 + 1e-3)
    if spec.outer is None:
        return Quantized(codes, Scale(scale))
    outer = torch.rand(1 if spec.outer == "tensor" else rows, 1, device=device) * 1e-3 + 1e-4
    if spec.scale_format == "uint4":  # as large as INT8 outliers beside it
        outer = outer * 10
    return Quantized(codes, Scale(scale, None, outer))
