"""Full precision in fewer kernels: the same numbers."""

import pytest
import torch
from torch import nn

from atom.kernels.gated import GATED_QUANTIZE
from atom.kernels.norm import ADD_RMS_NORM_QUANTIZE, RMS_NORM_QUANTIZE
from atom.kernels.producer_config import producer_config
from atom.kernels.registry import Op, Problem
from atom.models.fused import FusedGatedActivation, FusedRMSNorm, fuse_layer_, fuse_model_, stack_linears
from atom.models.generate import scheme_cache
from atom.models.layers import GatedActivation
from atom.models.norm import RMSNorm
from atom.models.together import LinearPart, run_together
from atom.quant.presets import get_scheme
from atom.quant.schemes import LinearScheme

from .random_models import CONFIGS, random_model


@pytest.mark.parametrize("biases", [(True, True), (False, True), (False, False)])
def test_stacked_linears_give_what_each_gives(biases: tuple[bool, bool]) -> None:
    linears = [nn.Linear(12, size, bias=bias) for size, bias in zip((8, 4), biases, strict=True)]
    parts, x = stack_linears(linears), torch.randn(3, 12)
    for part, linear, y in zip(parts, linears, run_together(parts, x), strict=True):
        assert torch.allclose(y, linear(x), atol=1e-6) and part.bias is linear.bias


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_fused_norm_adds_and_norms(offset: float) -> None:
    norm = RMSNorm(16, 1e-6, offset)
    norm.weight.data = torch.randn(16)
    hidden, update = torch.randn(3, 16), torch.randn(3, 16)
    fused = FusedRMSNorm(norm)
    for wanted, found in zip(norm.after(hidden, update), fused.after(hidden, update), strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(fused(hidden), norm(hidden), atol=1e-5)


def test_a_fused_activation_is_the_activation() -> None:
    gate, up = torch.randn(3, 16), torch.randn(3, 16)
    found = FusedGatedActivation("silu", 16)(gate, up)
    assert torch.allclose(found, GatedActivation("silu")(gate, up), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_a_fused_model_computes_the_same(family: str) -> None:
    model = random_model(CONFIGS[family])
    tokens = torch.arange(7) % model.config.vocab_size
    kv = scheme_cache(model, batch=1)
    wanted = model(tokens, kv.positions(7), kv)
    fuse_model_(model)
    assert not any(isinstance(module, LinearPart) for module in model.modules()), "a CPU keeps the model as it was"
    for layer in model.model.decoder_layers():
        fuse_layer_(layer, model.family)
    assert sum(isinstance(module, LinearPart) for module in model.modules()) == 5 * model.config.num_layers
    kv = scheme_cache(model, batch=1)
    assert torch.allclose(model(tokens, kv.positions(7), kv), wanted, atol=1e-4)


@pytest.mark.parametrize("op", [RMS_NORM_QUANTIZE, ADD_RMS_NORM_QUANTIZE, GATED_QUANTIZE], ids=lambda op: op.name)
def test_full_precision_is_fused_on_hopper(op: Op) -> None:
    """By the kernels that w4a16 runs; implementations for other GPUs refuse and change nothing."""
    assert op.runs(Problem("sm_90", K=4096)) and not op.runs(Problem("sm_80", K=4096))
    for source, dtype in (("norm", torch.bfloat16), ("add_norm", torch.bfloat16), ("silu", torch.bfloat16)):
        plain, linear = LinearScheme(), get_scheme("w4a16").default_linear
        found = [producer_config(source, each, dtype, 4096, False, source == "silu", 1) for each in (plain, linear)]
        assert found[0] == found[1]
