"""The torch references against float64 mathematics, with and without rounding."""

import math

import pytest
import torch

from atom.kernels.activation import PERMUTE_QUANTIZE
from atom.kernels.gated import GATED_QUANTIZE, Gate, gated_activation
from atom.kernels.linear import LINEAR, LINEAR_ADD
from atom.kernels.norm import RMS_NORM_QUANTIZE, rms_norm
from atom.quant.granularity import Channel, Group, Token
from atom.quant.mixed import fake_quantize_activation, quantize_weight
from atom.quant.schemes import LinearScheme, OutlierSpec, TensorSpec

FULL = LinearScheme()
INT8 = LinearScheme(TensorSpec("int8", Channel()), TensorSpec("int8", Token(), dynamic=True))
ATOM = LinearScheme(
    TensorSpec("int4", Group(16), clip=0.85, scale_rule="range"),
    TensorSpec("int4", Group(16), dynamic=True, clip=0.9),
    OutlierSpec(16),
    reorder=True,
)
SCHEMES = pytest.mark.parametrize("linear", [FULL, INT8, ATOM], ids=["full", "int8", "atom"])
TOKENS = pytest.mark.parametrize("T", [0, 1, 5])
K = 72  # 56 normal columns with 16 outliers: no multiple of the group


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


PERM = torch.randperm(K, generator=torch.Generator().manual_seed(1))


def check_rounded(got: torch.Tensor, exact: torch.Tensor, linear: LinearScheme) -> None:
    """got is exact (float64) rounded by the scheme; codes may differ by one step where float32 falls beside a tie."""
    assert got.dtype == torch.float32
    rounded = fake_quantize_activation(exact.float(), linear)
    far = (got - rounded).abs() > 1e-5 * (1 + rounded.abs())
    assert far.float().mean() < 0.01 if far.numel() else got.shape == rounded.shape
    if linear is not FULL and got.numel():
        assert not torch.allclose(got.double(), exact, rtol=1e-4, atol=1e-4)  # it was rounded at all


@SCHEMES
@TOKENS
@pytest.mark.parametrize("perm", [None, PERM], ids=["", "permuted"])
def test_rms_norm_quantize(linear: LinearScheme, T: int, perm: torch.Tensor | None) -> None:
    x, weight, eps = randn(T, K) * 3, randn(K, seed=2), 1e-5
    got = RMS_NORM_QUANTIZE.reference(linear, perm, weight, eps)(x)
    d = x.double()
    exact = d / (d.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    check_rounded(got, exact if perm is None else exact[:, perm], linear)


def test_rms_norm_alone() -> None:
    for x in (randn(3, K), randn(3, K) * 1e-6, torch.zeros(2, K), randn(3, K).bfloat16(), randn(3, K) * 1e15):
        weight = randn(K, seed=2)
        d = x.double()
        exact = d / (d.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
        assert torch.allclose(rms_norm(x, weight, 1e-6).double(), exact, rtol=1e-5, atol=1e-12)


@SCHEMES
@TOKENS
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated_quantize(linear: LinearScheme, T: int, kind: Gate) -> None:
    gate, up = randn(T, K), randn(T, K, seed=3)
    g = gate.double()
    if kind == "silu":
        act = g / (1 + (-g).exp())
    else:
        act = 0.5 * g * (1 + (math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)).tanh())
    got = GATED_QUANTIZE.reference(linear, kind)(gate, up)
    check_rounded(got, act * up.double(), linear)
    assert gated_activation(gate.bfloat16(), up.bfloat16(), kind).dtype == torch.bfloat16


@SCHEMES
@TOKENS
def test_permute_quantize(linear: LinearScheme, T: int) -> None:
    x = randn(T, K)
    gathered = torch.stack([x[:, int(p)] for p in PERM], 1)
    for perm, expected in ((PERM, gathered), (None, x)):
        got = PERMUTE_QUANTIZE.reference(linear, perm)(x)
        assert torch.equal(got, fake_quantize_activation(expected, linear))


@pytest.mark.parametrize("linear", [INT8, ATOM], ids=["int8", "atom"])
@TOKENS
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_against_products_of_codes(linear: LinearScheme, T: int, has_bias: bool) -> None:
    """y = sum over groups of (codes . codes) * scale_x * scale_w, in float64."""
    x, w = randn(T, K), randn(7, K, seed=4)
    bias = randn(7, seed=5) if has_bias else None
    weight = quantize_weight(w, linear)
    rounded = fake_quantize_activation(x, linear)
    got = LINEAR.reference(linear, weight, bias)(rounded)
    residual = (10 * randn(T, 7, seed=6)).bfloat16()
    added = LINEAR_ADD.reference(linear, weight, bias)(rounded, residual)
    assert torch.equal(added, residual + got.bfloat16())
    normal, _ = linear.split(K)
    codes, scale = weight.normal.codes.double(), weight.normal.scale.scale.double()
    step = linear.weight.group_size or normal  # type: ignore[union-attr]
    exact = torch.zeros(T, 7, dtype=torch.float64)
    for i, start in enumerate(range(0, normal, step)):
        columns = slice(start, min(start + step, normal))
        exact += rounded[:, columns].double() @ codes[:, columns].T * scale[:, i]
    if weight.outlier is not None:
        outlier = weight.outlier
        exact += rounded[:, normal:].double() @ outlier.codes.double().T * outlier.scale.scale.double()[:, 0]  # type: ignore[union-attr]
    exact += 0 if bias is None else bias.double()
    assert got.shape == (T, 7) and torch.allclose(got.double(), exact, rtol=1e-5, atol=1e-4)


def test_one_hot_inputs_return_the_weight() -> None:
    weight = quantize_weight(randn(7, K, seed=4), ATOM)
    columns = LINEAR.reference(ATOM, weight, None)(torch.eye(K))
    normal, _ = ATOM.split(K)
    expanded = weight.normal.scale.scale.repeat_interleave(16, 1)[:, :normal]
    assert torch.equal(columns.T[:, :normal], weight.normal.codes.float() * expanded)


def test_permuting_both_sides_keeps_the_product() -> None:
    """Columns of w and of x in the same order: the permutation of a scheme costs nothing but its rounding."""
    x, w = randn(3, K), randn(7, K, seed=4)
    spec = TensorSpec("int8", Channel())
    linear = LinearScheme(spec)
    plain = LINEAR.reference(linear, quantize_weight(w, linear), None)(x)
    permuted = LINEAR.reference(linear, quantize_weight(w[:, PERM], linear), None)(x[:, PERM])
    assert torch.allclose(plain, permuted, atol=1e-5)
