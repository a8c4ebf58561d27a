"""From a model's name to an engine that only needs to be started: the one way in, for LLM and for the server."""

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from atom.errors import UnsupportedError
from atom.models.device import choose_device, choose_dtype
from atom.models.dummy import dummy_source
from atom.models.loader import load_source, load_tokenizer, open_source
from atom.models.model import Model
from atom.models.quantized import Quantized
from atom.quant.presets import KV_SUFFIXES, get_scheme, kv_name
from atom.quant.schemes import Scheme

from .config import SchedulerConfig
from .decode_buckets import bucket_sizes
from .engine import Engine
from .engine_config import EngineConfig
from .kv_pool import KVPool, bytes_per_block
from .memory import CPU_CACHE_BYTES, CachePlan, Reserve, gpu_cache_bytes, plan_cache, recent_room, used_bytes
from .profile_run import measure_reserve
from .prompt_pieces import SIZES
from .rows import MOST_TOKENS
from .runner import Runner
from .sampler import Sampler
from .scheduler import Scheduler

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Ready:
    """An engine that is made, and not started.

    tokenizer  of transformers; None for dummy weights without one
    facts      what runs here, for logs and records
    """

    engine: Engine
    model: Model
    tokenizer: Any
    runner: Runner
    limits: SchedulerConfig
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self.model.config.eos_token_ids


def start_up(model: str, options: EngineConfig | None = None, progress: Progress | None = None) -> Ready:
    """Load a model and its tokenizer, make the KV cache, warm up.

    model     Atom checkpoint, directory, GGUF file, hub id or alias; with load_format="dummy" a shape
    progress  called with what is being done, in a few words, again and again
    Raises CheckpointError, UnsupportedError or ValueError, with what to do about it.
    """
    options = options or EngineConfig()
    say = progress or (lambda text: None)
    started = time.perf_counter()
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    say("loading the tokenizer")  # small, and missing more often than the weights
    tokenizer = _tokenizer(model, options)
    tokenizer_s = time.perf_counter() - started
    say("loading the weights")
    loaded = _load(model, options, device, dtype)
    if device.type == "cuda":  # kernels and graphs are not torch's, and cannot have what its cache still holds
        torch.cuda.empty_cache()
    weights_s = time.perf_counter() - started - tokenizer_s
    scheme = cache_scheme(loaded.scheme, options.kv_cache_dtype, options.kv_recent)
    refuse_mixed_results(scheme, options)
    say("sizing the KV cache")
    plan, reserve = _plan(loaded, scheme, options)
    cache_s = time.perf_counter() - started - tokenizer_s - weights_s
    limits = options.limits(loaded.config.vocab_size, plan.max_model_len, plan.num_blocks, device.type == "cpu")
    if options.attention_split_tokens is not None and scheme is not None and scheme.kv_recent:
        limits = replace(limits, forks=False)  # as for prefixes: see refuse_mixed_results
    warm_up_s = -time.perf_counter()
    runner = make_runner(loaded, scheme, options, limits)
    before = used_bytes(device)
    runner.warm_up(lambda done, total: say(f"warming up: decode batch {done} of {total}"))
    warm_up_bytes = used_bytes(device) - before
    warm_up_s += time.perf_counter()
    engine = Engine(runner, Scheduler(limits), options.watchdog_s(device.type == "cpu"))
    facts = {
        "model": model,
        "scheme": "none" if loaded.scheme is None else loaded.scheme.name,
        "kv": "bf16" if scheme is None else kv_name(scheme),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "kernels": kernels_of(loaded, runner),
        "num_blocks": plan.num_blocks,
        "block_size": options.block_size,
        "kv_cache_bytes": plan.num_blocks * plan.block_bytes,
        "kv_recent_bytes": plan.recent_bytes,
        "kv_cache_tokens": limits.cache_tokens,
        "max_model_len": plan.max_model_len,
        "max_num_seqs": limits.max_num_seqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
        "decode_buckets": len(runner.buckets.sizes) if runner.buckets else 0,
        "reserved_bytes": None if reserve is None else asdict(reserve),
        "warm_up_bytes": warm_up_bytes,
        "tokenizer_s": round(tokenizer_s, 2),
        "weights_s": round(weights_s, 2),
        "cache_s": round(cache_s, 2),
        "warm_up_s": round(warm_up_s, 2),
        "start_up_s": round(time.perf_counter() - started, 2),
    }
    if plan.is_shortened:
        logger.warning(
            "max_model_len is %d: the KV cache holds no longer sequence; the model's context has %d tokens",
            plan.max_model_len,
            loaded.config.max_position_embeddings,
        )
    logger.info("engine ready: %s", ", ".join(f"{key}={value}" for key, value in facts.items()))
    gc.collect()
    gc.freeze()  # a model has so many objects that looking through them all would hold up some step for 100 ms
    return Ready(engine, loaded, tokenizer, runner, limits, facts)


def make_runner(model: Model, scheme: Scheme | None, options: EngineConfig, limits: SchedulerConfig) -> Runner:
    """The runner with its KV cache, for these limits. On a GPU it decodes in buckets, unless enforce_eager."""
    is_gpu = model.device.type == "cuda"
    has_graphs = options.has_graphs(not is_gpu)
    more = min(MOST_TOKENS, limits.max_num_batched_tokens - limits.max_num_seqs)
    buckets = bucket_sizes(limits.max_num_seqs, more) if has_graphs else ()
    num_blocks = limits.num_blocks + bool(buckets)  # padding rows write to a block of their own
    room = recent_room(limits.max_num_seqs, limits.max_num_batched_tokens, options, not is_gpu)
    pool = KVPool(model.config, scheme, num_blocks, limits.block_size, model.dtype, model.device, room)
    sampler = Sampler(limits.max_num_seqs, limits.vocab_size, model.device, options.seed, options.kernels)
    depth = 2 if is_gpu and options.async_scheduling else 1  # a CPU has nothing to overlap with
    max_blocks = -(-limits.max_sequence_tokens // limits.block_size)
    split = options.attention_split_tokens
    pieces = tuple(size for size in SIZES if size <= limits.max_num_batched_tokens) if has_graphs else ()
    return Runner(model, pool, sampler, limits.max_num_seqs, depth, options.kernels, buckets, max_blocks, split, pieces)


def cache_scheme(scheme: Scheme | None, kv_cache_dtype: str, kv_recent: int | None = None) -> Scheme | None:
    """The scheme that the cache follows: the model's, unless another format or recent window was asked for.

    Raises ValueError for a window that does not go with the cache.
    """
    if kv_cache_dtype != "auto":
        base = get_scheme("bf16") if scheme is None else scheme
        scheme = base.with_kv(KV_SUFFIXES[kv_cache_dtype])
    if kv_recent is None or (scheme is None and not kv_recent):
        return scheme
    return replace(get_scheme("bf16") if scheme is None else scheme, kv_recent=kv_recent)


def refuse_mixed_results(scheme: Scheme | None, options: EngineConfig) -> None:
    """Raise UnsupportedError where results are to depend on nothing else, and blocks of others would be read.

    Behind blocks that another sequence computed, the first tokens find what is before them rounded, not exactly.
    """
    is_shared = options.enable_prefix_caching and scheme is not None and scheme.kv_recent
    if options.attention_split_tokens is not None and is_shared:
        raise UnsupportedError(
            "attention_split_tokens came with enable_prefix_caching and a recent window (kv_recent): results would "
            "depend on what is cached; they need every token computed anew; pass enable_prefix_caching=False "
            "(--no-enable-prefix-caching), or leave attention_split_tokens out."
        )


def kernels_of(model: Model, runner: Runner) -> dict[str, str]:
    """Implementation by op, as they were chosen."""
    found = {module.op: module.implementation for module in model.modules() if isinstance(module, Quantized)}
    found.update({choice.op: choice.name for choice in runner.kv.choices})
    return found


def _tokenizer(model: str, options: EngineConfig) -> Any:
    if options.load_format == "dummy":
        return None if options.tokenizer is None else load_tokenizer(options.tokenizer)
    return load_tokenizer(options.tokenizer or model)


def _load(model: str, options: EngineConfig, device: torch.device, dtype: torch.dtype) -> Model:
    if options.load_format == "dummy":
        scheme = None if options.scheme is None else get_scheme(options.scheme)
        source = dummy_source(model, scheme, device=device)
    else:
        source = open_source(model, options.revision)
    return load_source(source, device, dtype, options.kernels, options.head)


def _plan(model: Model, scheme: Scheme | None, options: EngineConfig) -> tuple[CachePlan, Reserve | None]:
    reserve = None
    available = options.cache_bytes
    if available is None and model.device.type == "cpu":
        available = CPU_CACHE_BYTES
    if model.device.type == "cuda":
        reserve = measure_reserve(model, scheme, options)  # warms up prefill, also where the size is known
        if available is None:
            available = gpu_cache_bytes(model.device, options.gpu_memory_utilization, reserve)
        if not options.enforce_eager:  # the block for padding rows
            available -= bytes_per_block(model.config, scheme, model.dtype, options.block_size)
    assert available is not None
    is_cpu = model.device.type == "cpu"
    return plan_cache(model.config, scheme, model.dtype, options, max(0, available), is_cpu), reserve
