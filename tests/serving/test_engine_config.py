"""The engine's options: what they refuse, and the limits they become."""

from typing import Any

import pytest

from atom.serving.engine_config import EngineConfig, parse_bytes


@pytest.mark.parametrize(
    ("amount", "size"),
    [
        (5, 5),
        ("1073741824", 2**30),
        ("4GiB", 2**32),
        ("4Gi", 2**32),
        ("25G", 25 * 10**9),
        ("500 MB", 500 * 10**6),
        ("1.5k", 1500),
    ],
)
def test_amounts_of_memory(amount: int | str, size: int) -> None:
    assert parse_bytes(amount) == size


@pytest.mark.parametrize("amount", ["", "much", "-1", 0, "4 GiB of RAM", "GiB", True])
def test_what_is_no_amount(amount: Any) -> None:
    with pytest.raises(ValueError, match="is no amount of memory"):
        parse_bytes(amount)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu_memory_utilization": 0.0}, "above 0 and at most 1"),
        ({"gpu_memory_utilization": 90}, "above 0 and at most 1, got 90; use 0.9"),
        ({"watchdog_timeout": -1.0}, "must not be negative"),
        ({"max_model_len": 0}, "max_model_len must be at least 1"),
        ({"kv_cache_bytes": "lots"}, "is no amount of memory"),
        ({"scheme": "w4a8"}, "a checkpoint, which says its own scheme"),
        ({"max_num_seqs": 0, "max_num_batched_tokens": 8}, "max_num_seqs must be an integer of at least 1"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, "at least max_num_seqs = 64"),
        ({"watermark": 1.0}, "watermark must be at least 0 and below 1"),
        ({"growth_blocks": -1}, "growth_blocks must be an integer of at least 0"),
        ({"num_speculative_tokens": -1}, "num_speculative_tokens must be an integer of at least 0"),
        ({"prompt_lookup_min": 5}, "at most prompt_lookup_max = 4, got 5"),
        ({"block_size": 0}, "block_size must be an integer of at least 1"),
        ({"load_format": "random"}, "load_format must be one of auto, dummy, got 'random'"),
        ({"dtype": "float8"}, "dtype must be one of auto, float32, bfloat16, float16, got 'float8'"),
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype must be one of auto, kv4, kv8, kvfp8, kv16, got 'int4'"),
        ({"kernels": "torch"}, "kernels must be one of auto, reference, got 'torch'"),
        ({"head": "int4"}, "head must be one of full, int8, got 'int4'"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)


def test_limits() -> None:
    options = EngineConfig(max_num_seqs=3000, enable_prefix_caching=False)
    cpu, gpu = (options.limits(10, 20, 30, is_cpu) for is_cpu in (True, False))
    assert (cpu.vocab_size, cpu.max_model_len, cpu.num_blocks, cpu.block_size) == (10, 20, 30, 16)
    assert cpu.max_num_batched_tokens == 3000 and gpu.max_num_batched_tokens == 8192
    assert not cpu.prefix_cache
    assert EngineConfig(max_num_batched_tokens=512).limits(10, 20, 30, True).max_num_batched_tokens == 512


def test_a_cpu_has_more_time() -> None:
    assert (EngineConfig().watchdog_s(is_cpu=False), EngineConfig().watchdog_s(is_cpu=True)) == (300, 1800)
    assert EngineConfig(watchdog_timeout=7).watchdog_s(is_cpu=True) == 7
    assert EngineConfig(watchdog_timeout=0).watchdog_s(is_cpu=False) is None
