"""Steps without the engine's thread, so that every run has the same batches: what runners are compared by."""

import random
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from atom.models.loader import load_model
from atom.quant.presets import KV8, get_scheme
from atom.quant.schemes import CacheOverride, Scheme
from atom.serving.config import SchedulerConfig
from atom.serving.kv_pool import KVPool
from atom.serving.recent import RecentRoom
from atom.serving.request import Request
from atom.serving.runner import Runner
from atom.serving.sampler import Sampler
from atom.serving.sampling_params import SamplingParams
from atom.serving.scheduler import Scheduler

DRAW = random.Random(11)
PROMPTS = [[DRAW.randrange(256) for _ in range(length)] for length in (1, 3, 4, 5, 40, 21, 22, 9, 2)]
MIXED = replace(get_scheme("bf16+kv4"), kv_overrides=(CacheOverride(1, KV8),))


def drive(
    folder: Path,
    device: str,
    buckets: tuple[int, ...],
    captures: bool = True,
    pieces: tuple[int, ...] = (),
    prompts: list[list[int]] = PROMPTS,
    num_blocks: int = 12,
    cache: Scheme | None = None,
) -> tuple[list[Any], Runner]:
    """Steps two deep, without the engine's thread: every run has the same batches. Tokens by sequence."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = load_model(folder, device=device, dtype=dtype)
    limits = SchedulerConfig(model.config.vocab_size, 128, num_blocks, 16, 8, 24)
    room = RecentRoom(limits.max_num_seqs, max(limits.max_num_batched_tokens, *pieces, 0), row_tokens=24)
    pool = KVPool(model.config, cache or model.scheme, limits.num_blocks + 1, limits.block_size, dtype, device, room)
    sampler = Sampler(limits.max_num_seqs, limits.vocab_size, device, seed=3)
    runner = Runner(model, pool, sampler, limits.max_num_seqs, 2, buckets=buckets, max_blocks=8, piece_sizes=pieces)
    if not captures:
        assert runner.buckets is not None
        replay = runner.buckets._compute
        runner.buckets._capture = lambda size: lambda: replay(size)  # type: ignore[method-assign]
        if runner._pieces is not None:
            runner._pieces.warm_up = lambda: None  # type: ignore[method-assign]
    runner.warm_up()
    scheduler, under_way = Scheduler(limits), deque[Any]()
    tokens: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        params = SamplingParams(
            max_tokens=4 + 3 * index, temperature=index % 2, seed=index, ignore_eos=True, logprobs=1
        )
        scheduler.add(Request(f"{index}", tuple(prompt), params))
    while scheduler.has_unfinished:
        step = scheduler.schedule()
        if step is not None:
            under_way.append((step, runner.launch(step)))
        if step is None or len(under_way) == 2:
            step, launched = under_way.popleft()
            for output in scheduler.update(step, launched.result()):
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return [tokens[f"{index}"] for index in range(len(prompts))], runner
