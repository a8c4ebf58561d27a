"""Time of the engine's thread a decode step, by part, on any machine: all of it but the calls of a GPU.

    python -m benchmarks.bench_host                       the record engine-host
    python -m benchmarks.bench_host --profile --batches 256   where Python spends it

Kernels, graphs and copies are replaced by nothing; what leads up to them is not: attention's plan, the records that the
first kernel of a step reads, the sampler's plan. On a GPU the launches themselves come on top.
"""

import argparse
import cProfile
import json
import pstats
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from atom.kernels import begin
from atom.kernels.attention_sm90 import PagedAttentionSm90
from atom.kernels.kv_layout import KVLayout
from atom.kernels.paged_step import PagedStep, Share
from atom.models.dummy import dummy_source
from atom.models.loader import load_source
from atom.quant.presets import get_scheme
from atom.records import write_record
from atom.serving.config import SchedulerConfig
from atom.serving.decode_buckets import bucket_sizes
from atom.serving.decode_inputs import KernelInputs
from atom.serving.engine import Engine
from atom.serving.kv_pool import KVPool
from atom.serving.news import ended
from atom.serving.recent import RecentRoom
from atom.serving.request import Request
from atom.serving.runner import Runner
from atom.serving.sampler import Sampled, Sampler
from atom.serving.sampling_params import SamplingParams
from atom.serving.scheduler import Scheduler
from atom.serving.sequence import Output

from .bench_engine import BATCHES, CONTEXTS, STEPS, WARM, prompts
from .host_clock import Clock

VOCABULARY = 258  # of the model that is not computed
KV_HEADS, QUERIES_PER_KV, HEAD_DIM = 8, 4, 128  # of Llama-3-8B, for attention's plan


class PlanOnly:
    """Attention that plans for 132 multiprocessors and attends to nothing."""

    def __init__(self) -> None:
        layout = KVLayout(get_scheme("w4a8").kv, torch.bfloat16, KV_HEADS, HEAD_DIM, 16)
        self._attend = PagedAttentionSm90(layout)
        self._attend.prefill.load = lambda: None  # type: ignore[method-assign]

    def prepare(self, step: PagedStep, windows: Any, queries: int, share: Share = "auto") -> bool:
        return self._attend.prepare(step, (None,), QUERIES_PER_KV, share)


def hollow_runner(batch: int, tokens: int, pool_blocks: int, recent: int) -> Runner:
    """A runner that computes nothing and does everything before and after on the host, as on a GPU."""
    model = load_source(dummy_source("tiny"))
    sampler = Sampler(batch, VOCABULARY, "cpu", seed=0)
    scheme = get_scheme(f"bf16+kv4r{recent}") if recent else None
    pool = KVPool(model.config, scheme, pool_blocks + 1, 16, room=RecentRoom(batch, 1))
    max_blocks = -(-tokens // 16)
    runner = Runner(model, pool, sampler, batch, 2, buckets=bucket_sizes(batch), max_blocks=max_blocks)
    buckets = runner.buckets
    assert buckets is not None
    hidden = torch.zeros(8192, 1)
    logits = torch.zeros(8192, VOCABULARY)
    found = torch.zeros(batch, dtype=torch.int64)
    model.forward = lambda t, p, kv: hidden[: len(t)]  # type: ignore[method-assign]
    model.logits = lambda h: logits[: len(h)]  # type: ignore[method-assign]
    runner.kv._ops[0].attend = PlanOnly()
    buckets._inputs = KernelInputs(model, sampler.last_tokens, batch, max_blocks, 16, 2, pool.recent)
    buckets._compute = lambda size: None  # type: ignore[method-assign]
    sampler.run = (  # type: ignore[method-assign]
        lambda raw, plan, lanes: Sampled(found[: len(raw)], found[: len(raw)], None, plan.num_logprobs)
    )
    return runner


def measure(
    batch: int, context: int, top_p: float, profiler: cProfile.Profile | None = None, recent: int = 0
) -> dict[str, Any]:
    """Median microseconds of each part of a step; `profiler` watches the last steps instead."""
    # the first prompts decode while the last are computed
    answer = -(-batch * context // (8192 - batch)) + WARM + STEPS
    tokens = context + answer + 8
    limits = SchedulerConfig(VOCABULARY, tokens, batch * -(-tokens // 16) + 8, max_num_seqs=batch)
    scheduler = Scheduler(limits)
    with patch.object(begin, "begin_kernel", lambda: lambda *args: None):
        runner = hollow_runner(batch, tokens, limits.num_blocks, recent)
        engine = Engine(runner, scheduler, None)
        clock = Clock(engine, batch)
        if profiler is not None:
            _watch_last(engine, profiler)
        run(engine, prompts(batch, context, VOCABULARY, 0), answer, top_p)
    sampling = "greedy" if top_p == 1.0 else "top_p"
    window = {"kv_recent": recent} if recent else {}
    return {"batch": batch, "context": context, "sampling": sampling, **window, **clock.medians(STEPS)}


def run(engine: Engine, asked: list[tuple[int, ...]], answer: int, top_p: float) -> None:
    """Decode `answer` tokens after each prompt."""
    done, open_ = threading.Event(), len(asked)

    def listen(outputs: Sequence[Output]) -> None:
        nonlocal open_
        open_ -= len(ended(outputs))
        if not open_:
            done.set()

    engine.start(listen)
    temperature = 0.0 if top_p == 1.0 else 0.8
    params = SamplingParams(max_tokens=answer, ignore_eos=True, temperature=temperature, top_p=top_p)
    with engine._changed:  # nobody begins before all are there
        for index, prompt in enumerate(asked):
            engine.submit(Request(f"{index}", prompt, params))
    assert done.wait(300), engine.error
    engine.shutdown()


def _watch_last(engine: Engine, profiler: cProfile.Profile) -> None:
    """Have the profiler watch the turns in which everybody decodes."""
    turn: Callable[[], None] = engine._turn

    def watched() -> None:
        steps = engine._steps
        if steps and steps[-1][0].batch.num_decodes == engine.config.max_num_seqs:
            profiler.runcall(turn)
        else:
            turn()

    engine._turn = watched  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)))
    parser.add_argument("--kv-recent", type=int, default=0, help="tokens of a recent window")
    parser.add_argument("--profile", action="store_true", help="list functions instead, by their own time")
    parser.add_argument("-o", "--out", type=Path, help="write rows there instead of a record")
    args = parser.parse_args()
    batches, contexts = (tuple(int(part) for part in text.split(",")) for text in (args.batches, args.contexts))
    if args.profile:
        profiler = cProfile.Profile()
        measure(batches[0], contexts[0], 1.0, profiler, args.kv_recent)
        pstats.Stats(profiler).sort_stats("tottime").print_stats(30)
        return
    rows = [
        measure(batch, context, top_p, recent=args.kv_recent)
        for top_p in (1.0, 0.9)
        for context in contexts
        for batch in batches
    ]
    for row in rows:
        print(row)
    if args.out is not None:
        args.out.write_text(json.dumps(rows))
    else:
        print(write_record("engine-host", rows, "cpu", command="python -m benchmarks.bench_host"))


if __name__ == "__main__":
    main()
