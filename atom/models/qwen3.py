"""Qwen3 (dense): RMSNorm on every query and key head, no bias unless the config asks, windows as in Qwen2."""

from collections.abc import Mapping
from typing import Any

from .config import ModelConfig, base_fields, windows_of
from .family import Family, input_groups
from .layers import DecoderLayer
from .qwen2 import read_layer_types
from .rope import read_rope


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    fields = base_fields(raw, generation, head_dim=128)
    types = read_layer_types(raw, fields["num_layers"])
    has_bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        **fields,
        family=FAMILY.name,
        windows=windows_of(types, raw.get("sliding_window", 4096)),
        ropes=tuple(read_rope(raw, kind) for kind in types),
        qkv_bias=has_bias,
        o_bias=has_bias,
        qk_norm=True,
    )


FAMILY = Family("qwen3", read_config, DecoderLayer, input_groups())
