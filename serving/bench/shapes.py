"""Model shapes by name, so that a 7B or 70B model is measured or bounded without its weights.

Values are those of the published config.json files.
"""

import json
from pathlib import Path
from typing import Any

from atom.models.config import ModelConfig

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA_3: dict[str, Any] = {
    **_LLAMA,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        **_LLAMA,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
    },
    "llama-2-13b": {
        **_LLAMA,
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
    },
    "llama-3-8b": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3-70b": {
        **_LLAMA_3,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "tiny": {
        **_LLAMA,
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
    },
}


def read_shape(name: str) -> tuple[str, dict[str, Any]]:
    """(what records call it, its config.json): a name in SHAPES, a config.json, or a directory that holds one.

    Raises ValueError if it is none of these.
    """
    if name in SHAPES:
        return name, SHAPES[name]
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        return (file.parent.name if file.name == "config.json" else file.stem), json.loads(
            file.read_text(encoding="utf-8")
        )
    raise ValueError(f"no shape {name!r}; use one of {', '.join(SHAPES)}, a config.json, or a model's directory")


def shape_config(name: str) -> ModelConfig:
    """The shape called `name` as a model's config."""
    return ModelConfig.from_hf(read_shape(name)[1])


def write_shape(name: str, folder: Path) -> Path:
    """Make `folder` a model directory without weights: what the engine's dummy loader reads. Returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(read_shape(name)[1], indent=1), encoding="utf-8")
    return folder
