"""The sm_90a GEMM's numbers on a GPU: against float64, one-hot rows, bit for bit again and again."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from atom.kernels import bench_operands
from atom.kernels.bench import SHAPES as MODELS
from atom.kernels.bench_linear import fault, tolerance
from atom.kernels.bench_operands import product, random_activation, random_weight
from atom.kernels.cache import compile_together
from atom.kernels.flashinfer_solution import dequantized
from atom.kernels.gemm import (
    Gemm,
    activation_columns,
    build_linear,
    gemm_kernel,
    pack_weight,
    token_bucket,
    token_scales,
)
from atom.kernels.gemm_choice import choose_config
from atom.kernels.gemm_config import GemmConfig
from atom.kernels.gemm_kinds import KINDS
from atom.kernels.gemm_pack import pack_verbatim
from atom.kernels.producers import QuantizingProducer, producer_kernel
from atom.kernels.refusals_sm90 import refuses_producer, weight_kind
from atom.kernels.registry import Problem
from atom.quant.formats import get_format
from atom.quant.mixed import dequantize_weight, fake_quantize_activation, quantize_weight
from atom.quant.rounding import Quantized, code_values, expand_scale
from atom.quant.schemes import LinearScheme, TensorSpec

from .linear_schemes import gemm_schemes, linear_scheme

GPU = pytest.mark.gpu
# a tail row tile, a tail unit, one unit more; an odd N; SmolLM2's 576 with outliers is 3.5 groups
SHAPES = ((576, 576), (999, 512), (2048, 2048))
SHAPES_OF_BOTH = (*SHAPES, (200, 509))  # of producer and GEMM together; K is odd
TOKENS = (0, 1, 3, 16, 63, 64, 65, 129, 250, 300, 1000, 2100, 8192)
ADDED_TOKENS = (3, 64, 129, 1000)
OPERAND = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn, "bf16": torch.bfloat16}


LAYER_TOKENS = (1, 17, 31, 32, 64, 100, 160, 256, 330, 1030)


@pytest.fixture(scope="module")
def compiled() -> None:
    """All kernels of the tests below, compiled in parallel: one by one they would take minutes."""
    configs, producers = set(), set()
    for name, linear in gemm_schemes().items():
        for N, K in SHAPES_OF_BOTH:
            if refuses_producer(Problem("sm_90", linear, N, K)) is None:
                perm = torch.arange(K) if linear.reorder else None
                producers |= QuantizingProducer("plain", linear, perm, None, 0.0).configs(torch.bfloat16, K)
        for N, K in (*SHAPES_OF_BOTH, (200, 512), (208, 512), (200, 4096), (208, 4096), (200, 255)):
            packed = pack_weight(linear, random_weight(linear, N, K, "cpu"))
            for bias in (None, torch.zeros(N)):
                gemm = Gemm(packed, token_scales(linear), bias)
                configs |= {gemm.config(token_bucket(M)) for M in (*TOKENS, 512) if M}
            if name in ADDING and (N, K) in SHAPES[:2]:
                gemm = Gemm(packed, token_scales(linear), adds=True)
                configs |= {gemm.config(token_bucket(M)) for M in ADDED_TOKENS}
        for N, K in MODELS["llama-3-8b"].values():
            kind, units, outliers = weight_kind(linear), activation_columns(linear, K)[2], linear.outliers.count > 0
            for M in LAYER_TOKENS:
                configs.add(choose_config(kind, token_scales(linear), token_bucket(M), N, units, outliers))
        if name in COMPETING_SCHEMES:
            configs |= {competing(linear, tile, N, **more) for tile, more in COMPETING for N in (1000, 136)}
    jobs: list[Any] = [partial(producer_kernel, config) for config in producers]
    compile_together([*jobs, *(partial(gemm_kernel, config) for config in configs)])


INTEGER = [name for name, x in gemm_schemes().items() if x.activation and get_format(x.activation.format).is_integer]


@pytest.fixture(params=gemm_schemes())
def scheme(request: pytest.FixtureRequest) -> LinearScheme:
    return gemm_schemes()[request.param]


@GPU
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", SHAPES_OF_BOTH, ids=str)
def test_linear_on_the_gpu(scheme: LinearScheme, shape: tuple[int, int], bias: bool) -> None:
    """Producer and GEMM against float64 from the dequantized operands, fresh inputs, every element, twice the same.

    A rotation's sums round in another order here and there: behind one, the codes that the producer wrote are taken.
    """
    N, K = shape
    if (reason := refuses_producer(Problem("sm_90", scheme, N, K))) is not None:
        pytest.skip(reason)
    weight = torch.randn(N, K, device="cuda") * 0.05
    weight[0, 0] = -2.0
    mixed = quantize_weight(weight, scheme)
    dense = dequantize_weight(mixed, scheme).double()
    offset = torch.randn(N, device="cuda").bfloat16() if bias else None
    run = build_linear(scheme, mixed, offset)
    coarse = max(1e-4, tolerance(scheme))
    for M in TOKENS:
        x = torch.randn(M, K, device="cuda").bfloat16()
        perm = torch.randperm(K, device="cuda") if scheme.reorder else None
        activation = QuantizingProducer("plain", scheme, perm, None, 0.0)(x)
        seen = x.float() if perm is None else x.float()[:, perm]
        rounded = fake_quantize_activation(seen, scheme)
        if scheme.rotation is not None:
            handed = dequantized(activation, scheme, K)
            assert M == 0 or float(((handed - rounded).abs() > 2e-6 * rounded.abs()).float().mean()) < 2e-2
            rounded = handed
        expected = rounded.double() @ dense.T
        if offset is not None:
            expected = expected + offset.double()
        y = run(activation)
        assert y.shape == (M, N) and torch.equal(y, run(activation))
        error = (y.double() - expected).abs()
        assert bool((error <= expected.abs() * 2**-8 + coarse * expected.abs().mean()).all()), f"M={M}"


@GPU
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_operands_on_the_gpu(scheme: LinearScheme, shape: tuple[int, int]) -> None:
    """Every code under every scale of the formats, against float64, twenty times bit for bit."""
    N, K = shape
    weight = random_weight(scheme, N, K, "cuda")
    gemm = Gemm(pack_weight(scheme, weight), token_scales(scheme))
    for M in (1, 16, 37, 64, 129, 250, 300, 2100, 16384):
        x = random_activation(scheme, M, K, "cuda")
        assert fault(gemm, x.codes, x.scales, product(x, weight, scheme), tolerance(scheme), 20) is None, f"M={M}"


@GPU
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("K", [255, 509])
def test_any_number_of_columns_on_the_gpu(scheme: LinearScheme, K: int) -> None:
    """K that is no multiple of anything; behind each row of bfloat16 stands no number."""
    weight = random_weight(scheme, 200, K, "cuda")
    gemm = Gemm(pack_weight(scheme, weight), token_scales(scheme))
    for M in (1, 16, 64, 250):
        x = random_activation(scheme, M, K, "cuda")
        assert fault(gemm, x.codes, x.scales, product(x, weight, scheme), tolerance(scheme), 20) is None, f"M={M}"


@GPU
@pytest.mark.usefixtures("compiled")
def test_strided_rows_on_the_gpu(scheme: LinearScheme) -> None:
    """Activations that are columns of a wider matrix, whose other bytes are anything; refused where TMA cannot go."""
    K = 509
    weight = random_weight(scheme, 200, K, "cuda")
    gemm = Gemm(pack_weight(scheme, weight), token_scales(scheme))
    for M in (3, 64, 250):
        x = random_activation(scheme, M, K, "cuda")
        rows, columns = x.codes.shape
        wide = torch.full((rows, -(-columns // 16) * 16 + 64), 127, dtype=x.codes.dtype, device="cuda")
        expected = gemm(x.codes, x.scales)
        for first, right in ((32, True), (1, False)):
            strided = wide[:, first : first + columns]
            strided.copy_(x.codes)
            if right:
                assert torch.equal(gemm(strided, x.scales), expected)
            else:
                with pytest.raises(ValueError, match="alignment"):
                    gemm(strided, x.scales)
        if columns % 8:
            with pytest.raises(ValueError, match="strides"):
                gemm(x.codes.clone(memory_format=torch.contiguous_format), x.scales)


@GPU
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("count", [0, 16, 112, 208, 256])
def test_outliers_of_any_count_on_the_gpu(count: int) -> None:
    """Outlier units that are not full, behind INT4 columns that are no whole number of groups."""
    scheme = linear_scheme("w4a4")
    scheme = replace(scheme, outliers=replace(scheme.outliers, count=count))
    for N, K in ((576, 576), (200, 1400)):
        weight = random_weight(scheme, N, K, "cuda")
        gemm = Gemm(pack_weight(scheme, weight), token_scales(scheme))
        for M in (1, 16, 64, 250):
            x = random_activation(scheme, M, K, "cuda")
            assert fault(gemm, x.codes, x.scales, product(x, weight, scheme), tolerance(scheme), 20) is None, f"M={M}"


ADDING = ("w4a4", "w4a8", "w4a16", "fp8", "nvfp4")


@GPU
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", ADDING)
@pytest.mark.parametrize("N", [576, 999])
def test_residual_on_the_gpu(name: str, N: int) -> None:
    """The same bits as the product and then a sum, in a matrix of its own and in place."""
    scheme, K = linear_scheme(name), 512
    packed, scales = pack_weight(scheme, random_weight(scheme, N, K, "cuda")), token_scales(scheme)
    plain, adding = Gemm(packed, scales), Gemm(packed, scales, adds=True)
    for M in ADDED_TOKENS:
        x = random_activation(scheme, M, K, "cuda")
        residual = torch.randn(M, N, device="cuda").bfloat16() * 5
        expected = residual + plain(x.codes, x.scales)
        assert torch.equal(adding(x.codes, x.scales, residual=residual), expected)
        assert torch.equal(adding(x.codes, x.scales, residual, residual), expected)


@GPU
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("layer", MODELS["llama-3-8b"])
def test_layers_on_the_gpu(scheme: LinearScheme, layer: str) -> None:
    """The shapes of Llama 3 8B, with what they run with from 1 to 1030 tokens: random operands, three times."""
    N, K = MODELS["llama-3-8b"][layer]
    weight = random_weight(scheme, N, K, "cuda")
    gemm = Gemm(pack_weight(scheme, weight), token_scales(scheme))
    for M in LAYER_TOKENS:
        x = random_activation(scheme, M, K, "cuda")
        assert fault(gemm, x.codes, x.scales, product(x, weight, scheme), tolerance(scheme), 3) is None, f"M={M}"


@GPU
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("scheme", INTEGER, indirect=True)
def test_largest_sums_on_the_gpu(scheme: LinearScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every code at an end of its range, under the largest factor, 14336 columns: the largest sums of either sign."""
    draw = bench_operands._random

    def at_the_ends(spec: TensorSpec, rows: int, columns: int, device: torch.device | str) -> Quantized:
        found = draw(spec, rows, columns, device)
        found.codes[::2], found.codes[1::2] = get_format(spec.format).code_range(True)
        if spec.scale_format == "uint4":
            found.scale.scale.fill_(15)
        return found

    monkeypatch.setattr(bench_operands, "_random", at_the_ends)
    N, K = MODELS["llama-3-8b"]["down"]
    weight = random_weight(scheme, N, K, "cuda")
    gemm = Gemm(pack_weight(scheme, weight), token_scales(scheme))
    for M in (1, 64, 256, 1030):
        x = random_activation(scheme, M, K, "cuda")
        assert fault(gemm, x.codes, x.scales, product(x, weight, scheme), tolerance(scheme), 3) is None, f"M={M}"


LONE = {"clustered": False}
COMPETING_SCHEMES = ("w4a4", "w4a8", "w8a8", "fp8")
COMPETING: tuple[tuple[int, dict[str, Any]], ...] = (  # of a sweep: tile, and what else
    (16, {"warpgroups": 4, "ways": 4}),
    (16, {"warpgroups": 4, "ways": 4, "split": 2, **LONE}),
    (64, {"warpgroups": 4, "ways": 4}),
    (64, {"warpgroups": 4, "ways": 4, "split": 2, **LONE}),
    (64, {"warpgroups": 2, "ctas_per_sm": 2, "bounded": True}),
    (64, {"warpgroups": 2, "split": 4, **LONE}),
    (128, {"warpgroups": 2, "ways": 2, "split": 2, **LONE}),
)


def competing(linear: LinearScheme, tile: int, N: int, **more: Any) -> GemmConfig:
    """A config that no problem is given, but a sweep may try."""
    outliers = linear.outliers.count > 0
    config = GemmConfig(weight_kind(linear), "token", tile, int8_units=outliers, aligned=N % 8 == 0, **more)
    return config.with_most_stages()


@GPU
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", COMPETING_SCHEMES)
@pytest.mark.parametrize("tile,more", COMPETING, ids=str)
def test_configs_that_compete_on_the_gpu(name: str, tile: int, more: dict[str, Any]) -> None:
    """Random operands against float64, a hundred times bit for bit, where K ends within a round of the ring."""
    linear = linear_scheme(name)
    for M, N, K in ((tile, 1000, 2048), (tile - 3, 136, 1400)):
        weight, x = random_weight(linear, N, K, "cuda"), random_activation(linear, M, K, "cuda")
        gemm, config = Gemm(pack_weight(linear, weight), "token"), competing(linear, tile, N, **more)
        gemm.config = lambda tokens, config=config: config
        assert fault(gemm, x.codes, x.scales, product(x, weight, linear), tolerance(linear), 100) is None


@GPU
@pytest.mark.usefixtures("compiled")
def test_one_hot_rows_return_the_weights(scheme: LinearScheme) -> None:
    """x = unit vectors: each output is one weight, exactly."""
    N, K = 200, 512
    mixed = quantize_weight(torch.randn(N, K, device="cuda"), scheme)
    packed, kind = pack_weight(scheme, mixed), KINDS[weight_kind(scheme)]
    codes = torch.eye(K, packed.columns, device="cuda").to(OPERAND[kind.operand])
    scales = token_scales(scheme)
    rows = 2 if scheme.outliers.count else 1
    scale = torch.ones((packed.units.shape[1], K) if scales == "group" else (rows, K), device="cuda")
    y = Gemm(packed, scales)(codes.view(torch.int8) if kind.operand == "e4m3" else codes, scale)
    outer = mixed.normal.scale.outer
    dense = dequantize_weight(mixed, scheme)
    if outer is not None:  # the kernel rounds (code x scale) x outer once
        assert scheme.weight is not None
        normal = K - scheme.outliers.count
        inner = expand_scale(mixed.normal.scale.scale, normal, scheme.weight)
        dense[:, :normal] = code_values(mixed.normal.codes, get_format(scheme.weight.format)) * inner * outer
    assert torch.equal(y, dense.T.bfloat16())


def products_of_e4m3(M: int, N: int, K: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float64 [M, N] of random operands: exact, ours with fast sums, torch's with fast accumulation."""
    scheme = linear_scheme("fp8-fast")
    weight, x = random_weight(scheme, N, K, "cuda"), random_activation(scheme, M, K, "cuda")
    ours = Gemm(pack_weight(scheme, weight), "token")(x.codes, x.scales).double()
    codes, columns = (part.contiguous().view(torch.float8_e4m3fn) for part in (x.codes[:, :K], weight.normal.codes))
    scales = x.scales.reshape(M, 1), weight.normal.scale.scale.reshape(1, N)
    torchs = torch._scaled_mm(codes, columns.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True).double()
    return product(x, weight, scheme), ours, torchs


@GPU
@pytest.mark.usefixtures("compiled")
def test_fast_sums_are_those_of_torch_on_the_gpu() -> None:
    """What the tensor cores keep of a sum of E4M3 products is what they keep for `use_fast_accum`."""
    _, ours, torchs = products_of_e4m3(250, 208, 512)
    apart = (ours - torchs).abs() > torchs.abs() * 2**-7 + 1e-4 * torchs.abs().mean()
    assert float(apart.float().mean()) < 1e-3


@GPU
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("layer", ["o", "down"])
def test_fast_sums_err_no_more_than_torch_s_on_the_gpu(layer: str) -> None:
    """Long sums, which either may form in an order of its own."""
    exact, ours, torchs = products_of_e4m3(1030, *MODELS["llama-3-8b"][layer])
    error, torchs_error = ((y - exact).square().mean().sqrt() for y in (ours, torchs))
    assert float(error) < 1.05 * float(torchs_error)


@GPU
@pytest.mark.usefixtures("compiled")
def test_whole_numbers_add_up_exactly_in_fp8() -> None:
    """Codes up to 8 in E4M3: sums of 128 products stay within 14 bits, and longer ones are float32."""
    M, N, K = 65, 200, 4096
    w = torch.randint(-8, 9, (N, K), device="cuda")
    x = torch.randint(-8, 9, (M, K), device="cuda")
    packed = pack_verbatim(w.to(torch.float8_e4m3fn), torch.full((N, 1), 2.0**-6, device="cuda"), "e4m3")
    y = Gemm(packed, "token")(x.to(torch.float8_e4m3fn).view(torch.int8), torch.ones(1, M, device="cuda"))
    assert torch.equal(y, (x.double() @ w.double().T * 2**-6).float().bfloat16())
