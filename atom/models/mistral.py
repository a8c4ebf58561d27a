"""Mistral: Llama without biases, with one sliding window for all layers (none since version 0.2)."""

from collections.abc import Mapping
from typing import Any

from .config import ModelConfig, base_fields
from .family import Family, input_groups
from .layers import DecoderLayer
from .rope import read_rope


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    fields = base_fields(raw, generation, num_key_value_heads=8)
    layers = fields["num_layers"]
    window = raw.get("sliding_window", 4096)  # a file without the key means version 0.1
    return ModelConfig(**fields, family=FAMILY.name, windows=(window,) * layers, ropes=(read_rope(raw),) * layers)


FAMILY = Family("mistral", read_config, DecoderLayer, input_groups())
