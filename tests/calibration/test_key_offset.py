"""The mean key that calibration measures and the cache leaves out of what it rounds."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from atom.calibration.config import CalibrationConfig
from atom.calibration.stream import quantize_model
from atom.errors import CheckpointError
from atom.models.loader import load_model
from atom.models.source import open_source
from atom.quant.presets import get_scheme

Tiny = Callable[[str], Path]
KEY = "model.layers.1.self_attn.key_offset"


@pytest.fixture
def loud(tiny: Tiny, tmp_path: Path) -> Path:
    """A tiny model whose keys have a large mean in every fifth channel."""
    folder = tmp_path / "loud"
    shutil.copytree(tiny("llama-biased"), folder)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("k_proj.bias"):
            tensors[name][::5] += 30.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_it_is_measured_stored_and_helps(
    loud: Path, quick: CalibrationConfig, logit_error: Callable[[Path, Path], float], tmp_path: Path
) -> None:
    errors = {}
    for offset in ("none", "bias", "mean"):
        scheme = replace(get_scheme("bf16+kv4"), kv_offset=offset)
        quantize_model(loud, scheme, tmp_path / offset, quick)
        errors[offset] = logit_error(tmp_path / offset, loud)
    assert errors["mean"] < 1.2 * errors["bias"] < errors["none"] / 2
    stored = open_source(tmp_path / "mean").get(KEY)
    assert stored.dtype == torch.bfloat16 and stored.shape == (2, 32)
    bias = open_source(loud).get("model.layers.1.self_attn.k_proj.bias").float()
    assert (stored.float().flatten() - bias).abs().max() < 6.0  # the mean of the projection itself is small beside 30
    assert KEY not in open_source(tmp_path / "bias").names()


def test_only_four_bit_caches_of_calibrated_presets_ask_for_it() -> None:
    assert get_scheme("w4a4").stores_key_offset and get_scheme("w8a8+kv4").stores_key_offset
    for name in ("w4a4+kv8", "w4a4+kv16", "w8a8", "fp8", "bf16+kv4", "w4a16"):
        assert not get_scheme(name).stores_key_offset


def test_a_checkpoint_without_it_is_refused(loud: Path, quick: CalibrationConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_model(loud, get_scheme("w8a8+kv4"), out, replace(quick, gptq=False))
    for path in out.glob("*.safetensors"):
        kept = {name: tensor for name, tensor in load_file(path).items() if name != KEY}
        save_file(kept, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="key_offset"):
        load_model(out)
