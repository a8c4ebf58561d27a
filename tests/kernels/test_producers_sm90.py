"""The sm_90a producers: configs on a CPU, machine code without a GPU, codes against atom/quant on one."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atom.kernels.activation import QuantizedActivation
from atom.kernels.bench_operands import random_weight
from atom.kernels.cache import compile_together
from atom.kernels.flashinfer_solution import dequantized
from atom.kernels.gated import gated_activation
from atom.kernels.gemm import Gemm, pack_weight, token_scales
from atom.kernels.norm import rms_norm
from atom.kernels.producer_config import ProducerConfig
from atom.kernels.producers import AddingProducer, QuantizingProducer, producer_kernel
from atom.kernels.refusals_sm90 import refuses_producer
from atom.kernels.registry import Problem
from atom.quant.formats import get_format
from atom.quant.granularity import Token
from atom.quant.mixed import dequantize_weight, fake_quantize_activation
from atom.quant.presets import PRESETS, get_scheme
from atom.quant.rounding import code_values, quantize
from atom.quant.schemes import LinearScheme, RotationSpec

from .linear_schemes import linear_scheme
from .machine_code import needs_dsl

FACTORS, GROUPS = "w4a4", "w4a4-bf16"
TURNED = tuple(name for name, scheme in PRESETS.items() if scheme.rotation is not None)
SCHEMES = (*(name for name in PRESETS if name not in ("bf16", *TURNED)), GROUPS, "w4a4-g32")
EVERY_SOURCE = ("norm", "add_norm", "silu", "gelu_tanh", "plain")


def linear(name: str) -> LinearScheme:
    """As linear_scheme; with a rotation where the name ends so, in blocks of a group or of 128."""
    found = linear_scheme(name.removesuffix("-rotated"))
    if not name.endswith("-rotated"):
        return found
    assert found.activation is not None
    size = found.activation.group_size or 128
    return replace(found, rotation=RotationSpec("block_hadamard", max(size, 32)))


def producer(source: str, name: str, K: int, device: str = "cpu") -> QuantizingProducer:
    """A producer with a random permutation (where the scheme has one) and gain."""
    perm = torch.randperm(K, device=device) if linear(name).reorder and source not in ("silu", "gelu_tanh") else None
    gain = torch.rand(K, device=device) + 0.5 if source in ("norm", "add_norm") else None
    return QuantizingProducer(source, linear(name), perm, gain, 1e-5)


def test_ratio_is_the_reference_s_constant() -> None:
    """The kernel multiplies maxima by the constant that atom/quant/rounding.py multiplies them by."""
    config = producer("plain", GROUPS, 512).config(torch.bfloat16, 512)
    assert config.ratio == 0.9 / 7 and config.scale_format == "bf16" and config.code_range == (-8, 7)
    config = producer("plain", "w4a4", 512).config(torch.bfloat16, 512)
    assert config.ratio == 0.9 / 7 and config.rounding == "factor" and config.outer_ratio == 1 / 15
    config = producer("plain", "w4a8", 512).config(torch.bfloat16, 512)
    assert config.ratio == 1 / 127 and config.scale_format == "fp32" and config.rounding == "token"


def test_rows_it_cannot_hold_are_refused() -> None:
    assert "shared memory" in (refuses_producer(Problem("sm_90", linear("w4a4"), K=1 << 20)) or "")
    assert refuses_producer(Problem("sm_90", linear("w4a4"), K=4097)) is None


def compiled_configs() -> list[ProducerConfig]:
    """Every kernel of a model in the shape of Llama-3-8B in every scheme, and some that only other shapes meet."""
    found: dict[ProducerConfig, None] = {}
    for name in (*SCHEMES, *TURNED):
        for source in EVERY_SOURCE:
            K, strided = (14336, source == "silu") if source in ("silu", "gelu_tanh") else (4096, False)
            run = producer(source, name, K)
            found |= dict.fromkeys(run.config(torch.bfloat16, K, strided, tokens) for tokens in (1, 8192))
    odd = producer("norm", "w4a4-g32-rotated", 4096), producer("norm", "w4a4", 576), producer("silu", "w4a8", 576)
    for run, K in zip(odd, (4096, 576, 576), strict=True):
        found |= dict.fromkeys(sorted(run.configs(torch.bfloat16, K), key=name_of))
    found |= dict.fromkeys(sorted(producer("plain", "w4a8", 4096).configs(torch.float16, 4096), key=name_of))
    return list(found)


def name_of(config: ProducerConfig) -> str:
    turned = f"-h{config.rotation}" if config.rotation else ""
    layout = f"{config.columns}-{config.threads}x{config.chunks}x{config.parts}-{config.ctas_per_sm}"
    return f"{config.source}-{config.format}-{config.rounding}{config.group_size}{turned}-{config.dtype}-{layout}"


@pytest.mark.slow
@needs_dsl
@pytest.mark.parametrize("config", compiled_configs(), ids=name_of)
def test_machine_code(config: ProducerConfig, tmp_path: Path) -> None:
    """Compiles for sm_90a without a GPU into the instructions that were meant, and spills nothing."""
    from atom.kernels.producers_sm90 import compile_producer

    from .machine_code import disassemble

    compiled = compile_producer(config, f"--keep-cubin --dump-dir {tmp_path}")
    sass = disassemble(compiled.__cubin__, tmp_path)  # type: ignore[attr-defined]
    found = set(re.findall(r"\*/\s+(?:@!?U?P\d+ )?([A-Z][\w.]*)", sass))
    has = {name: any(op.startswith(name) for op in found) for name in INTENDED}
    assert not has["LDL"] and not has["STL"], "registers spilled"
    assert has["ACQBULK"] and has["PREEXIT"], "launches that overlap"
    stays = config.ctas_per_sm > 0
    assert has["UBLKCP"] == stays, "rows come by bulk copy where CTAs stay"
    assert has["LDG.E.128"] or (stays and has["LDS.128"]), "16 bytes at a time"
    assert has["STG.E.128" if config.writes_bf16 or (stays and config.chunks > 1 and config.run > 1) else "STG.E.64"]
    assert has["MUFU.RSQ"] == config.is_norm and has["MUFU.EX2"] == config.is_gated
    has_whole_row = config.permuted and not stays  # in every CTA, which gathers from it: only maxima are told there
    assert has["STAS"] == (config.clustered and config.is_norm and not has_whole_row), "sums told to a cluster"
    assert has["REDAS.MAX"] == (config.clustered and config.needs_row_max), "maxima told to a cluster"
    assert has["REDUX"] == config.needs_row_max, "a warp's largest value in one instruction"
    assert has["F2FP.SATFINITE.E4M3"] == (config.format == "fp8_e4m3" or config.scale_format == "e4m3")
    if config.is_exact and config.rounding != "none":
        apart = len(re.findall(r"\bFMUL\b", sass))
        assert apart >= 8 * config.chunks, "products were not rounded before they were added to"


INTENDED = ("LDL", "STL", "ACQBULK", "PREEXIT", "UBLKCP", "LDG.E.128", "LDS.128", "STG.E.128", "STG.E.64", "MUFU.RSQ",
            "MUFU.EX2", "STAS", "REDAS.MAX", "REDUX", "F2FP.SATFINITE.E4M3")  # fmt: skip


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOM_UNVERIFIED_KERNELS", "1")


SIZES, SOURCES = (576, 1536, 4096), ("plain", "norm", "add_norm", "silu")
WIDE = 14336  # several CTAs a token where few tokens come, four chunks a thread where many do
ODD_COLUMNS = 1019
GELU_COLUMNS = 2048  # of Gemma 3 270m
OTHER_INPUTS = [("float16", "w4a4", "norm"), ("float16", "nvfp4", "add_norm"), ("float32", "w4a4", "plain"),
                ("float32", "w4a8", "silu"), ("float32", "w4a4", "add_norm")]  # fmt: skip
ODD = [("w4a4", "plain"), ("w4a4", "norm"), ("w4a4", "silu"), ("w4a8", "add_norm"), ("w4a16", "plain"),
       ("nvfp4", "add_norm"), ("mxfp4", "silu"), ("fp8", "norm"), (GROUPS, "plain")]  # fmt: skip
ROTATED = [
    ("w4a4-rotated", "norm"),
    ("w4a8-rotated", "plain"),
    ("nvfp4-rotated", "silu"),
    ("w4a4-g32-rotated", "norm"),
    ("w4a4-g64-rotated", "silu"),
    *((name, source) for name in TURNED for source in SOURCES),
]


@pytest.fixture(scope="module")
def compiled() -> None:
    """All kernels of the GPU tests below, compiled in parallel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOM_UNVERIFIED_KERNELS", "1")
        configs = {
            config
            for source in SOURCES
            for name in SCHEMES
            for K in SIZES
            for strided in {False, source == "silu"}
            for config in producer(source, name, K).configs(torch.bfloat16, K, strided)
        }
        more = [(source, name, 4096) for name, source in ROTATED]
        more += [(source, name, WIDE) for source in SOURCES for name in ("w4a8", FACTORS)]
        more += [(source, name, ODD_COLUMNS) for name, source in ODD]
        more += [("gelu_tanh", name, GELU_COLUMNS) for name in SCHEMES]
        for source, name, K in more:
            configs |= producer(source, name, K).configs(torch.bfloat16, K)
        for dtype, name, source in OTHER_INPUTS:
            configs |= producer(source, name, SIZES[1]).configs(getattr(torch, dtype), SIZES[1])
        compile_together([partial(producer_kernel, config) for config in configs])


@pytest.mark.gpu
@pytest.mark.parametrize("K", SIZES)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.usefixtures("unverified", "compiled")
def test_codes_and_scales(name: str, source: str, K: int) -> None:
    """Bit-exact where no sum is involved; a norm's or exp's last bit may move a code that stood on a tie."""
    check_codes_and_scales(name, source, K, (0, 1, 3, 16, 63, 64, 65, 129, 1000, 8192))  # every layout


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.usefixtures("unverified", "compiled")
def test_geglu(name: str) -> None:
    check_codes_and_scales(name, "gelu_tanh", GELU_COLUMNS, (1, 16, 65, 2000))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype,name,source", OTHER_INPUTS)
@pytest.mark.usefixtures("unverified", "compiled")
def test_other_inputs(dtype: str, name: str, source: str) -> None:
    """Rows that are not bfloat16."""
    check_codes_and_scales(name, source, SIZES[1], (3, 65, 2000), getattr(torch, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("name,source", ODD)
@pytest.mark.usefixtures("unverified", "compiled")
def test_odd_rows(name: str, source: str) -> None:
    """Rows that are no multiple of a chunk, in both layouts."""
    check_codes_and_scales(name, source, ODD_COLUMNS, (0, 1, 16, 65, 1000))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name,source", [("w4a4", "silu"), ("w4a16", "plain"), ("nvfp4", "add_norm"), ("w4a8", "add_norm")]
)
@pytest.mark.usefixtures("unverified", "compiled")
def test_products_of_odd_rows(name: str, source: str) -> None:
    """The GEMM multiplies what a producer makes of rows that are no multiple of a chunk."""
    K, N, scheme = ODD_COLUMNS, 333, linear(name)
    run, weight = producer(source, name, K, "cuda"), random_weight(scheme, N, K, "cuda")
    multiply = Gemm(pack_weight(scheme, weight), token_scales(scheme))
    x, other = (torch.randn(5, K, device="cuda").bfloat16() for _ in range(2))
    second = other if source == "silu" else None
    handed = AddingProducer(run)(other, x)[1] if source == "add_norm" else run(x, second)
    assert isinstance(handed, QuantizedActivation)
    wanted = dequantized(handed, scheme, K).double() @ dequantize_weight(weight, scheme).double().T
    found = multiply(handed.packed, handed.scale).double()
    assert bool(((found - wanted).abs() <= 2**-8 * wanted.abs() + 1e-3 * wanted.abs().amax()).all())


@pytest.mark.gpu
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.usefixtures("unverified", "compiled")
def test_given_outputs_are_written_anew(source: str) -> None:
    """As often as a caller likes, and to the bits of outputs that were allocated."""
    K, M = SIZES[0], 5
    run = producer(source, FACTORS, K, "cuda")
    total = torch.empty(M, K, device="cuda", dtype=torch.bfloat16)
    out = None
    for _ in range(3):
        x, other = (torch.randn(M, K, device="cuda").bfloat16() for _ in range(2))
        if source == "add_norm":
            adding = AddingProducer(run)
            wanted_total, wanted = adding(other, x)
            found_total, found = adding(other, x, total=total, out=out)
            assert found_total is total and torch.equal(total, wanted_total)
        else:
            second = other if source == "silu" else None
            wanted, found = run(x, second), run(x, second, out=out)
        assert isinstance(wanted, QuantizedActivation) and isinstance(found, QuantizedActivation)
        assert out is None or found is out
        out = found
        assert torch.equal(found.packed, wanted.packed) and torch.equal(found.scale, wanted.scale)


def check_codes_and_scales(
    name: str, source: str, K: int, token_counts: tuple[int, ...], dtype: torch.dtype = torch.bfloat16
) -> None:
    run, scheme = producer(source, name, K, "cuda"), linear(name)
    normal, outliers = scheme.split(K)
    for M in token_counts:
        x = torch.randn(M, K, device="cuda").to(dtype)
        x[:, -5] *= 30
        if M > 2:
            x[1] = 0
        other = torch.randn(M, K, device="cuda").to(dtype)
        values = before(run, source, x, other)
        second = other if source in ("silu", "gelu_tanh") else None
        out = AddingProducer(run)(other, x)[1] if source == "add_norm" else run(x, second)
        assert isinstance(out, QuantizedActivation)
        out.packed.fill_(127 if out.packed.dtype == torch.int8 else torch.nan)  # so that what a kernel leaves out shows
        out.scale.fill_(torch.nan)
        total = torch.full_like(x, torch.nan)
        if source == "add_norm":
            total, found = AddingProducer(run)(other, x, total=total, out=out)
        else:
            found = run(x, second, out=out)
        if source == "add_norm":
            assert torch.equal(total, x + other)
        assert isinstance(found, QuantizedActivation)
        spec, packed = scheme.activation, found.packed
        if packed.dtype == torch.bfloat16:
            assert packed.shape[1] == -(-K // 8) * 8 and not packed[:, K:].any(), "columns that fill up a row are zero"
            packed = packed[:, :K]
        if spec is None:
            check_close(packed.float(), values.bfloat16().float(), exact=source == "plain")
            continue
        wanted = quantize(values[:, :normal], spec)
        filled = -(-normal // 128) * 128
        if packed.dtype == torch.bfloat16:
            scale = wanted.scale.scale.repeat_interleave(spec.group_size, 1)[:, :K]
            written = code_values(wanted.codes, get_format(spec.format)) * scale
            check_close(packed.float(), written, exact=source == "plain")
            if wanted.scale.outer is not None:
                check_close(found.scale.T, wanted.scale.outer, exact=source == "plain")
            continue
        codes = packed if spec.format != "fp8_e4m3" else packed.view(torch.float8_e4m3fn).float()
        written, scales = wanted.codes.float(), wanted.scale.scale
        if wanted.scale.outer is not None:  # code x factor in the byte
            written = written * scales.repeat_interleave(spec.group_size, 1)[:, :normal]
            scales = wanted.scale.outer
        units = scales.shape[1]
        check_close(codes[:, :normal].float(), written, exact=source == "plain")
        check_close(found.scale[:units, :M].T, scales, exact=source == "plain")
        assert not packed[:, normal:filled].any(), "columns that fill up a group are zero"
        if source == "plain" and outliers:
            tail_spec = scheme.outliers.spec(Token(), dynamic=True)
            assert tail_spec is not None
            tail = quantize(values[:, normal:], tail_spec)
            assert torch.equal(packed[:, filled : filled + outliers], tail.codes)
            assert torch.equal(found.scale[units, :M], tail.scale.scale[:, 0])


@pytest.mark.gpu
@pytest.mark.parametrize("name,source", ROTATED)
@pytest.mark.usefixtures("unverified", "compiled")
def test_rotated(name: str, source: str) -> None:
    """A block Hadamard before the rounding: what it hands on is the reference's but where a sum's last bit decides."""
    K, scheme = 4096, linear(name)
    run = producer(source, name, K, "cuda")
    for M in (3, 257):
        x, other = (torch.randn(M, K, device="cuda").bfloat16() for _ in range(2))
        if source == "add_norm":
            handed = AddingProducer(run)(other, x)[1]
        else:
            handed = run(x) if source in ("plain", "norm") else run(x, other)
        found = dequantized(handed, scheme, K)
        wanted = fake_quantize_activation(before(run, source, x, other), scheme)
        far = (found - wanted).abs() > 2e-6 * wanted.abs()
        assert float(far.float().mean()) < 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["w4a8", FACTORS])
@pytest.mark.usefixtures("unverified", "compiled")
def test_two_hundred_runs_give_the_same_bits(name: str, source: str) -> None:
    """Clusters and rows on their way included."""
    K = WIDE
    run = producer(source, name, K, "cuda")
    for M in (2, 300):
        x, other = (torch.randn(M, K, device="cuda").bfloat16() for _ in range(2))
        two = (x, other) if source == "silu" else (x,)
        call = (lambda: AddingProducer(run)(other, x)[1]) if source == "add_norm" else (lambda: run(*two))  # noqa: B023
        first = call()
        assert isinstance(first, QuantizedActivation)
        for _ in range(100):
            again = call()
            assert isinstance(again, QuantizedActivation)
            assert torch.equal(again.packed, first.packed) and torch.equal(again.scale, first.scale)


@pytest.mark.gpu
@pytest.mark.usefixtures("unverified", "compiled")
def test_the_first_launch_finds_its_columns() -> None:
    """A kernel reads them before the launch in front has ended, which at first is the one that writes them."""
    x = torch.randn(2, WIDE, device="cuda").bfloat16()
    for _ in range(20):
        run = producer("plain", FACTORS, WIDE, "cuda")
        first, again = run(x), run(x)
        assert isinstance(first, QuantizedActivation) and isinstance(again, QuantizedActivation)
        assert torch.equal(first.packed, again.packed) and torch.equal(first.scale, again.scale)


def check_close(found: Tensor, wanted: Tensor, exact: bool) -> None:
    """Equal; or nearly everywhere, and elsewhere by what a step of the coarsest grid is (E2M1: 4 to 6)."""
    if exact:
        assert torch.equal(found, wanted)
    elif found.numel():
        far = (found - wanted).abs() > 2e-6 * wanted.abs()
        assert float(far.float().mean()) < 2e-3
        row = wanted.abs().amax(-1, keepdim=True)
        assert bool(((found - wanted).abs() <= 0.4 * row + 1.0).all())


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.usefixtures("unverified", "compiled")
def test_halves_of_one_tensor_are_read_where_they_lie(name: str) -> None:
    """Gate and up as slices of a fused GEMM's output give what contiguous copies give."""
    run = producer("silu", name, 576, "cuda")
    both = torch.randn(65, 1152, device="cuda").bfloat16()
    gate, up = both[:, :576], both[:, 576:]
    sliced, whole = run(gate, up), run(gate.contiguous(), up.contiguous())
    assert torch.equal(sliced.packed.view(torch.int8), whole.packed.view(torch.int8))
    if linear(name).activation is not None and linear(name).activation != get_scheme("mxfp4").activation:
        count = sliced.scale.shape[0]
        assert torch.equal(sliced.scale[:count, :65], whole.scale[:count, :65])


def before(run: QuantizingProducer, source: str, x: Tensor, other: Tensor) -> Tensor:
    """What the producer rounds, in float32 and in its order."""
    if source in ("silu", "gelu_tanh"):
        return gated_activation(x.float(), other.float(), source)  # type: ignore[arg-type]
    values = x + other if source == "add_norm" else x
    if run.gain is not None:
        values = rms_norm(values, run.gain, run.eps)
    values = values.float()
    return values if run.perm is None else values[:, run.perm.long()]
