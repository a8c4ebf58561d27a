"""An engine under test: started within its memory budget, warmed up, with the bounds of what it runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from atom.errors import AtomError, UnsupportedError
from atom.kernels.bounds import GPUS, Gpu
from atom.models.device import choose_device
from atom.quant.presets import get_scheme

from ..engine import Engine
from ..engine_config import EngineConfig
from ..startup import Ready, start_up
from .drive import Driver
from .floor import GIB, ModelFloor, model_floor
from .offline_config import ModelChoice
from .prompts import Vocabulary
from .sample import Sample
from .under_way import UnderWayScheduler, fill_pool
from .workload import Segment, WorkItem

Say = Callable[[str], None]
WARM_UP = (8, 64, 8)  # requests, prompt tokens, output tokens


@contextmanager
def running(choice: ModelChoice, say: Say) -> Iterator[tuple[Ready, Driver]]:
    """The engine, started and warmed up by a few requests; shut down afterwards."""
    options = _with_memory(choice, choice.engine_options)
    ready = start_up(choice.model, options, say)
    low = min(256, ready.limits.vocab_size - 1)
    if ready.tokenizer is None:
        vocabulary = Vocabulary.of_range(low if ready.limits.vocab_size > 1024 else 0, ready.limits.vocab_size)
    else:
        vocabulary = Vocabulary.of_tokenizer(ready.tokenizer)
    scheduler = None
    if choice.is_dummy:
        scheduler = UnderWayScheduler(ready.limits)
        watchdog_s = options.watchdog_s(ready.model.device.type == "cpu")
        ready = replace(ready, engine=Engine(ready.runner, scheduler, watchdog_s))
    driver = Driver(ready.engine, vocabulary.token_ids)
    driver.start()
    try:
        say("warming up")
        count, prompt, output = WARM_UP
        length = min(prompt, ready.limits.max_sequence_tokens - output)
        items = [WorkItem((Segment(f"warm-up {i}", length),), output) for i in range(count)]
        check_samples(driver.run(items, seed=choice.seed), "the warm-up")
        if scheduler is not None and scheduler.written:
            fill_pool(ready.runner.kv.pool, scheduler.written)
        yield ready, driver
    finally:
        ready.engine.shutdown()


def check_samples(samples: list[Sample], what: str) -> list[Sample]:
    """The samples, if all are good; AtomError says which failed."""
    if bad := [sample for sample in samples if not sample.is_good]:
        raise AtomError(f"{len(bad)} of {len(samples)} requests of {what} failed ({bad[0].error}); the log says why")
    return samples


def _with_memory(choice: ModelChoice, options: EngineConfig) -> EngineConfig:
    """The engine's options under the memory budget.

    On a GPU the budget is a share of its memory, as vLLM's gpu_memory_utilization counts it: weights, activations at
    their peak, whatever else is there, and the rest for the cache. On a CPU the cache gets what packed weights leave.
    """
    if choice.memory_gb is None:
        return options
    device = choose_device(options.device)
    budget = choice.memory_gb * GIB
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if budget > total:
            raise ValueError(f"--memory-gb {choice.memory_gb:g} is more than the GPU's {total / GIB:.1f} GiB; lower it")
        return replace(options, gpu_memory_utilization=budget / total)
    if not choice.is_dummy:
        raise UnsupportedError("--memory-gb on a CPU is for shapes alone (--load-format dummy); use --kv-cache-bytes")
    weights = model_floor(choice.model, choice.engine.scheme or "bf16", GPUS["h200"]).weight_bytes
    left = int(budget - weights)
    if left <= 0:
        raise ValueError(
            f"the weights alone take {weights / GIB:.2f} GiB, --memory-gb is {choice.memory_gb:g}; raise it, or take "
            "a scheme of fewer bits"
        )
    return replace(options, kv_cache_bytes=left)


def known_gpu(device: torch.device) -> Gpu | None:
    """The GPU's rates for bounds, None for a CPU or a GPU whose rates are not known here."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    return next((gpu for key, gpu in GPUS.items() if key in name), None)


def served_floor(ready: Ready, gpu: Gpu) -> ModelFloor:
    """The floor of what runs, with the cache format that runs."""
    weights, cache = ready.model.scheme or get_scheme("bf16"), ready.runner.kv.pool.scheme
    served = weights.with_kv(None)
    if cache is not None:
        served = replace(served, kv=cache.kv, kv_overrides=cache.kv_overrides)
    return ModelFloor(ready.model.config, served, gpu)
