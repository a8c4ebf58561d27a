"""The linears of real models, and what two GPUs would each have of them, through the sm_90a GEMM on a GPU."""

from collections.abc import Iterator
from functools import partial

import pytest

from atom.kernels.bench_linear import fault, tolerance
from atom.kernels.bench_operands import product, random_activation, random_weight
from atom.kernels.cache import compile_together
from atom.kernels.gemm import Gemm, activation_columns, gemm_kernel, pack_weight, token_bucket, token_scales
from atom.kernels.gemm_choice import choose_config
from atom.kernels.refusals_sm90 import weight_kind

from .linear_schemes import linear_scheme

MODELS = {  # hidden size, features of q, k and v, of attention's output, intermediate size
    "smollm2-135m": (576, 960, 576, 1536),
    "gemma-3-270m": (640, 1536, 1024, 2048),
    "qwen2.5-0.5b": (896, 1152, 896, 4864),
    "qwen2.5-1.5b": (1536, 2048, 1536, 8960),
    "tinyllama": (2048, 2560, 2048, 5632),
    "llama-2-7b": (4096, 12288, 4096, 11008),
    "llama-3-8b": (4096, 6144, 4096, 14336),
}
SCHEMES = ("w4a4", "w4a8", "w4a4-hadamard", "w4a16", "w8a8", "fp8", "nvfp4")
TOKENS = (1, 40, 300)


def shapes(model: str) -> Iterator[tuple[int, int]]:
    """(N, K) of qkv, o, gate_up and down, and of their tensor-parallel halves."""
    hidden, qkv, attention, intermediate = MODELS[model]
    yield from ((qkv, hidden), (hidden, attention), (2 * intermediate, hidden), (hidden, intermediate))
    yield from ((qkv // 2, hidden), (hidden, attention // 2), (intermediate, hidden), (hidden, intermediate // 2))


@pytest.fixture(scope="module")
def compiled() -> None:
    configs = set()
    for linear in map(linear_scheme, SCHEMES):
        for N, K in {shape for model in MODELS for shape in shapes(model)}:
            units, outliers = activation_columns(linear, K)[2], linear.outliers.count > 0
            for M in TOKENS:
                kind = weight_kind(linear)
                configs.add(choose_config(kind, token_scales(linear), token_bucket(M), N, units, outliers))
    compile_together([partial(gemm_kernel, config) for config in configs])


@pytest.mark.gpu
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("model", MODELS)
def test_shapes_of_real_models_on_the_gpu(model: str, name: str) -> None:
    """Random operands against float64, three times bit for bit."""
    linear = linear_scheme(name)
    for N, K in shapes(model):
        weight = random_weight(linear, N, K, "cuda")
        gemm = Gemm(pack_weight(linear, weight), token_scales(linear))
        for M in TOKENS:
            x = random_activation(linear, M, K, "cuda")
            wrong = fault(gemm, x.codes, x.scales, product(x, weight, linear), tolerance(linear), 3)
            assert wrong is None, f"M={M} N={N} K={K}: {wrong}"
