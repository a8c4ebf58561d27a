"""From a name to an engine: what is said on the way, what runs, what is refused."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from atom.errors import CheckpointError, UnsupportedError
from atom.quant.presets import KV4, get_scheme
from atom.serving.engine_config import EngineConfig
from atom.serving.startup import cache_scheme, start_up

Tiny = Callable[[str], Path]


def test_what_is_said_and_what_runs(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    said: list[str] = []
    with caplog.at_level(logging.INFO, "atom.serving.startup"):
        ready = start_up(str(tiny("llama")), EngineConfig(kv_cache_bytes="1MiB", device="cpu"), said.append)
    assert said == ["loading the tokenizer", "loading the weights", "sizing the KV cache"]
    facts = ready.facts
    block = 3 * 2 * 16 * 2 * 32 * 4  # layers, keys and values, tokens, KV heads, head_dim, float32
    assert facts["num_blocks"] == 2**20 // block == ready.limits.num_blocks
    assert facts["kv_cache_bytes"] == ready.runner.kv.pool.num_bytes == facts["num_blocks"] * block
    assert facts["kernels"] == {"rope_append_kv": "reference", "paged_attention": "reference"}
    assert facts["reserved_bytes"] is None  # of a GPU alone
    assert (facts["scheme"], facts["kv"], facts["dtype"]) == ("none", "bf16", "float32")
    assert ready.eos_token_ids == (257,) and ready.tokenizer.encode("a") == [64]
    assert "num_blocks=42" in caplog.text and "max_num_batched_tokens=2048" in caplog.text
    assert ready.runner.depth == 1 and ready.runner.buckets is None
    assert not ready.engine.healthy  # it is started by whoever listens
    ready.engine.shutdown()


def test_a_cache_shorter_than_the_context_is_reported(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    ready = start_up(str(tiny("llama")), EngineConfig(kv_cache_bytes="150KB", device="cpu"))
    assert ready.limits.max_model_len == 97 and ready.limits.num_blocks == 6
    assert "max_model_len is 97" in caplog.text and "the model's context has 128 tokens" in caplog.text
    with pytest.raises(ValueError, match="holds 96 tokens; lower max_model_len"):
        start_up(str(tiny("llama")), EngineConfig(kv_cache_bytes="150KB", device="cpu", max_model_len=128))
    with pytest.raises(UnsupportedError, match="are left for the KV cache"):
        start_up(str(tiny("llama")), EngineConfig(kv_cache_bytes=1000, device="cpu"))


def test_another_cache_than_the_schemes(tiny: Tiny) -> None:
    options = EngineConfig(kv_cache_dtype="kv4", dtype="bfloat16", kv_cache_bytes="1MiB", device="cpu")
    ready = start_up(str(tiny("qwen2")), options)
    assert ready.runner.kv.pool.scheme is not None and ready.runner.kv.pool.scheme.kv == KV4
    assert ready.runner.kv.pool.dtype == ready.model.dtype == torch.bfloat16
    assert (ready.facts["scheme"], ready.facts["kv"]) == ("none", "int4")
    w4a8 = get_scheme("w4a8")
    assert cache_scheme(w4a8, "auto") is w4a8 and cache_scheme(None, "auto") is None
    assert cache_scheme(w4a8, "auto", 16) == get_scheme("w4a8+kv4r16")
    assert cache_scheme(get_scheme("w4a8+kv4r16"), "auto", 0) == w4a8 and cache_scheme(None, "auto", 0) is None
    with pytest.raises(ValueError, match="kv is None; give kv"):
        cache_scheme(None, "auto", 16)
    changed = cache_scheme(w4a8, "kv16")
    assert changed is not None and changed.kv is None and changed.weight == w4a8.weight


def test_a_missing_model_and_an_unknown_shape() -> None:
    with pytest.raises(CheckpointError, match="not there"):
        start_up("no-such-model", EngineConfig(device="cpu"))
    with pytest.raises(CheckpointError, match="has no shape"):
        start_up("no-such-model", EngineConfig(device="cpu", load_format="dummy"))
