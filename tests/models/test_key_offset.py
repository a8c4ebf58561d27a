"""Keys whose projection has a large bias: what the cache rounds is the rest."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from atom.errors import UnsupportedError
from atom.models.family import model_config
from atom.models.generate import scheme_cache
from atom.models.kv import DenseKV
from atom.models.model import Model, build_model
from atom.quant.presets import get_scheme
from atom.quant.schemes import Scheme

from .random_models import GEMMA3, LLAMA, QWEN2, QWEN3, random_model

TOKENS = torch.arange(40) % 61
PLAIN = replace(get_scheme("bf16+kv4"), kv_offset="bias", kv_rotation="none")


def biased_model() -> Model:
    """A Qwen2 whose key bias is loud in a few channels, as the real ones are."""
    model = random_model(QWEN2)
    for layer in model.model.decoder_layers():
        bias = layer.self_attn.k_proj.bias
        assert bias is not None
        bias.data[::5] += 60.0
    return model.requires_grad_(False)


def logits(model: Model, scheme: Scheme | None, steps: tuple[int, ...] = (40,)) -> Tensor:
    model.scheme = scheme
    kv, parts, start = scheme_cache(model), [], 0
    for seq in steps:
        parts.append(model.logits(model(TOKENS[start : start + seq], kv.positions(seq), kv)))
        start += seq
    return torch.cat(parts)


def error(model: Model, scheme: Scheme) -> float:
    exact = logits(model, None)
    return float((logits(model, scheme) - exact).norm() / exact.norm())


@pytest.mark.parametrize("pre_rope", [False, True])
def test_a_loud_bias_costs_nothing_when_it_is_apart(pre_rope: bool) -> None:
    model = biased_model()
    scheme = replace(PLAIN, kv_pre_rope=pre_rope)
    apart, inside = error(model, scheme), error(model, replace(scheme, kv_offset="none"))
    quiet = random_model(QWEN2).requires_grad_(False)
    assert apart < inside / 2
    assert apart < 2 * error(quiet, scheme)


@pytest.mark.parametrize("pre_rope", [False, True])
def test_decode_equals_prefill(pre_rope: bool) -> None:
    scheme = replace(PLAIN, kv_pre_rope=pre_rope)
    model = biased_model()
    assert torch.allclose(logits(model, scheme), logits(model, scheme, (17, 1, 1, 21)), atol=1e-4, rtol=1e-4)


def centred_model() -> Model:
    """The biased model, its keys' centre known, as calibration finds it."""
    model = biased_model()
    for layer in model.model.decoder_layers():
        bias = layer.self_attn.k_proj.bias
        assert bias is not None
        offset = bias.view(1, -1, layer.self_attn.head_dim).expand(40, -1, -1)
        layer.self_attn.key_centre = layer.rope(torch.arange(40)).apply(offset).mean(0)
    return model


CENTRED = get_scheme("bf16+kv4")


def test_a_centre_and_a_rotation_change_nothing_but_rounding() -> None:
    model = centred_model()
    fine = get_scheme("bf16+kv8")
    assert error(model, fine) < 0.6 * error(model, replace(fine, kv_offset="none", kv_rotation="none"))


def test_decode_equals_prefill_with_a_centre() -> None:
    model = centred_model()
    assert torch.allclose(logits(model, CENTRED), logits(model, CENTRED, (17, 1, 1, 21)), atol=1e-4, rtol=1e-4)


def test_a_soft_cap_refuses_a_centre() -> None:
    model = random_model({**GEMMA3, "attn_logit_softcapping": 30.0})
    with pytest.raises(UnsupportedError, match="kv-offset mean"):
        logits(model, CENTRED)


@pytest.mark.parametrize("raw", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_models_without_a_key_bias_are_as_before(raw: dict[str, object]) -> None:
    """No bias, or a norm behind it: nothing can be taken out."""
    model = random_model(raw).requires_grad_(False)
    scheme = PLAIN
    assert torch.equal(logits(model, scheme), logits(model, replace(scheme, kv_offset="none")))


def test_a_norm_of_heads_keeps_the_bias_inside() -> None:
    model = build_model(model_config({**QWEN3, "attention_bias": True}))
    attention = next(model.model.decoder_layers()).self_attn
    assert attention.k_proj.bias is not None and attention._spec().key_offset is None


def test_full_precision_does_not_look_at_it() -> None:
    model = biased_model()
    kv = DenseKV(model.config, offset_apart=True)
    out = model(TOKENS, kv.positions(40), kv)
    assert torch.equal(model.logits(out), logits(model, None)) and math.isfinite(float(out.sum()))
