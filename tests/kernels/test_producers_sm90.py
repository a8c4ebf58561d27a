"""The sm_90a producers: configs on a CPU, machine code without a GPU, codes against atom/quant on one."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atom.kernels.gated import gated_activation
from atom.kernels.norm import rms_norm
from atom.kernels.producers import QuantizingProducer
from atom.kernels.refusals_sm90 import refuses_producer
from atom.kernels.registry import Problem
from atom.quant.granularity import Token
from atom.quant.presets import get_scheme
from atom.quant.rounding import quantize
from atom.quant.schemes import LinearScheme

HAS_DSL = importlib.util.find_spec("cutlass") is not None or importlib.util.find_spec("nvidia_cutlass_dsl") is not None
SCHEMES = ("w4a4", "w4a8", "w8a8", "w3a3")


def linear(name: str) -> LinearScheme:
    return get_scheme(name).for_linear("x")


def producer(source: str, name: str, K: int, device: str = "cpu") -> QuantizingProducer:
    """A producer with a random permutation (where the scheme has one) and gain."""
    perm = torch.randperm(K, device=device) if linear(name).reorder and source not in ("silu", "gelu_tanh") else None
    gain = torch.rand(K, device=device) + 0.5 if source == "norm" else None
    return QuantizingProducer(source, linear(name), perm, gain, 1e-5)


def test_ratio_is_the_reference_s_constant() -> None:
    """The kernel multiplies maxima by the constant that atom/quant/rounding.py multiplies them by."""
    config = producer("plain", "w4a4", 512).config(torch.bfloat16, 512)
    assert config.ratio == 0.9 / 7 and config.bf16_scale and (config.qmin, config.qmax) == (-8, 7)
    config = producer("plain", "w4a8", 512).config(torch.bfloat16, 512)
    assert config.ratio == 1 / 127 and not config.bf16_scale and config.granularity == "token"


@pytest.mark.parametrize("K,reason", [(4097, "multiple of 8"), (1 << 20, "shared memory")])
def test_rows_it_cannot_hold_are_refused(K: int, reason: str) -> None:
    assert reason in (refuses_producer(Problem("sm_90", linear("w4a4"), K=K)) or "")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_DSL, reason="the CuTe DSL is not installed; pip install atom-serving[kernels]")
@pytest.mark.parametrize("source", ["norm", "silu", "gelu_tanh", "plain"])
@pytest.mark.parametrize("name", ["w4a4", "w4a8"])
def test_machine_code(name: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles for sm_90a without a GPU, reads 16 bytes at a time, spills nothing."""
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_90a")
    from atom.kernels.producers_sm90 import compile_producer

    from .test_gemm_sm90 import disassemble

    config = producer(source, name, 4096).config(torch.bfloat16, 4096)
    compiled = compile_producer(config, f"--keep-cubin --dump-dir {tmp_path}")
    sass = disassemble(compiled.__cubin__, tmp_path)  # type: ignore[attr-defined]
    assert "LDG.E.128" in sass
    assert not re.findall(r"\b(?:LDL|STL)\b", sass), "registers spilled"


@pytest.mark.gpu
@pytest.mark.parametrize("K", [576, 1536, 4096])
@pytest.mark.parametrize("source", ["plain", "norm", "silu"])
@pytest.mark.parametrize("name", SCHEMES)
def test_codes_and_scales(name: str, source: str, K: int) -> None:
    """Bit-exact where no sum is involved; a norm's or exp's last bit may move a code that stood on a tie."""
    run, scheme = producer(source, name, K, "cuda"), linear(name)
    normal, outliers = scheme.split(K)
    for M in (0, 1, 3, 64, 257):
        x = torch.randn(M, K, device="cuda").bfloat16()
        x[:, -5] *= 30
        if M > 2:
            x[1] = 0
        up = torch.randn(M, K, device="cuda").bfloat16()
        found = run(x, up) if source == "silu" else run(x)
        values = before(run, source, x, up)
        assert scheme.activation is not None
        wanted = quantize(values[:, :normal], scheme.activation)
        groups = -(-normal // 128)
        scales = found.scale[:groups, :M].T if name in ("w4a4", "w3a3") else found.scale.T
        difference = (found.packed[:, :normal].int() - wanted.codes.int()).abs()
        if source == "plain":
            assert torch.equal(scales, wanted.scale.scale) and not difference.any()
            assert not found.packed[:, normal : groups * 128].any(), "columns that fill up a group are zero"
            if outliers:
                tail_spec = scheme.outliers.spec(Token(), dynamic=True)
                assert tail_spec is not None
                tail = quantize(values[:, normal:], tail_spec)
                assert torch.equal(found.packed[:, groups * 128 : groups * 128 + outliers], tail.codes)
                assert torch.equal(found.scale[groups, :M], tail.scale.scale[:, 0])
        elif M:
            assert int(difference.max()) <= 1 and float((difference > 0).float().mean()) < 2e-3
            assert float(((scales / wanted.scale.scale - 1).abs() > 2e-6).float().mean()) < 0.02


def before(run: QuantizingProducer, source: str, x: Tensor, up: Tensor) -> Tensor:
    """What the producer rounds, in float32 and in its order."""
    if source == "silu":
        return gated_activation(x.float(), up.float(), "silu")
    values = x.float()
    if run.gain is not None:
        values = rms_norm(x, run.gain, run.eps)
    return values if run.perm is None else values[:, run.perm.long()]
