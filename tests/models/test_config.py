"""ModelConfig: spellings of config.json, old and new, and what is refused."""

from typing import Any

import pytest

from atom.errors import CheckpointError, UnsupportedError
from atom.models.config import ModelConfig
from atom.models.family import ARCHITECTURES, family_of, model_config
from atom.models.rope import RopeConfig

from .random_models import CONFIGS, GEMMA3, LLAMA, MISTRAL, QWEN2, QWEN3


def read(raw: dict[str, Any], **changes: Any) -> ModelConfig:
    return model_config({**raw, **changes})


def without(raw: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in keys}


LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            {"rope_theta": 500000.0, "rope_scaling": None},
            {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
            RopeConfig(theta=500000.0, original_max_positions=64),
        ),
        (
            {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}},
            RopeConfig("linear", 10000.0, 2.0, 64),
        ),
        (
            {"rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
            {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0}},
            RopeConfig("dynamic", 10000.0, 4.0, 64),
        ),
        (
            {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3_SCALING}},
            {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", **LLAMA3_SCALING}},
            RopeConfig("llama3", 500000.0, 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
        ),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 1.5}},
            {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5}},
            RopeConfig("yarn", 1e6, 4.0, 64, attention_factor=1.5),
        ),
    ],
    ids=["default", "linear", "dynamic", "llama3", "yarn"],
)
def test_rope_in_both_spellings(old: dict[str, Any], new: dict[str, Any], expected: RopeConfig) -> None:
    bare = without(LLAMA, "rope_theta")
    assert set(read({**bare, **old}).ropes) == {expected}
    assert set(read({**bare, **new}).ropes) == {expected}


def test_rope_theta_defaults_to_ten_thousand() -> None:
    assert read(without(LLAMA, "rope_theta")).ropes[0].theta == 10000.0


def test_gemma3_ropes_in_both_spellings() -> None:
    bare = {**without(GEMMA3, "rope_theta"), "num_hidden_layers": 2}  # one sliding layer, one full
    old = {"rope_theta": 2e6, "rope_local_base_freq": 5e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    new = {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
        }
    }
    for spelling in (old, new):
        sliding, full = read({**bare, **spelling}).ropes
        assert sliding == RopeConfig(theta=5e3, original_max_positions=64)
        assert full == RopeConfig("linear", 2e6, 8.0, 64)
    sliding, full = read(bare).ropes
    assert (sliding.theta, full.theta) == (10_000.0, 1_000_000.0)


def test_windows() -> None:
    assert read(LLAMA, sliding_window=4).windows == (None, None)  # Llama has none, whatever the file says
    assert read(MISTRAL, sliding_window=None).windows == (None, None)
    assert read(MISTRAL, sliding_window=16).windows == (16, 16)
    assert read(MISTRAL).windows == (4096, 4096)  # version 0.1 in files without the key
    for raw in (QWEN2, QWEN3):
        assert read(raw, use_sliding_window=False, sliding_window=8).windows == (None, None)
        assert read(raw, use_sliding_window=True, sliding_window=8, max_window_layers=1).windows == (None, 8)
        types = ["sliding_attention", "full_attention"]
        assert read(raw, use_sliding_window=True, sliding_window=8, layer_types=types).windows == (8, None)
        assert read(raw, use_sliding_window=False, sliding_window=8, layer_types=types).windows == (None, None)
    assert read(GEMMA3, num_hidden_layers=5).windows == (4, None, 4, None, 4)
    six = without(GEMMA3, "sliding_window_pattern")
    assert read(six, num_hidden_layers=7).windows == (4, 4, 4, 4, 4, None, 4)


def test_gemma3_rules() -> None:
    config = read(GEMMA3, final_logit_softcapping=30.0, query_pre_attn_scalar=64)
    assert config.norm_offset == 1.0
    assert config.embedding_scale == 8.0  # sqrt(64)
    assert config.attention_scale == 0.125
    assert config.logit_soft_cap == 30.0
    assert (config.qk_norm, config.activation, config.tie_embeddings) == (True, "gelu_tanh", True)


def test_biases_and_norms_by_family() -> None:
    found = {
        name: (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm)
        for name, config in ((name, read(raw)) for name, raw in CONFIGS.items())
    }
    assert found["llama"] == found["mistral"] == (False, False, False, False)
    assert found["qwen2"] == (True, False, False, False)
    assert found["qwen3"] == found["gemma3"] == (False, False, False, True)
    biased = read(LLAMA, attention_bias=True, mlp_bias=True)
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias) == (True, True, True)


def test_eos_ids_come_from_both_files() -> None:
    assert read(LLAMA, eos_token_id=[7, 8]).eos_token_ids == (7, 8)
    both = model_config({**LLAMA, "eos_token_id": 7}, {"eos_token_id": [9, 7]})
    assert both.eos_token_ids == (7, 9)
    assert read(LLAMA, eos_token_id=None).eos_token_ids == ()


def test_head_counts() -> None:
    config = read(without(LLAMA, "num_key_value_heads"))
    assert (config.num_kv_heads, config.queries_per_kv, config.head_dim) == (4, 1, 16)
    assert read(LLAMA, head_dim=32).head_dim == 32
    assert read(without(QWEN3, "head_dim")).head_dim == 128  # Qwen3's default, not hidden / heads


def test_config_is_a_value() -> None:
    assert read(LLAMA) == read(LLAMA, _name_or_path="elsewhere")  # the raw file does not count
    assert hash(read(LLAMA)) == hash(read(LLAMA))


@pytest.mark.parametrize("raw", CONFIGS.values(), ids=CONFIGS)
def test_every_linear_stands_in_one_group(raw: dict[str, Any]) -> None:
    from torch import nn

    from atom.models.model import build_layer

    family, layer = family_of(raw), build_layer(read(raw), 0)
    linears = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(family.linears) == sorted(linears)
    for group in family.groups:
        layer.get_submodule(group.producer)  # it is there
        assert all(family.group_of(linear) is group for linear in group.linears)
    with pytest.raises(KeyError):
        family.group_of("lm_head")


def test_unknown_architecture_lists_the_known() -> None:
    with pytest.raises(
        UnsupportedError, match="GPT2LMHeadModel is not supported; supported: LlamaForCausalLM"
    ) as error:
        read(LLAMA, architectures=["GPT2LMHeadModel"])
    assert all(name in str(error.value) for name in ARCHITECTURES)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architectures": None}, CheckpointError, "names no architecture"),
        ({"hidden_size": None}, CheckpointError, "hidden_size = None; it must be a positive integer"),
        ({"num_hidden_layers": "12"}, CheckpointError, "num_hidden_layers = '12'"),
        ({"num_key_value_heads": 3}, CheckpointError, "4 attention heads over 3 KV heads"),
        ({"hidden_act": "relu"}, UnsupportedError, "activation 'relu' is not supported; supported: silu"),
        ({"rope_scaling": {"rope_type": "longrope"}}, UnsupportedError, "RoPE type 'longrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, CheckpointError, "factor = None for RoPE type 'linear'"),
        ({"partial_rotary_factor": 0.5}, UnsupportedError, r"partial_rotary_factor 0\.5 is not supported"),
    ],
)
def test_refusals(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read(LLAMA, **changes)


def test_refusals_of_layer_types() -> None:
    with pytest.raises(UnsupportedError, match="linear_attention"):
        read(QWEN3, use_sliding_window=True, layer_types=["linear_attention", "full_attention"])
    with pytest.raises(CheckpointError, match="1 layer_types for 2 layers"):
        read(QWEN3, use_sliding_window=True, layer_types=["full_attention"])
    with pytest.raises(CheckpointError, match="no sliding_window"):
        read(GEMMA3, sliding_window=None)
    with pytest.raises(UnsupportedError, match="use_bidirectional_attention"):
        read(GEMMA3, use_bidirectional_attention=True)
