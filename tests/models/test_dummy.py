"""Dummy weights go through the loader as real ones do, in every scheme."""

import json
from pathlib import Path

import pytest
import torch

from atom.checkpoint import quantization_config
from atom.errors import CheckpointError
from atom.models.dummy import SHAPES, DummyWeights, dummy_source
from atom.models.kv import DenseKV
from atom.models.layout import Expected
from atom.models.loader import load_source
from atom.quant.formats import get_format
from atom.quant.packing import unpack
from atom.quant.presets import PRESETS, get_scheme
from atom.quant.rounding import code_values


@pytest.mark.parametrize("scheme", [None, *PRESETS, "w4a8+kv8"])
def test_a_dummy_model_computes(scheme: str | None) -> None:
    model = load_source(dummy_source("tiny", None if scheme is None else get_scheme(scheme)))
    assert (model.scheme is None) == (scheme in (None, "bf16"))
    kv = DenseKV.for_scheme(model.config, model.scheme)
    with torch.inference_mode():
        hidden = model(torch.arange(9), kv.positions(9), kv)
    assert hidden.isfinite().all() and 0.5 < hidden.std() < 2  # after the norm
    assert model.logits(hidden).std() > 0.05


def test_shapes() -> None:
    source = dummy_source("llama-3-8b", get_scheme("w4a8"))
    assert source.shape("model.layers.31.mlp.down_proj.weight_packed") == (4096, 7168)
    assert source.is_quantized and source.provenance["kind"] == "dummy"
    parameters = dict.fromkeys(SHAPES, 0)
    for name in SHAPES:
        plain = dummy_source(name)
        for tensor in plain.names():
            parameters[name] += torch.Size(plain.shape(tensor)).numel()
    # as published
    assert round(parameters["llama-2-7b"] / 1e9, 2) == 6.74 and round(parameters["llama-2-13b"] / 1e9, 2) == 13.02
    assert round(parameters["llama-3-8b"] / 1e9, 2) == 8.03 and round(parameters["llama-3-70b"] / 1e9, 2) == 70.55


def test_a_directory_lends_its_shape_and_not_its_scheme(tmp_path: Path) -> None:
    raw = {**SHAPES["tiny"], "quantization_config": quantization_config(get_scheme("w4a4"))}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert "model.layers.0.mlp.up_proj.weight" in dummy_source(tmp_path).names()
    assert "model.layers.0.mlp.up_proj.weight_packed" in dummy_source(tmp_path, get_scheme("w8a8")).names()
    with pytest.raises(CheckpointError, match="has no shape; dummy weights take tiny, llama-2-7b"):
        dummy_source("llama-9")


def test_a_factor_is_one_that_kernels_take() -> None:
    """Under an outer scale per row a scale is a whole number up to 15, and weights are as small as elsewhere."""
    source = dummy_source("tiny", get_scheme("w4a8"))
    name = next(name for name in source.names() if name.endswith("weight_scale"))
    assert int(source.get(name).min()) >= 1 and int(source.get(name).max()) <= 15
    outer = source.get(name.replace("weight_scale", "weight_channel_scale"))
    assert 0.001 < float(outer.max()) * int(source.get(name).max()) < 0.01


def test_e4m3_codes_are_numbers() -> None:
    weights = DummyWeights({"x.weight_packed": Expected((256, 256), torch.float8_e4m3fn)})
    values = weights.get("x.weight_packed").float()
    assert values.isfinite().all() and values.abs().max() == 448 and 110 < values.std() < 130


@pytest.mark.parametrize(("scheme", "std"), [("w4a8", 2.6), ("w3a3", 1.1), ("nvfp4", 2.2)])
def test_codes_of_few_bits_are_distributed_as_a_group_s(scheme: str, std: float) -> None:
    """The largest of 128 normal values takes the largest code."""
    source = dummy_source("tiny", get_scheme(scheme))
    name = "model.layers.0.mlp.up_proj.weight_packed"
    spec = get_scheme(scheme).for_linear(name.removesuffix(".weight_packed")).weight
    assert spec is not None
    fmt = get_format(spec.format)
    packed = source.get(name)
    codes = unpack(packed, fmt, packed.shape[1] * 8 // fmt.bits)
    values = code_values(codes, fmt)
    assert values.std() == pytest.approx(std, rel=0.1) and values.abs().max() == fmt.max
