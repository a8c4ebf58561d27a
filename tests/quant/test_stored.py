"""What lies in a checkpoint: the table equals the tensors, and the way back is exact to the bit."""

from dataclasses import replace

import pytest
import torch

from atom.quant.granularity import Channel
from atom.quant.mixed import dequantize_weight, fake_quantize_activation, quantize_weight
from atom.quant.rotation import rotate
from atom.quant.rounding import Quantized, fake_quantize
from atom.quant.scales import STORAGE_DTYPES, floor_log2, load_scale, round_scale, store_scale
from atom.quant.schemes import SCALE_FORMATS, LinearScheme, OutlierSpec, TensorSpec
from atom.quant.stored import StoredTensor, load_weight, store_weight, stored_tensors

from .cases import INPUTS, LINEARS, SPECS

every_linear = pytest.mark.parametrize("linear", LINEARS.values(), ids=LINEARS.keys())
# N, K: odd; a group and one; K - outliers shorter than a group; SmolLM2's hidden size; one row
SIZES = [(5, 37), (8, 129), (3, 19), (2, 576), (1, 64)]


@every_linear
@pytest.mark.parametrize(("N", "K"), SIZES)
def test_table_and_round_trip(linear: LinearScheme, N: int, K: int) -> None:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(K)) * 0.05
    quantized = quantize_weight(weight, linear)
    tensors = store_weight(quantized, linear)
    table = stored_tensors(N, K, linear)
    assert {name: StoredTensor(t.dtype, tuple(t.shape)) for name, t in tensors.items()} == table
    assert sum(t.bytes for t in table.values()) == sum(t.numel() * t.element_size() for t in tensors.values())
    loaded = load_weight(tensors, K, linear)
    assert torch.equal(loaded.normal.codes.view(torch.uint8), quantized.normal.codes.view(torch.uint8))
    dense = dequantize_weight(loaded, linear)
    assert dense.shape == (N, K)
    assert torch.equal(dense, dequantize_weight(quantized, linear))


@every_linear
def test_extremes_survive_the_round_trip(linear: LinearScheme) -> None:
    names = ["zeros", "one-huge", "subnormal", "constant-rows", "all-negative"]
    for name in names if linear.rotation else [*names, "largest-bfloat16"]:  # a rotation sums: refused as infinite
        quantized = quantize_weight(INPUTS[name], linear)
        loaded = load_weight(store_weight(quantized, linear), 37, linear)
        assert torch.equal(dequantize_weight(loaded, linear), dequantize_weight(quantized, linear)), name


@every_linear
def test_input_permutation_is_listed(linear: LinearScheme) -> None:
    assert stored_tensors(4, 64, linear, has_input_perm=True)["input_perm"] == StoredTensor(torch.int32, (64,))
    assert "input_perm" not in stored_tensors(4, 64, linear)


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
def test_scales_are_positive_and_stored_exactly(scale_format: str) -> None:
    scale = torch.cat((torch.logspace(-45, 38, 300, dtype=torch.float64).float(), torch.zeros(1)))
    rounded = round_scale(scale, scale_format)
    assert (rounded > 0).all() and torch.isfinite(rounded).all()
    stored = store_scale(rounded, scale_format)
    assert stored.dtype == STORAGE_DTYPES[scale_format]
    assert torch.equal(load_scale(stored, scale_format), rounded)
    assert torch.equal(round_scale(rounded, scale_format), rounded)
    assert (rounded.diff()[:-1] >= 0).all()
    largest = {"e8m0": 2.0**126, "uint4": 15.0}.get(scale_format)  # 1e38 rounds down to 2^126
    dtype = STORAGE_DTYPES[scale_format]
    assert rounded.max() == (largest or min(torch.finfo(dtype).max, torch.tensor(1e38).to(dtype).float().item()))


def test_e8m0_bytes() -> None:
    """Byte b is 2^(b - 127), for all 255 exponents; 255 would be NaN and is never written."""
    exponents = torch.arange(-127, 128.0)
    assert torch.equal(store_scale(torch.exp2(exponents), "e8m0"), torch.arange(255).to(torch.uint8))
    assert torch.equal(load_scale(torch.arange(255).to(torch.uint8), "e8m0").double(), torch.exp2(exponents.double()))
    assert floor_log2(torch.tensor([0.0, 2.0**-127, 0.99, 1.0, 1.99])).tolist() == [-127, -127, -1, 0, 0]


def test_outlier_columns_have_their_own_scale() -> None:
    """Normal columns by the weight's spec, the last ones INT8 with one scale per row, max / 127."""
    linear = LINEARS["outliers-int8"]
    x = torch.randn(3, 48)
    x[:, 32:] *= 50
    got = dequantize_weight(quantize_weight(x, linear), linear)
    assert linear.weight is not None
    assert torch.equal(got[:, :32], fake_quantize(x[:, :32], linear.weight))
    assert torch.equal(got[:, 32:], fake_quantize(x[:, 32:], TensorSpec("int8", Channel())))
    kept = LINEARS["outliers-bf16"]
    assert torch.equal(dequantize_weight(quantize_weight(x, kept), kept)[:, 32:], x[:, 32:].bfloat16().float())


@every_linear
def test_activation_columns(linear: LinearScheme) -> None:
    """Weight-only schemes pass normal columns on; no tokens are fine."""
    x = torch.randn(4, 64)
    got = fake_quantize_activation(x, linear)
    assert got.shape == x.shape and got.dtype == torch.float32
    assert fake_quantize_activation(x[:0], linear).shape == (0, 64)
    normal, _ = linear.split(64)
    if linear.activation is None and linear.rotation is None:
        assert torch.equal(got[:, :normal], x[:, :normal])
    elif linear.activation is not None:
        columns = x[:, :normal] if linear.rotation is None else rotate(x[:, :normal], linear.rotation)
        assert torch.equal(got[:, :normal], fake_quantize(columns, linear.activation))


@pytest.mark.parametrize("fmt", ["int8", "fp8_e4m3", "bf16"])
@pytest.mark.parametrize("column", [0, 47])
def test_nan_is_refused_in_normal_and_outlier_columns(fmt: str, column: int) -> None:
    weight = torch.ones(2, 48)
    weight[1, column] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj holds NaN or infinity"):
        quantize_weight(weight, LINEARS[f"outliers-{fmt}"], "layers.0.q_proj")


def test_outliers_beyond_bfloat16_are_refused() -> None:
    with pytest.raises(ValueError, match="w holds NaN or infinity"):
        quantize_weight(torch.full((2, 32), 3.4e38), LINEARS["outliers-bf16"], "w")


def test_more_outliers_than_inputs_are_refused() -> None:
    linear = replace(LINEARS["outliers-int8"], outliers=OutlierSpec(64))
    with pytest.raises(ValueError, match="64 outlier channels do not fit in 64 inputs"):
        stored_tensors(4, 64, linear)


def test_asymmetric_int8_is_unsigned() -> None:
    q = quantize_weight(INPUTS["randn"], LINEARS["asymmetric-int8"]).normal
    assert isinstance(q, Quantized) and q.codes.dtype == torch.uint8 and q.codes.max() > 127
    assert "w4a4-weight" in SPECS
