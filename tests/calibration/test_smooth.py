"""Key channels of like reach: the same model bit for bit, and a cache that rounds it less."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atom.calibration.config import CalibrationConfig
from atom.calibration.smooth import KeyStats, smooth_keys_, smoothing
from atom.calibration.stream import quantize_model
from atom.models.kv import DenseKV
from atom.models.loader import load_model
from atom.models.model import Model
from atom.quant.presets import get_scheme

Tiny = Callable[[str], Path]


def logits(model: Model) -> Tensor:
    tokens = torch.arange(20, 60)
    kv = DenseKV(model.config)
    with torch.no_grad():
        return model.logits(model(tokens, kv.positions(40), kv))


def uneven(heads: int, size: int) -> KeyStats:
    """Channels that reach from 2^-6 to 2^6."""
    reach = torch.exp2(torch.randn(heads, size, generator=torch.Generator().manual_seed(0)) * 3)
    mean = torch.ones(heads, size)
    return KeyStats(mean, mean - reach, mean + 0.5 * reach)


def test_factors_are_powers_of_two_shared_by_pairs() -> None:
    stats = uneven(3, 32)
    factor = smoothing(stats.reach)
    assert torch.equal(factor, torch.exp2(factor.log2().round())) and factor.unique().numel() > 3
    assert torch.equal(factor[:, :16], factor[:, 16:])
    assert factor.log2().mean(1).abs().max() < 0.5
    pair = torch.maximum(stats.reach[:, :16], stats.reach[:, 16:])
    evened = pair / factor[:, :16]
    assert (evened.amax(1) / evened.amin(1) < 0.3 * pair.amax(1) / pair.amin(1)).all()


@pytest.mark.parametrize("reach", [torch.zeros(1, 8), torch.full((1, 8), 3.0)])
def test_nothing_to_even_out(reach: Tensor) -> None:
    assert torch.equal(smoothing(reach), torch.ones(1, 8))


def test_a_silent_channel_stays_finite() -> None:
    factor = smoothing(torch.tensor([[0.0, 1.0, 0.0, 1.0]]))
    assert torch.isfinite(factor).all() and (factor > 0).all()


@pytest.mark.parametrize("name", ["llama-biased", "qwen2", "qwen3"])
def test_the_model_stays_the_same_bit_for_bit(name: str, tiny: Tiny) -> None:
    model = load_model(tiny(name))
    before = logits(model)
    for layer in model.model.decoder_layers():
        factor, _ = smooth_keys_(layer.self_attn, uneven(2, 32))
        assert factor.unique().numel() > 3
    assert torch.equal(logits(model), before)


def test_gains_less_an_offset_are_left_alone(tiny: Tiny) -> None:
    model = load_model(tiny("gemma3"))
    layer = next(model.model.decoder_layers())
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    factor, grown = smooth_keys_(layer.self_attn, uneven(2, 32))
    assert torch.equal(factor, torch.ones(2, 32)) and not grown
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


def test_a_quantized_cache_gains(
    tiny: Tiny, quick: CalibrationConfig, logit_error: Callable[[Path, Path], float], tmp_path: Path
) -> None:
    source = tmp_path / "uneven"
    shutil.copytree(tiny("llama"), source)
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        loud = torch.ones(64)
        loud[::8] = 32.0  # two pairs of each head of 32 channels
        if "k_proj" in name:
            tensors[name] *= loud[:, None]
        if "q_proj" in name:
            tensors[name] /= loud.view(2, 32).repeat_interleave(3, 0).view(-1, 1)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    errors = []
    for smooth in (False, True):
        out = tmp_path / str(smooth)
        report = quantize_model(source, get_scheme("w8a8+kv4"), out, replace(quick, smooth_keys=smooth, gptq=False))
        errors.append(logit_error(out, source))
        for layer in report.layers:
            assert layer["linears"]["self_attn.k_proj"]["output_error"] < 0.1
            assert layer["linears"]["self_attn.q_proj"]["output_error"] < 0.1
    assert errors[1] < 0.7 * errors[0]
