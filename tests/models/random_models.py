"""Tiny random models on disk, for the tests of this directory."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from atom.checkpoint import quantization_config
from atom.models.family import model_config
from atom.models.layout import KEY_CENTRE, KEY_OFFSET, PERM, layer_prefix
from atom.models.model import Model, build_model
from atom.quant.mixed import MixedWeight, quantize_weight
from atom.quant.schemes import Scheme
from atom.quant.stored import store_weight

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA3: dict[str, Any] = {
    **LLAMA,
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "head_dim": 16,
    "sliding_window": 4,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 16,
    "tie_word_embeddings": True,
}
QWEN2: dict[str, Any] = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3: dict[str, Any] = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16}
MISTRAL: dict[str, Any] = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
CONFIGS = {"llama": LLAMA, "gemma3": GEMMA3, "qwen2": QWEN2, "qwen3": QWEN3, "mistral": MISTRAL}


def random_model(raw: dict[str, Any], seed: int = 0) -> Model:
    """A float32 model with seeded weights, biases included."""
    model = build_model(model_config(raw)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.15
        parameter.data = noise + 1 if name.endswith("norm.weight") else noise
    return model


def save_model(model: Model, path: Path, shards: int = 1) -> Path:
    """Write a model as a Hugging Face directory of `shards` safetensors files."""
    return save_state({name: tensor.detach() for name, tensor in model.state_dict().items()}, model, path, shards)


def save_state(state: dict[str, Tensor], model: Model, path: Path, shards: int = 1) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    raw = dict(model.config.raw)
    if model.scheme is not None:
        raw["quantization_config"] = quantization_config(model.scheme)
    (path / "config.json").write_text(json.dumps(raw))
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    if shards == 1:
        save_file(state, path / "model.safetensors", {"format": "pt"})
        return path
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(state.items())[index::shards])
        save_file(part, path / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def quantized_state(
    model: Model, scheme: Scheme, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, MixedWeight], dict[str, Tensor]]:
    """Round a model to nearest under random permutations: (checkpoint tensors, weights, input orders by linear).

    The permutation of down's input is folded into the rows of gate and up, as a calibrator does it.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, MixedWeight] = {}
    orders: dict[str, Tensor] = {}
    for index in range(model.config.num_layers):
        prefix = layer_prefix(index)
        if scheme.stores_key_offset:
            shape = (model.config.num_kv_heads, model.config.head_dim)
            state[f"{prefix}.{KEY_OFFSET}"] = torch.zeros(shape, dtype=torch.bfloat16)
        if scheme.stores_key_centre:
            heads = (model.config.num_kv_heads, model.config.head_dim)
            state[f"{prefix}.{KEY_CENTRE}"] = torch.zeros((2, *heads) if scheme.mirrors_keys else heads)
        for group in reversed(model.family.groups):  # down first: its order is the rows of gate and up
            names = [f"{prefix}.{name}" for name in group.linears]
            if scheme.for_linear(names[0]).weight is None:
                continue
            size = state[f"{names[0]}.weight"].shape[1]
            reorders = scheme.for_linear(names[0]).reorder
            perm = torch.randperm(size, generator=generator) if reorders else torch.arange(size)
            for row in group.fold_into_rows:
                for key in (f"{prefix}.{row}.weight", f"{prefix}.{row}.bias"):
                    if key in state:
                        state[key] = state[key][perm]
            for name in names:
                linear = scheme.for_linear(name)
                weights[name] = quantize_weight(state.pop(f"{name}.weight")[:, perm], linear)
                orders[name] = perm
                stored = store_weight(weights[name], linear)
                if group.is_gathered and linear.reorder:
                    stored[PERM] = perm.to(torch.int32)
                state.update({f"{name}.{key}": tensor for key, tensor in stored.items()})
    return state, weights, orders
