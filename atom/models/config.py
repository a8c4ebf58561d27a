"""What a model is: one frozen value normalised from a Hugging Face `config.json`.

Every spelling that config files have used over the years ends here; the rest of the code reads `ModelConfig`
only. What differs from family to family (who has biases, which layers slide) is said in the family's own file,
which builds the value with `base_fields`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from .rope import RopeConfig

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


@dataclass(frozen=True)
class ModelConfig:
    """The shape and the rules of one decoder-only model.

    `windows` and `ropes` have one entry a layer: the sliding window in tokens (None: the whole text) and the
    rotary embedding. A query at position i sees keys at positions i - window + 1 ... i.
    """

    architecture: str  # as config.json names it, e.g. LlamaForCausalLM
    family: str  # name in atom.models.family.FAMILIES
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    activation: str  # "silu" | "gelu_tanh", applied to the gate
    tie_embeddings: bool
    windows: tuple[int | None, ...]
    ropes: tuple[RopeConfig, ...]
    attention_scale: float  # softmax(q k^T * attention_scale)
    attention_soft_cap: float | None = None  # scores become cap * tanh(scores / cap)
    logit_soft_cap: float | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim of every query and key head, before RoPE
    norm_offset: float = 0.0  # RMSNorm multiplies by weight + norm_offset; Gemma's is 1
    embedding_scale: float | None = None  # Gemma multiplies the embedding by sqrt(hidden_size)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def queries_per_kv(self) -> int:
        """How many query heads share one KV head."""
        return self.num_heads // self.num_kv_heads


def base_fields(raw: Mapping[str, Any], generation: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """The fields that mean the same in every family, as keyword arguments of ModelConfig.

    `defaults` are the family's own values for keys of config.json that a file may leave out.
    """
    source = raw
    raw = {**defaults, **{key: value for key, value in raw.items() if value is not None or key not in defaults}}
    hidden_size, num_heads = _positive(raw, "hidden_size"), _positive(raw, "num_attention_heads")
    num_kv_heads = _positive(raw, "num_key_value_heads") if raw.get("num_key_value_heads") else num_heads
    head_dim = _positive(raw, "head_dim") if raw.get("head_dim") else hidden_size // num_heads
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"config.json has {num_heads} attention heads over {num_kv_heads} KV heads; "
            "the first must be a multiple of the second; check the checkpoint."
        )
    return {
        "architecture": architecture(raw),
        "vocab_size": _positive(raw, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": _positive(raw, "intermediate_size"),
        "num_layers": _positive(raw, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": int(raw.get("max_position_embeddings") or 2048),
        "rms_norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
        "activation": _activation(raw.get("hidden_activation") or raw.get("hidden_act") or "silu"),
        "tie_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "attention_scale": head_dim**-0.5,
        "bos_token_id": raw.get("bos_token_id"),
        "eos_token_ids": _token_ids(raw.get("eos_token_id"), generation.get("eos_token_id")),
        "raw": dict(source),
    }


def architecture(raw: Mapping[str, Any]) -> str:
    """The one architecture that config.json names; CheckpointError if it names none."""
    names = raw.get("architectures")
    if not names:
        raise CheckpointError(
            "config.json names no architecture; a causal language model's config has "
            '"architectures": ["LlamaForCausalLM"] or the like; add the line that fits the model.'
        )
    return str(names[0])


def layer_types(raw: Mapping[str, Any], num_layers: int) -> tuple[str, ...] | None:
    """config.json's `layer_types`, checked, or None where it has none."""
    types = raw.get("layer_types")
    if types is None:
        return None
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedError(
            f"config.json has layer types {unknown}; supported: full_attention, sliding_attention; "
            "use a model whose layers are all attention."
        )
    if len(types) < num_layers:
        raise CheckpointError(
            f"config.json has {len(types)} layer_types for {num_layers} layers; it needs one a layer; check the file."
        )
    return tuple(types[:num_layers])


def windows_of(types: tuple[str, ...], window: int | None) -> tuple[int | None, ...]:
    """The sliding window of each layer: `window` where the layer slides, None elsewhere."""
    if "sliding_attention" in types and not window:
        raise CheckpointError(
            "config.json has sliding_attention layers and no sliding_window; it needs their window in tokens."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _positive(raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise CheckpointError(
            f"config.json has {key} = {value!r}; it must be a positive integer; the file is incomplete or damaged."
        )
    return value


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise UnsupportedError(
            f"activation {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}; use a model with one of these."
        )
    return ACTIVATIONS[name]


def _token_ids(*values: Any) -> tuple[int, ...]:
    """Ids in order without repetition; each value is None, an id or a list of ids."""
    found: dict[int, None] = {}
    for value in values:
        for token in value if isinstance(value, list | tuple) else [value]:
            if token is not None:
                found[int(token)] = None
    return tuple(found)
