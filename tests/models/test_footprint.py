"""Sizes counted from shapes against what is written and allocated."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from atom.models.family import model_config
from atom.models.footprint import mean_bits, measure_footprint, source_dtype
from atom.models.loader import load_model, meta_model
from atom.models.model import Model
from atom.models.source import open_source
from atom.quant.presets import PRESETS, get_scheme
from atom.quant.schemes import Override

from .random_models import GEMMA3, LLAMA, quantized_state, random_model, save_state

WIDE: dict[str, Any] = {**LLAMA, "hidden_size": 256, "intermediate_size": 392, "vocab_size": 300}
MODELS = {"llama": WIDE, "gemma3": {**GEMMA3, "hidden_size": 256, "intermediate_size": 392, "head_dim": 48}}


def allocated(model: Model) -> int:
    """Bytes of all tensors that a loaded model keeps, each storage once, wherever they hang."""
    seen: dict[int, int] = {}

    def visit(value: object, depth: int = 0) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        elif callable(value) and getattr(value, "__closure__", None) and depth < 4:
            for cell in value.__closure__:  # type: ignore[attr-defined]
                visit(cell.cell_contents, depth + 1)

    for module in model.modules():
        for value in [*module.parameters(False), *module.buffers(False), *vars(module).values()]:
            visit(value)
    return sum(seen.values())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", [n for n in PRESETS if n != "bf16"])
def test_within_two_percent_of_what_is_written_and_allocated(kind: str, name: str, tmp_path: Path) -> None:
    scheme = get_scheme(name)
    tiny = random_model(MODELS[kind])
    state, _, _ = quantized_state(tiny, scheme)
    tiny.scheme = scheme
    folder = save_state(state, tiny, tmp_path / "model")
    source = open_source(folder)
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    model = load_model(folder)
    size = measure_footprint(meta_model(model.config), scheme, source.dtype("model.embed_tokens.weight"))
    assert size.disk == pytest.approx(written, rel=0.02, abs=60_000)  # a header is 100 bytes a tensor
    assert size.dense == pytest.approx(allocated(model), rel=0.02)


def test_bits_are_a_mean_over_multiplications() -> None:
    model, scheme = meta_model(model_config(LLAMA)), get_scheme("w4a8")
    layer = next(model.model.decoder_layers())
    shapes = {name: layer.get_parameter(f"{name}.weight").shape for name in model.family.linears}
    down = Override("*.down_proj", get_scheme("w8a8").default_linear)
    weight, activation = mean_bits(model, replace(scheme, overrides=(down,)))
    costs = {name: N * K for name, (N, K) in shapes.items()}
    of_down = costs.pop("mlp.down_proj")
    K = shapes["mlp.down_proj"][1]
    expected = of_down * down.linear.weight_bits(K)
    expected += sum(cost * scheme.weight_bits(shapes[name][1]) for name, cost in costs.items())
    assert weight == pytest.approx(expected / (of_down + sum(costs.values())))
    assert 8 < activation < 8.6


def test_kv_bytes_of_llama_3_8b() -> None:
    """34,816 bytes a token in 4 bits: 4.25 bits an element of 32 layers with 8 heads of 128."""
    raw = {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
    }
    size = measure_footprint(meta_model(model_config(raw)), get_scheme("w4a4"), torch.bfloat16)
    assert (size.kv_token, size.kv_token_16) == (34816, 131072)


@pytest.mark.parametrize(
    ("said", "dtype"), [("float16", torch.float16), (None, torch.bfloat16), ("float32", torch.float32)]
)
def test_source_dtype(said: str | None, dtype: torch.dtype) -> None:
    assert source_dtype(model_config({**LLAMA, **({"dtype": said} if said else {})})) is dtype
