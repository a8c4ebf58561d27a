"""Llama 1 to 3.x, and the many models that use its architecture (TinyLlama, SmolLM2)."""

from collections.abc import Mapping
from typing import Any

from .config import ModelConfig, base_fields
from .family import Family, input_groups
from .layers import DecoderLayer
from .rope import read_rope


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    fields = base_fields(raw, generation)
    layers = fields["num_layers"]
    has_bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        **fields,
        family=FAMILY.name,
        windows=(None,) * layers,
        ropes=(read_rope(raw),) * layers,
        qkv_bias=has_bias,
        o_bias=has_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
    )


FAMILY = Family("llama", read_config, DecoderLayer, input_groups())
