"""How many KV blocks a given memory makes, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from atom.errors import UnsupportedError
from atom.models.config import ModelConfig
from atom.models.family import model_config
from atom.quant.presets import get_scheme
from atom.serving.engine_config import EngineConfig
from atom.serving.kv_pool import KVPool
from atom.serving.memory import plan_cache


@pytest.fixture
def config(tiny: Callable[[str], Path]) -> ModelConfig:
    return model_config(json.loads((tiny("llama") / "config.json").read_text()))


@pytest.mark.parametrize("scheme", ["bf16", "bf16+kv4", "w8a8", "fp8"])
def test_the_pool_takes_what_was_planned(config: ModelConfig, scheme: str) -> None:
    plan = plan_cache(config, get_scheme(scheme), torch.bfloat16, EngineConfig(block_size=8), 2**20)
    pool = KVPool(config, get_scheme(scheme), plan.num_blocks, 8, torch.bfloat16)
    assert pool.num_bytes == plan.num_bytes <= 2**20 < plan.num_bytes + plan.block_bytes
    assert plan.max_model_len == 128 and not plan.is_shortened


def test_a_context_that_the_cache_cannot_hold(config: ModelConfig) -> None:
    block = 3 * 2 * 16 * 2 * 32 * 4  # layers, keys and values, tokens, KV heads, head_dim, float32
    plan = plan_cache(config, None, torch.float32, EngineConfig(), 5 * block + 1)
    assert (plan.num_blocks, plan.block_bytes, plan.max_model_len, plan.is_shortened) == (5, block, 81, True)
    plan = plan_cache(config, None, torch.float32, EngineConfig(max_model_len=81), 5 * block)
    assert plan.max_model_len == 81 and not plan.is_shortened
    with pytest.raises(ValueError, match=r"max_model_len 82 .* holds 80 tokens; lower max_model_len, raise"):
        plan_cache(config, None, torch.float32, EngineConfig(max_model_len=82), 5 * block)
    with pytest.raises(ValueError, match="the model's context has 128 tokens"):
        plan_cache(config, None, torch.float32, EngineConfig(max_model_len=129), 500 * block)
    with pytest.raises(UnsupportedError, match=r"one block of 16 tokens takes .* MiB; raise gpu_memory_utilization"):
        plan_cache(config, None, torch.float32, EngineConfig(), block - 1)
