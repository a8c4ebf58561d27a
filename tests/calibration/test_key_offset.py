"""The mean key that calibration measures and the cache leaves out of what it rounds."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from atom.calibration.config import CalibrationConfig
from atom.calibration.keys import centre_on_sink, mirror_of, second_moments
from atom.calibration.stream import quantize_model
from atom.errors import CheckpointError
from atom.models.loader import load_model
from atom.models.source import open_source
from atom.quant.keys import prepare_keys, reflect_head, restore_keys, rotate_head, split_centre
from atom.quant.presets import get_scheme
from atom.quant.rounding import fake_quantize

Tiny = Callable[[str], Path]
KEY = "model.layers.1.self_attn.key_offset"
CENTRE = "model.layers.1.self_attn.key_centre"


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
        scheme = replace(get_scheme("bf16+kv4"), kv_offset=offset, kv_rotation="none")
        quantize_model(loud, scheme, tmp_path / offset, quick)
        errors[offset] = logit_error(tmp_path / offset, loud)
    assert errors["mean"] < 1.2 * errors["bias"] < errors["none"] / 2
    stored = open_source(tmp_path / "mean").get(KEY)
    assert stored.dtype == torch.bfloat16 and stored.shape == (2, 32)
    bias = open_source(loud).get("model.layers.1.self_attn.k_proj.bias").float()
    assert (stored.float().flatten() - bias).abs().max() < 6.0  # the mean of the projection itself is small beside 30
    assert KEY not in open_source(tmp_path / "bias").names()


def test_a_rotated_cache_with_factors_and_a_centre(
    loud: Path, tiny: Tiny, quick: CalibrationConfig, logit_error: Callable[[Path, Path], float], tmp_path: Path
) -> None:
    """It helps, and folding the factors leaves the model what it is."""
    plain, turned = {"kv_offset": "none", "kv_rotation": "none"}, {"kv_offset": "centre", "kv_rotation": "hadamard"}
    for name, source in (("loud", loud), ("qwen3", tiny("qwen3")), ("gemma3", tiny("gemma3"))):
        errors = []
        for number, (kv, fields) in enumerate((("kv4", plain), ("kv4", turned), ("kv8", turned))):
            scheme = replace(get_scheme(f"bf16+{kv}"), **fields)  # type: ignore[arg-type]
            out = tmp_path / f"{name}-{number}"
            quantize_model(source, scheme, out, quick)
            errors.append(logit_error(out, source))
        assert errors[1] < errors[0] and errors[2] < errors[1] / 5, (name, errors)
    stored = open_source(tmp_path / "loud-1").get("model.layers.1.self_attn.key_centre")
    assert stored.dtype == torch.float32 and stored.shape == (2, 2, 32)
    assert torch.allclose(stored[1].square().sum(-1), torch.tensor(2.0))
    assert open_source(tmp_path / "loud-2").get("model.layers.1.self_attn.key_centre").shape == (2, 32)


def test_a_mirror_takes_the_main_direction_to_equal_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    main = torch.nn.functional.normalize(torch.randn(2, 64, generator=generator), dim=-1)
    queries = torch.randn(500, 2, 64, generator=generator) + 5 * torch.randn(500, 2, 1, generator=generator) * main
    for is_rotated in (False, True):
        mirror = mirror_of(second_moments(queries, 2), is_rotated)
        assert torch.allclose(mirror.square().sum(-1), torch.tensor(2.0))
        turned = reflect_head(rotate_head(queries) if is_rotated else queries, mirror)
        assert torch.allclose(turned.norm(dim=-1), queries.norm(dim=-1), rtol=1e-5)
        share = turned.sum(-1).square().sum(0) / 64 / turned.square().sum((0, -1))
        assert (share > 0.25).all()  # of 26/90 that lie along it


@pytest.mark.parametrize("has_mirror", [False, True])
def test_the_first_key_of_a_sequence_is_on_the_grid(has_mirror: bool) -> None:
    scheme = replace(get_scheme("bf16+kv4"), kv_offset="centre", kv_rotation="hadamard")
    generator = torch.Generator().manual_seed(0)
    first, centre = torch.randn(3, 64, generator=generator) * 9, torch.randn(3, 64, generator=generator)
    if has_mirror:
        queries = torch.randn(100, 3, 64, generator=generator)
        centre = torch.stack((centre, mirror_of(second_moments(queries, 3), True)))
    moved = centre_on_sink(centre, first, scheme, 0)
    assert scheme.kv is not None

    def read_back(given: torch.Tensor) -> torch.Tensor:
        taken_off = split_centre(given)[0]
        assert scheme.kv is not None and taken_off is not None
        return restore_keys(fake_quantize(prepare_keys(first, given, True), scheme.kv), given, True) + taken_off

    read, plain = read_back(moved), read_back(centre)
    assert (read - first).norm() < 1e-3 * (plain - first).norm()


def test_every_low_bit_cache_asks_for_a_centre() -> None:
    for name in ("w4a4", "w8a8+kv4", "w4a4+kv8", "w8a8", "fp8", "bf16+kv4"):
        assert get_scheme(name).stores_key_centre and get_scheme(name).rotates_keys
    for name in ("w4a4+kv16", "w4a16"):
        assert not get_scheme(name).stores_key_centre and not get_scheme(name).rotates_keys


def test_a_checkpoint_without_it_is_refused(loud: Path, quick: CalibrationConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_model(loud, get_scheme("w8a8+kv4"), out, replace(quick, gptq=False))
    for path in out.glob("*.safetensors"):
        kept = {name: tensor for name, tensor in load_file(path).items() if name != CENTRE}
        save_file(kept, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="key_centre"):
        load_model(out)
