"""Gemma 3 (text): norms before and after each half of the layer, GeGLU, q/k-norm, five sliding layers to a full one.

The norm's weight is stored less one, the embedding is scaled by sqrt(hidden_size), and sliding layers have a RoPE
base of their own. `post_attention_layernorm` here normalises what attention returns; the norm before the MLP is
`pre_feedforward_layernorm`.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import UnsupportedError
from .config import ModelConfig, base_fields, layer_types, windows_of
from .family import Family, input_groups
from .kv import KV
from .layers import DecoderLayer, norm
from .rope import RopeConfig, Rotation, parse_rope


class Gemma3DecoderLayer(DecoderLayer):
    """Llama's layer with two more norms, on what attention and MLP return."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index)
        self.pre_feedforward_layernorm = norm(config)
        self.post_feedforward_layernorm = norm(config)

    def step(self, hidden: Tensor, update: Tensor | None, rotation: Rotation, kv: KV) -> tuple[Tensor, Tensor]:
        """See DecoderLayer.step."""
        hidden, x = self.input_layernorm.after(hidden, update)
        attended = self.post_attention_layernorm(self.self_attn(x, rotation, kv))
        hidden, x = self.pre_feedforward_layernorm.after(hidden, attended)
        return hidden, self.post_feedforward_layernorm(self.mlp(x))


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    if raw.get("use_bidirectional_attention"):
        raise UnsupportedError(
            "config.json sets use_bidirectional_attention; Atom runs causal models; use a text-generation checkpoint."
        )
    fields = base_fields(
        raw,
        generation,
        num_key_value_heads=4,
        head_dim=256,
        hidden_activation="gelu_pytorch_tanh",
        tie_word_embeddings=True,
        max_position_embeddings=131072,
        bos_token_id=2,
        eos_token_id=1,
    )
    layers = fields["num_layers"]
    period = int(raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or 6)
    types = layer_types(raw, layers) or tuple(
        "sliding_attention" if (index + 1) % period else "full_attention" for index in range(layers)
    )
    fields["attention_scale"] = float(raw.get("query_pre_attn_scalar", 256)) ** -0.5
    ropes = {kind: _rope(raw, kind) for kind in ("full_attention", "sliding_attention")}
    return ModelConfig(
        **fields,
        family=FAMILY.name,
        windows=windows_of(types, raw.get("sliding_window", 4096)),
        ropes=tuple(ropes[kind] for kind in types),
        attention_soft_cap=raw.get("attn_logit_softcapping"),
        logit_soft_cap=raw.get("final_logit_softcapping"),
        qkv_bias=bool(raw.get("attention_bias", False)),
        o_bias=bool(raw.get("attention_bias", False)),
        qk_norm=True,
        norm_offset=1.0,
        embedding_scale=fields["hidden_size"] ** 0.5,
    )


def _rope(raw: Mapping[str, Any], kind: str) -> RopeConfig:
    """Full layers: rope_theta (10^6) and any scaling. Sliding layers: rope_local_base_freq (10^4), unscaled."""
    nested = (raw.get("rope_parameters") or {}).get(kind)
    if kind == "sliding_attention":
        return parse_rope(nested or {}, {**raw, "rope_theta": raw.get("rope_local_base_freq")}, 10_000.0)
    return parse_rope({**(nested or {}), **(raw.get("rope_scaling") or {})}, raw, 1_000_000.0)


FAMILY = Family("gemma3", read_config, Gemma3DecoderLayer, input_groups("pre_feedforward_layernorm"))
