"""The rotated model is the same function, its tensors stream, and what cannot be rotated says so."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atom.calibration.config import CalibrationConfig
from atom.calibration.rotated import EMBEDDING, HEAD, rotate_source
from atom.calibration.stream import quantize_model
from atom.checkpoint import read_json
from atom.errors import UnsupportedError
from atom.models.family import model_config
from atom.models.generate import scheme_cache
from atom.models.model import build_model
from atom.models.source import Source, open_source
from atom.quant.presets import get_scheme
from atom.quant.rotation import rotate
from atom.quant.schemes import RotationSpec

Tiny = Callable[[str], Path]
Close = Callable[[Path, Path], float]


def logits(source: Source) -> Tensor:
    model = build_model(model_config(source.config, source.generation_config))
    model.load_state_dict({name: source.get(name).double() for name in model.state_dict()}, assign=True)
    tokens = torch.arange(3, 43)
    cache = scheme_cache(model, 1, len(tokens))
    with torch.no_grad():
        return model.logits(model(tokens, cache.positions(len(tokens)), cache))


@pytest.mark.parametrize("name", ["llama", "llama-biased", "qwen2", "qwen3", "mistral"])
def test_the_rotated_model_is_the_same_function(name: str, tiny: Tiny) -> None:
    source = open_source(tiny(name))
    expected = logits(source)
    found = logits(rotate_source(source, seed=1))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3"])
def test_turned_values_are_the_same_function(name: str, tiny: Tiny) -> None:
    source = open_source(tiny(name))
    turned = rotate_source(source, seed=1, values_alone=True)
    assert turned.config == source.config and turned.names() == source.names()
    changed = {n.split(".", 3)[-1] for n in source.names() if not torch.equal(turned.get(n), source.get(n))}
    assert {"self_attn.v_proj.weight", "self_attn.o_proj.weight"} <= changed
    assert changed <= {"self_attn.v_proj.weight", "self_attn.o_proj.weight", "self_attn.v_proj.bias"}
    expected = logits(source)
    assert (logits(turned) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_hadamard_blocks_of_o_do_not_turn_values_back(tiny: Tiny) -> None:
    """A loud channel of values stays spread behind a block of a head's size."""
    source = open_source(tiny("llama"))
    head_dim = model_config(source.config, source.generation_config).head_dim
    weights = rotate_source(source, values_alone=True).weights
    loud = torch.zeros(1, head_dim)
    loud[0, 3] = 1.0
    turned = weights._turn_heads(loud)  # type: ignore[attr-defined]
    assert rotate(turned, RotationSpec("block_hadamard", head_dim)).abs().max() < 0.9


def test_loud_channels_are_gone(tiny: Tiny) -> None:
    source = open_source(tiny("llama"))
    weight = "model.layers.1.self_attn.o_proj.weight"
    loud = source.get(EMBEDDING).float()
    loud[:, 5] *= 50.0

    def peak(x: Tensor) -> float:
        return float(x.abs().max() / x.square().mean().sqrt())

    rotated = rotate_source(source)
    assert rotated.shape(weight) == source.shape(weight)
    assert rotated.dtype(weight) == source.dtype(weight) == torch.bfloat16
    weights = rotated.weights
    assert peak(weights._turn(loud)) < 0.3 * peak(loud)  # type: ignore[attr-defined]


def test_a_tied_head_is_untied_and_every_gain_is_one(tiny: Tiny) -> None:
    rotated = rotate_source(open_source(tiny("llama-biased")))
    assert rotated.config["tie_word_embeddings"] is False
    assert not torch.allclose(rotated.get(HEAD), rotated.get(EMBEDDING))
    for name in rotated.names():
        if "norm" in name:
            assert bool((rotated.get(name) == 1).all()), name


def test_other_signs_are_another_rotation(tiny: Tiny) -> None:
    source = open_source(tiny("llama"))
    assert torch.equal(rotate_source(source, 1).get(EMBEDDING), rotate_source(source, 1).get(EMBEDDING))
    assert not torch.equal(rotate_source(source, 1).get(EMBEDDING), rotate_source(source, 2).get(EMBEDDING))


def test_gemma_is_refused(tiny: Tiny) -> None:
    with pytest.raises(UnsupportedError, match="block_hadamard"):
        rotate_source(open_source(tiny("gemma3")))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_checkpoint_with_turned_values_is_close(
    name: str, tiny: Tiny, logit_error: Close, quick: CalibrationConfig, tmp_path: Path
) -> None:
    quantize_model(tiny(name), get_scheme("w8a8+kv16"), tmp_path / "out", replace(quick, rotate="values"))
    assert logit_error(tmp_path / "out", tiny(name)) < 0.04


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_checkpoint_of_it_loads_and_is_close(
    name: str, tiny: Tiny, logit_error: Close, quick: CalibrationConfig, tmp_path: Path
) -> None:
    config = replace(quick, rotate="residual")
    quantize_model(tiny(name), get_scheme("w8a8+kv16"), tmp_path / "out", config)
    assert read_json(tmp_path / "out" / "config.json")["tie_word_embeddings"] is False
    assert logit_error(tmp_path / "out", tiny(name)) < 0.04
