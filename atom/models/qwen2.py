"""Qwen2 and Qwen2.5: biases on q, k and v; sliding windows in the upper layers where the config asks for them."""

from collections.abc import Mapping
from typing import Any

from .config import ModelConfig, base_fields, layer_types, windows_of
from .family import Family, input_groups
from .layers import DecoderLayer
from .rope import read_rope


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    fields = base_fields(raw, generation)
    types = read_layer_types(raw, fields["num_layers"])
    return ModelConfig(
        **fields,
        family=FAMILY.name,
        windows=windows_of(types, raw.get("sliding_window", 4096)),
        ropes=tuple(read_rope(raw, kind) for kind in types),
        qkv_bias=True,
    )


def read_layer_types(raw: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """Which layers slide: as `layer_types` says, else those from `max_window_layers` on if `use_sliding_window`."""
    types = layer_types(raw, layers)
    if types is not None and raw.get("use_sliding_window"):
        return types
    slides = bool(raw.get("use_sliding_window")) and raw.get("sliding_window", 4096) is not None
    first = int(raw.get("max_window_layers", 28)) if slides else layers
    return tuple("sliding_attention" if index >= first else "full_attention" for index in range(layers))


FAMILY = Family("qwen2", read_config, DecoderLayer, input_groups())
