"""Every family against transformers: tiny random models, float32, prefill and token by token."""

import json

import pytest
import torch

from atom.models.family import model_config
from atom.models.kv import DenseKV
from atom.models.model import Model, build_model

BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,  # large enough that scores differ and a wrong angle shows
    "attn_implementation": "eager",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-1-no-gqa": ("Llama", {"num_key_value_heads": 4}),
    "llama-one-kv-head": ("Llama", {"num_key_value_heads": 1}),
    "llama-wide-heads": ("Llama", {"head_dim": 16}),  # heads * head_dim is not the hidden size
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}}),
    "llama-dynamic-short": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0}}),
    "llama-dynamic-long": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0}, "max_position_embeddings": 8},
    ),
    "llama-3.1": (
        "Llama",
        {"rope_parameters": {**LLAMA3, "rope_theta": 500.0, "original_max_position_embeddings": 16}},
    ),
    "llama-3.1-whole-length": ("Llama", {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}}),
    "llama-yarn": ("Llama", {"rope_parameters": {**YARN, "rope_theta": 500.0}}),
    "llama-yarn-mscale": (
        "Llama",
        {
            "rope_parameters": {
                **YARN,
                "rope_theta": 500.0,
                "mscale": 0.7,
                "mscale_all_dim": 1.2,
                "beta_fast": 8.0,
                "beta_slow": 2.0,
                "truncate": False,
            }
        },
    ),
    "llama-yarn-factor": ("Llama", {"rope_parameters": {**YARN, "rope_theta": 500.0, "attention_factor": 1.3}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 5}),
    "mistral-window-longer": ("Mistral", {"sliding_window": 50}),
    "mistral-window-two": ("Mistral", {"sliding_window": 2}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": {**YARN, "rope_theta": 1000000.0}}),
    "qwen3": ("Qwen3", {}),
    "qwen3-bias": ("Qwen3", {"attention_bias": True, "head_dim": 16}),
    "qwen3-window": ("Qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}),
    "qwen3-layer-types": (
        "Qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "gemma3": ("Gemma3", {"sliding_window": 5, "num_hidden_layers": 7}),
    "gemma3-window-longer": ("Gemma3", {"sliding_window": 512, "query_pre_attn_scalar": 24}),
    "gemma3-untied": ("Gemma3", {"sliding_window": 4, "tie_word_embeddings": False, "attention_bias": True}),
    "gemma3-caps": ("Gemma3", {"sliding_window": 4, "final_logit_softcapping": 3.0}),
    "gemma3-scaled": (
        "Gemma3",
        {
            "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
}


def make_pair(prefix: str, changes: dict[str, object]) -> tuple[torch.nn.Module, Model]:
    """The same random weights in transformers' model and in ours."""
    import transformers

    settings = {**BASE, **changes}
    name = "Gemma3Text" if prefix == "Gemma3" else prefix
    config = getattr(transformers, f"{name}Config")(**settings)
    torch.manual_seed(0)
    reference = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    for parameter in reference.parameters():  # biases and norms are not random at birth
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) * 0.2
    raw = {**json.loads(config.to_json_string(use_diff=False)), "architectures": [f"{prefix}ForCausalLM"]}
    ours = build_model(model_config(raw)).eval()
    state = reference.state_dict()
    if ours.lm_head is None:
        state.pop("lm_head.weight")
    ours.load_state_dict(state, strict=True)  # the names are the same
    return reference, ours


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_equal_transformers(case: str) -> None:
    reference, ours = make_pair(*CASES[case])
    batch, seq = 2, 19  # an odd length beyond every small window, below the large ones
    tokens = torch.randint(0, 97, (batch, seq), generator=torch.Generator().manual_seed(1))
    expected = reference(tokens, use_cache=False).logits.flatten(0, 1)

    kv = DenseKV(ours.config, batch)
    got = ours.logits(ours(tokens.flatten(), kv.positions(seq), kv))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)

    from transformers import DynamicCache

    past = DynamicCache(config=reference.config)
    kv = DenseKV(ours.config, batch, max_len=seq)
    start = 0
    for end in (4, *range(5, seq + 1)):  # a prefill of four tokens, then one by one
        chunk = tokens[:, start:end]
        want = reference(chunk, past_key_values=past, use_cache=True).logits.flatten(0, 1)
        got = ours.logits(ours(chunk.flatten(), kv.positions(end - start), kv))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        start = end
