"""The sm_90a GEMM: its packing and configs on a CPU, its machine code without a GPU, its numbers on one."""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from atom.kernels.bench_linear import fault, tolerance
from atom.kernels.bench_operands import product, random_activation, random_weight
from atom.kernels.cache import compile_together
from atom.kernels.gemm import Gemm, build_linear, gemm_kernel, pack_weight, token_bucket, token_scales
from atom.kernels.gemm_choice import choose_config
from atom.kernels.gemm_config import SHARED_BYTES, GemmConfig
from atom.kernels.gemm_kinds import KINDS
from atom.kernels.gemm_pack import (
    CODE_BYTES,
    UNIT_ROWS,
    fragment_index,
    pack_channel_scaled,
    pack_group_scaled,
    pack_int4_codes,
    pack_int8_codes,
    pack_verbatim,
)
from atom.kernels.producers import QuantizingProducer
from atom.kernels.refusals_sm90 import refuses_linear, refuses_producer, refuses_scheme, weight_kind
from atom.kernels.registry import Problem
from atom.quant.formats import get_format
from atom.quant.granularity import Group
from atom.quant.mixed import dequantize_weight, fake_quantize_activation, quantize_weight
from atom.quant.presets import PRESETS, get_scheme
from atom.quant.rounding import code_values, expand_scale
from atom.quant.schemes import LinearScheme, OutlierSpec, RotationSpec

from .linear_schemes import linear_scheme

HAS_DSL = importlib.util.find_spec("cutlass") is not None or importlib.util.find_spec("nvidia_cutlass_dsl") is not None

GPU = pytest.mark.gpu


def schemes() -> dict[str, LinearScheme]:
    linear = {name: get_scheme(name).for_linear("x") for name in PRESETS if name != "bf16"}
    return linear | {name: linear_scheme(name) for name in ("w4a4-bf16", "w4a4-g32", "w4a4-g64", "w4a8-g32")}


# a tail row tile, a tail unit, one unit more; an odd N; SmolLM2's 576 with outliers is 3.5 groups
SHAPES = ((576, 576), (999, 512), (2048, 2048))
TOKENS = (0, 1, 3, 16, 63, 64, 65, 129, 250, 300, 1000, 2100, 8192)
ADDED_TOKENS = (3, 64, 129, 1000)


def test_fragment_index_covers_a_unit_once() -> None:
    row, column = fragment_index(128)
    assert torch.equal(
        torch.sort((row * 128 + column).flatten())[0].unique(), torch.sort((row * 128 + column).flatten())[0]
    )
    both = torch.cat(((row * 128 + column).flatten(), ((row + 8) * 128 + column).flatten()))
    assert torch.equal(both.sort()[0], torch.arange(64 * 128))
    row, column = fragment_index(64)
    assert torch.equal((row * 64 + column).flatten().sort()[0], torch.arange(64 * 64))


def test_int4_units_hold_each_code_where_wgmma_reads_it() -> None:
    codes = torch.randint(-8, 8, (100, 300), dtype=torch.int8)
    words = pack_int4_codes(codes).view(2, 3, 2, 128, 4, 4)  # [row tile, unit, half, thread, word, byte]
    padded = torch.nn.functional.pad(codes, (0, 84, 0, 28))
    for thread, word, byte in ((0, 0, 0), (5, 3, 2), (33, 7, 1), (127, 6, 3)):
        g, q = thread % 32 // 4, thread % 4
        row, column = 16 * (thread // 32) + g, 32 * (word // 2) + 16 * (word % 2) + 4 * q + byte
        for tile in range(2):
            for unit in range(3):
                value = int(words[tile, unit, word // 4, thread, word % 4, byte])
                signed = [(n ^ 8) - 8 for n in (value & 15, value >> 4)]
                wanted = padded[tile * 64 + row : tile * 64 + row + 9 : 8, unit * 128 + column].tolist()
                assert signed == wanted


def test_int8_units_hold_each_code_where_wgmma_reads_it() -> None:
    codes = torch.randint(-128, 128, (64, 64), dtype=torch.int8)
    words = pack_int8_codes(codes).view(2, 128, 4, 4)  # [half, thread, word, byte]
    row, column = fragment_index(64)
    for half in range(2):
        for word in range(4):
            wanted = codes[row[:, 4 * half + word], column[:, 4 * half + word]]
            assert torch.equal(words[half, :, word].view(torch.int8), wanted)


def test_scales_stand_behind_their_units() -> None:
    codes = torch.zeros(70, 200, dtype=torch.int8)
    scale = torch.rand(70, 2).bfloat16()
    packed = pack_group_scaled(codes, scale, torch.zeros(70, 16, dtype=torch.int8), torch.rand(70, 1).bfloat16())
    assert packed.units.shape == (2, 3, CODE_BYTES + 128) and packed.int4_units == 2 and packed.columns == 320
    stored = packed.units[0, :2, CODE_BYTES:].contiguous().view(torch.bfloat16)
    assert torch.equal(stored.T.float() * 16, scale[:UNIT_ROWS].float())
    assert not packed.units[1, :, CODE_BYTES + 12 :].any(), "rows that do not exist have zero scales"


def test_integer_factors_beyond_four_bits_are_refused() -> None:
    codes, channel = torch.zeros(64, 128, dtype=torch.int8), torch.ones(64, 1)
    with pytest.raises(ValueError, match="at most 15"):
        pack_channel_scaled(codes, torch.full((64, 1), 16, dtype=torch.uint8), channel)


@pytest.mark.parametrize("name", schemes())
def test_presets_that_the_kernel_claims(name: str) -> None:
    assert refuses_scheme(schemes()[name]) is None


@pytest.mark.parametrize("name", schemes())
def test_presets_run_unasked(name: str) -> None:
    assert refuses_linear(Problem("sm_90", schemes()[name], 512, 512)) is None


def refused() -> dict[str, tuple[LinearScheme, str]]:
    nvfp4, w4a4, fp8 = (get_scheme(name).for_linear("x") for name in ("nvfp4", "w4a4", "fp8"))
    assert w4a4.activation is not None and nvfp4.weight is not None and fp8.weight is not None
    return {
        "full precision": (LinearScheme(), "not quantized"),
        "rotated": (replace(nvfp4, rotation=RotationSpec("block_hadamard", 512)), "at most 256"),
        "fp8 weights, bf16 activations": (LinearScheme(fp8.weight), "fp8_e4m3 activations"),
        "fp8 outliers": (replace(w4a4, outliers=OutlierSpec(128, "fp8_e4m3")), "INT8 columns"),
        "nvfp4 with outliers": (replace(nvfp4, outliers=OutlierSpec(16), reorder=True), "INT4 activations"),
        "groups of 32 under e4m3": (LinearScheme(replace(nvfp4.weight, granularity=Group(32))), "no kernel yet"),
        "e2m1 in groups of 128": (LinearScheme(replace(nvfp4.weight, granularity=Group(128))), "no kernel yet"),
        "small weight groups, INT4 tokens": (LinearScheme(nvfp4.weight, w4a4.activation), "no kernel yet"),
    }


@pytest.mark.parametrize("name", refused())
def test_schemes_that_it_refuses_with_a_reason(name: str) -> None:
    linear, reason = refused()[name]
    assert reason in str(refuses_scheme(linear))


@pytest.mark.parametrize("features,units", [(576, 5), (4096, 33), (28672, 33), (4096, 112), (896, 70), (64, 1)])
@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 128, 192, 256, 1024, 4096])
@pytest.mark.parametrize("weight", KINDS)
def test_configs_fit_the_machine(weight: str, tokens: int, features: int, units: int) -> None:
    config = choose_config(weight, "token", tokens, features, units)
    assert 2 <= config.stages <= 16
    assert config.ctas_per_sm * (config.pool_bytes + 2048) <= SHARED_BYTES + 2048
    assert config.split <= min(8, units), "a portable cluster, and a unit for every CTA of it"
    tiles = -(-features // (64 * config.warpgroups)) * -(-tokens // config.tile_m)
    assert config.clustered or tiles * config.split <= 132, "CTAs that wait for each other are all resident"


LLAMA = ((6144, 33), (4096, 33), (28672, 33), (4096, 113))  # features and units along K of Llama-3-8B, w4a4
TOKEN_SCALES = {"int4": "group", "int4_bf16": "none", "e2m1_g32": "none"}  # of a kind; else "token"


def chosen() -> list[GemmConfig]:
    """One config of each tile that the Llama-3-8B shapes run with, and some that only odd shapes or benchmarks meet."""
    found: dict[object, GemmConfig] = {}
    for weight in KINDS:
        outliers = weight == "int4"
        for tokens in (16, 64, 4096):
            for features, units in LLAMA[:: 1 if weight in ("int4", "e4m3") else 3]:
                config = choose_config(weight, TOKEN_SCALES.get(weight, "token"), tokens, features, units, outliers)
                found.setdefault((weight, config.tile_m, config.warpgroups, config.multicast), config)
    others = [
        GemmConfig("int4", "token", 64, 4, bias=True),
        GemmConfig("int4", "token", 16, 4, split=4),
        GemmConfig("int4", "group", 16, 4, split=4, pairs=True),
        GemmConfig("int4_uint4", "token", 16, 4, split=8, clustered=False, int8_units=True),
        GemmConfig("int4_uint4", "token", 16, 4, int8_units=True, ways=4),
        GemmConfig("int4_uint4", "token", 96, 2, int8_units=True),
        GemmConfig("int4_uint4", "token", 192, 2, int8_units=True),
        GemmConfig("int4_uint4", "token", 64, 4, split=8, clustered=False, int8_units=True),
        GemmConfig("int4_uint4", "token", 16, 4, split=4, int8_units=True),
        GemmConfig("int4_uint4", "token", 256, 2, int8_units=True),
        GemmConfig("int4", "group", 128, 2, int8_units=True, aligned=False),
        GemmConfig("int4_uint4", "token", 256, 2, multicast=2),
        GemmConfig("int4_uint4", "token", 64, 4, int8_units=True, ways=4, split=2, clustered=False),
        GemmConfig("int4_uint4", "token", 16, 4, ways=4),
        GemmConfig("int4_uint4", "token", 128, 2, int8_units=True, ways=2, split=2, clustered=False),
        GemmConfig("int8", "token", 16, 4, ways=4),
        GemmConfig("int4_uint4", "token", 128, 4, int8_units=True),
        GemmConfig("int4_uint4", "token", 64, 2, int8_units=True, ctas_per_sm=2),
        GemmConfig("int4", "group", 16, 4, split=8, int8_units=True, clustered=False),
    ]
    return list(dict.fromkeys([*found.values(), *(config.with_most_stages() for config in others)]))


OPERAND = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn, "bf16": torch.bfloat16}
WGMMA = {"int8": "IGMMA", "e4m3": "QGMMA", "bf16": "HGMMA"}


def name_of(config: GemmConfig) -> str:
    units = "-outliers" if config.int8_units else ""
    return f"{config.weight}-{config.token_scales}{units}-{config.tile_m}x{config.warpgroups}-split{config.split}"


@pytest.mark.slow
@pytest.mark.skipif(not HAS_DSL, reason="the CuTe DSL is not installed; pip install atom-serving[kernels]")
@pytest.mark.parametrize("config", chosen(), ids=name_of)
def test_machine_code(config: GemmConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_machine_code(config, tmp_path, monkeypatch)


def check_machine_code(config: GemmConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles for sm_90a without a GPU; uses its wgmma and bulk copies, spills nothing, serializes no wgmma."""
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_90a")
    from atom.kernels.gemm_sm90 import compile_gemm

    compiled = compile_gemm(config, f"--keep-cubin --dump-dir {tmp_path}")
    sass = disassemble(compiled.__cubin__, tmp_path)  # type: ignore[attr-defined]
    assert {op for op in WGMMA.values() if op in sass} == {WGMMA[config.kind.operand]}
    assert "UBLKCP" in sass and "UTMALDG" in sass
    assert not re.findall(r"\b(?:LDL|STL)\b", sass), "registers spilled"
    # one ARRIVE for each group of wgmmas: more mean that ptxas serialized them; the last of those that run on while
    # the next unit is waited for has a wait of its own
    runs_on = config.kind.is_verbatim and not config.kind.promoted
    assert sass.count("WARPGROUP.ARRIVE") + runs_on == sass.count("WARPGROUP.DEPBAR")
    assert not overwritten_operands(sass), "a register that wgmma may still read is written"


def overwritten_operands(sass: str) -> list[str]:
    """Instructions between a wgmma and its wait that write one of the registers it takes A from.

    ptxas does not keep them apart: a load placed there once got A's registers, and results changed from run to run.
    """
    found, reading = [], set()
    for line in sass.splitlines():
        match = re.search(r"\*/\s+(?:@!?U?P\d+ )?([A-Z][\w.]*)\s+(.*);", line)
        if match is None:
            continue
        opcode, operands = match.groups()
        if opcode.startswith(("IGMMA", "HGMMA", "QGMMA")):
            source = re.match(r"R\d+, (?:R(\d+), )?gdesc", operands)
            assert source is not None, line
            if source[1] is not None:  # else A comes from shared memory
                reading |= set(range(int(source[1]), int(source[1]) + 4))
        elif opcode.startswith("WARPGROUP.DEPBAR"):
            reading = set()
        elif reading and (target := re.match(r"R(\d+)", operands)) and not opcode.startswith(("ST", "RED", "SYNCS")):
            width = 4 if ".128" in opcode else 2 if ".64" in opcode or ".WIDE" in opcode else 1
            if reading & set(range(int(target[1]), int(target[1]) + width)):
                found.append(line.strip())
    return found


def test_overwritten_operands_are_found() -> None:
    racy = """
        /*0010*/ IGMMA.64x64x32.S8.S8.SAT R24, R56, gdesc[UR12], RZ, !UPT ;
        /*0020*/ LDS.128 R56, [R2+UR7+0xe400] ;
        /*0030*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0040*/ LDS.128 R56, [R2+UR7+0xe400] ;
    """
    assert len(overwritten_operands(racy)) == 1


def disassemble(cubin: bytes, folder: Path) -> str:
    spec = importlib.util.find_spec("nvidia")
    tools = [
        t for root in (spec.submodule_search_locations or [] if spec else []) for t in Path(root).glob("*/bin/nvdisasm")
    ]
    if not tools:
        pytest.skip("nvdisasm is not installed; pip install nvidia-cuda-nvdisasm")
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    return subprocess.run([str(tools[0]), "-c", str(path)], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def compiled() -> None:
    """All kernels of the GPU tests below, compiled in parallel: one by one they would take minutes."""
    configs = set()
    for name, linear in schemes().items():
        for N, K in (*SHAPES, (200, 512), (200, 4096)):
            packed = pack_weight(linear, random_weight(linear, N, K, "cpu"))
            for bias in (None, torch.zeros(N)):
                gemm = Gemm(packed, token_scales(linear), bias)
                configs |= {gemm.config(token_bucket(M)) for M in (*TOKENS, 512) if M}
            if name in ADDING and (N, K) in SHAPES[:2]:
                gemm = Gemm(packed, token_scales(linear), adds=True)
                configs |= {gemm.config(token_bucket(M)) for M in ADDED_TOKENS}
    compile_together([partial(gemm_kernel, config) for config in configs])


@pytest.fixture(params=schemes())
def scheme(request: pytest.FixtureRequest) -> LinearScheme:
    return schemes()[request.param]


@GPU
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_on_the_gpu(scheme: LinearScheme, shape: tuple[int, int], bias: bool) -> None:
    """Producer and GEMM against float64 from the dequantized operands, fresh inputs, every element, twice the same."""
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
        expected = fake_quantize_activation(seen, scheme).double() @ dense.T
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


ADDING = ("w4a4", "w4a8", "w4a16", "fp8", "nvfp4")


@GPU
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", ADDING)
@pytest.mark.parametrize("N", [576, 999])
def test_residual_on_the_gpu(name: str, N: int) -> None:
    """The same bits as the product and then a sum, in a matrix of its own and in place."""
    scheme, K = schemes()[name], 512
    packed, scales = pack_weight(scheme, random_weight(scheme, N, K, "cuda")), token_scales(scheme)
    plain, adding = Gemm(packed, scales), Gemm(packed, scales, adds=True)
    for M in ADDED_TOKENS:
        x = random_activation(scheme, M, K, "cuda")
        residual = torch.randn(M, N, device="cuda").bfloat16() * 5
        expected = residual + plain(x.codes, x.scales)
        assert torch.equal(adding(x.codes, x.scales, residual=residual), expected)
        assert torch.equal(adding(x.codes, x.scales, residual, residual), expected)


def test_residuals_that_do_not_fit_are_refused() -> None:
    scheme = schemes()["w4a8"]
    packed = pack_weight(scheme, random_weight(scheme, 64, 128, "cpu"))
    x = random_activation(scheme, 3, 128, "cpu")
    adding = Gemm(packed, token_scales(scheme), adds=True)
    with pytest.raises(ValueError, match="got none; use op linear"):
        adding(x.codes, x.scales)
    with pytest.raises(ValueError, match=r"must be bfloat16 \[3, 64\], got torch.float32"):
        adding(x.codes, x.scales, residual=torch.zeros(3, 64))
    with pytest.raises(ValueError, match=r"contiguous, got strides \(128, 1\)"):
        adding(x.codes, x.scales, residual=torch.zeros(3, 128, dtype=torch.bfloat16)[:, :64])
    with pytest.raises(ValueError, match="build it by op linear_add"):
        Gemm(packed, token_scales(scheme))(x.codes, x.scales, residual=torch.zeros(3, 64, dtype=torch.bfloat16))


LONE = {"clustered": False}
COMPETING = [  # of a sweep: tile, warpgroups, and what else
    (16, 4, {"ways": 4}),
    (16, 4, {"ways": 4, "split": 2, **LONE}),
    (64, 4, {"ways": 4}),
    (64, 4, {"ways": 4, "split": 2, **LONE}),
    (64, 2, {"ctas_per_sm": 2, "bounded": True}),
    (64, 2, {"split": 4, **LONE}),
    (128, 2, {"ways": 2, "split": 2, **LONE}),
]


def fixed(config: GemmConfig) -> Any:
    """What stands for Gemm.config."""
    return lambda tokens: config.with_most_stages()


@GPU
@pytest.mark.parametrize("name", ["w4a4", "w4a8", "w8a8", "fp8"])
@pytest.mark.parametrize("tile,warpgroups,more", COMPETING, ids=str)
def test_configs_that_compete_on_the_gpu(name: str, tile: int, warpgroups: int, more: dict[str, Any]) -> None:
    """Random operands against float64, a hundred times bit for bit, where K ends within a round of the ring."""
    linear = schemes()[name]
    for M, N, K in ((tile, 1000, 2048), (tile - 3, 136, 1400)):
        weight, x = random_weight(linear, N, K, "cuda"), random_activation(linear, M, K, "cuda")
        packed = pack_weight(linear, weight)
        outliers = packed.int4_units < packed.units.shape[1]
        config = GemmConfig(packed.kind, "token", tile, warpgroups, int8_units=outliers, aligned=N % 8 == 0, **more)
        gemm = Gemm(packed, "token")
        gemm.config = fixed(config)
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


@GPU
@pytest.mark.usefixtures("compiled")
def test_whole_numbers_add_up_exactly_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes up to 8 in E4M3: sums of 128 products stay within 14 bits, and longer ones are float32."""
    M, N, K = 65, 200, 4096
    w = torch.randint(-8, 9, (N, K), device="cuda")
    x = torch.randint(-8, 9, (M, K), device="cuda")
    packed = pack_verbatim(w.to(torch.float8_e4m3fn), torch.full((N, 1), 2.0**-6, device="cuda"), "e4m3")
    y = Gemm(packed, "token")(x.to(torch.float8_e4m3fn).view(torch.int8), torch.ones(1, M, device="cuda"))
    assert torch.equal(y, (x.double() @ w.double().T * 2**-6).float().bfloat16())


def test_kernel_cache_key_changes_with_config() -> None:
    from atom.kernels.cache import kernel_key
    from atom.kernels.gemm import ARCH

    if not HAS_DSL:
        pytest.skip("the CuTe DSL is not installed; its version is part of the key")
    one, two = chosen()[:2]
    assert kernel_key("gemm_sm90", one, ARCH) != kernel_key("gemm_sm90", two, ARCH)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_DSL, reason="the CuTe DSL is not installed; pip install atom-serving[kernels]")
def test_a_warm_start_imports_no_compiler(tmp_path: Path) -> None:
    """A second process loads the library from the cache without importing cutlass."""
    program = (
        "import sys; from atom.kernels.gemm import gemm_kernel; from atom.kernels.gemm_config import GemmConfig\n"
        "gemm_kernel(GemmConfig('int4_uint4', 'token', 16, 2).with_most_stages()); print('cutlass' in sys.modules)"
    )
    environment = {**os.environ, "ATOM_CACHE": str(tmp_path)}
    answers = [
        subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert [a.strip() for a in answers] == ["True", "False"]
