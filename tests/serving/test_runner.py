"""The runner: steps that run ahead of their tokens, decode buckets, one upload a step."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atom.kernels import begin
from atom.kernels.paged_attention import PagedAttentionReference
from atom.kernels.paged_step import PagedStep
from atom.models.loader import load_model, load_tokenizer
from atom.quant.presets import KV8, get_scheme
from atom.quant.schemes import Scheme
from atom.serving import decode_buckets
from atom.serving.batch import Batch
from atom.serving.config import SchedulerConfig
from atom.serving.decode_buckets import bucket_sizes
from atom.serving.decode_inputs import KernelInputs
from atom.serving.engine import Engine
from atom.serving.engine_config import EngineConfig
from atom.serving.kv_pool import KVPool
from atom.serving.llm import LLM
from atom.serving.profile_run import run_largest_step
from atom.serving.request import Request
from atom.serving.runner import Runner
from atom.serving.sampler import Sampler
from atom.serving.sampling_params import SamplingParams
from atom.serving.scheduler import Scheduler
from atom.serving.startup import Ready, kernels_of
from atom.serving.step_inputs import Staging, is_decode, pack, pad_decodes, step_inputs, unpack_one

from .begin_model import BeginModel
from .driven_steps import MIXED, PROMPTS, drive

Tiny = Callable[[str], Path]

EXACT = replace(get_scheme("bf16+kv4"), kv_offset="none", kv_recent=16)


def engine_on(folder: Path, depth: int, buckets: tuple[int, ...], pieces: tuple[int, ...] = ()) -> LLM:
    model = load_model(folder)
    limits = SchedulerConfig(model.config.vocab_size, 128, 26, 4, 8, 24, patience_steps=8, growth_blocks=0)
    pool = KVPool(model.config, model.scheme, limits.num_blocks + 1, limits.block_size)
    sampler = Sampler(limits.max_num_seqs, limits.vocab_size, "cpu", seed=3)
    runner = Runner(
        model, pool, sampler, limits.max_num_seqs, depth, buckets=buckets, max_blocks=32, piece_sizes=pieces
    )
    progress: list[tuple[int, int]] = []
    runner.warm_up(lambda done, total: progress.append((done, total)))
    assert progress == [(i + 1, len(buckets)) for i in range(len(buckets))]
    return LLM.from_ready(Ready(Engine(runner, Scheduler(limits)), model, load_tokenizer(folder), runner, limits))


def run(llm: LLM, seeded: bool) -> list[Any]:
    """Greedy or seeded, some with logprobs and penalties, of lengths that leave the batch at different times."""
    params = [
        SamplingParams(
            max_tokens=4 + 3 * index,
            temperature=1.0 if seeded else 0.0,
            seed=index if seeded else None,
            min_tokens=3,
            ignore_eos=True,
            presence_penalty=0.5 * (index % 2),
            logprobs=1 if index % 3 == 0 else None,
            prompt_logprobs=0 if index == 4 else None,
        )
        for index in range(len(PROMPTS))
    ]
    found = llm.generate(PROMPTS, params)
    assert llm.engine.stats().used_blocks == 0
    assert [(c.prompt_logprobs is not None) for c in found] == [index == 4 for index in range(len(PROMPTS))]
    return [completion.token_ids for completion in found]


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize(("depth", "buckets"), [(1, (1, 2, 4, 8)), (2, ()), (2, (1, 2, 4, 8, 16, 24)), (3, (3,))])
def test_running_ahead_and_buckets_change_no_token(
    tiny: Tiny, depth: int, buckets: tuple[int, ...], seeded: bool
) -> None:
    with engine_on(tiny("llama"), 1, ()) as plain:
        wanted = run(plain, seeded)
    with engine_on(tiny("llama"), depth, buckets) as llm:
        replays: list[int] = []
        if llm.ready.runner.buckets is not None:
            compute = llm.ready.runner.buckets._compute
            llm.ready.runner.buckets._compute = lambda size: (replays.append(size), compute(size))[1]  # type: ignore[method-assign, func-returns-value]
        assert run(llm, seeded) == wanted
        assert llm.engine.stats().num_preemptions > 0  # 26 blocks of 4 are not enough for all
    assert set(replays) == set(buckets)  # decode steps went through every one of them


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_pieces_change_no_token(tiny: Tiny, family: str) -> None:
    """Steps with prompts, padded; in one go on a CPU, but through the same buffers."""
    with engine_on(tiny(family), 1, ()) as plain:
        wanted = run(plain, seeded=False)
    with engine_on(tiny(family), 2, (1, 2, 4, 8), (12, 20, 24)) as llm:
        pieces, seen = llm.ready.runner._pieces, set()
        assert pieces is not None
        size_for = pieces.size_for
        pieces.size_for = lambda count: (seen.add((count, size_for(count))), size_for(count))[1]  # type: ignore[method-assign, func-returns-value]
        assert run(llm, seeded=False) == wanted
    assert {size for _, size in seen} == {12, 20, 24} and any(count < size for count, size in seen)


def test_bucket_sizes() -> None:
    assert bucket_sizes(1) == (1,)
    assert bucket_sizes(5) == (1, 2, 4, 5)
    assert bucket_sizes(24) == (1, 2, 4, 8, 16, 24)
    assert bucket_sizes(300) == (1, 2, 4, *range(8, 257, 8), 288, 300)
    assert bucket_sizes(5, 70) == (1, 2, 4, 5, 32, 64)
    assert bucket_sizes(256, 64) == (1, 2, 4, *range(8, 257, 8), 288, 320)


def decode_batch() -> Batch:
    scheduler = Scheduler(SchedulerConfig(100, 64, 8, 4, 4, 16))
    for index in range(3):
        scheduler.add(Request(f"r{index}", (index + 1,) * 3))
    first = scheduler.schedule()
    step = scheduler.schedule()
    assert first is not None and step is not None
    assert not is_decode(first.batch) and is_decode(step.batch)
    return step.batch


def test_padding_rows_touch_the_scratch_block_alone() -> None:
    batch = decode_batch()
    padded = pad_decodes(batch, 5, scratch_block=9, block_size=4)
    assert padded.num_tokens == padded.num_seqs == padded.num_decodes == 5
    assert padded.slots.tolist()[3:] == [36, 36] and padded.block_tables[3:].tolist() == [[9], [9]]
    assert padded.seqlens_k.tolist() == [4, 4, 4, 1, 1] and padded.cu_seqlens_q.tolist() == list(range(6))
    assert padded.sample_rows is batch.sample_rows and padded.pending.tolist() == [0, 1, 2]
    for name in ("token_ids", "positions", "slots", "seqlens_k", "lanes"):
        old, new = getattr(batch, name), getattr(padded, name)
        assert new.dtype == old.dtype and new[:3].tolist() == old.tolist()
    assert pad_decodes(batch, 3, 9, 4) is batch


def test_input_tokens_come_from_the_lanes_where_they_are_pending() -> None:
    batch = decode_batch()
    inputs = step_inputs(batch, Staging(torch.device("cpu"), 1))
    last = torch.tensor([50, 60, 70, 80])
    assert inputs.tokens(last).tolist() == last[torch.from_numpy(batch.lanes).long()].tolist()
    assert inputs.positions.tolist() == [3, 3, 3]


def test_packed_arrays_come_out_as_they_went_in() -> None:
    arrays = [
        np.arange(5, dtype=np.int64),
        np.zeros(0, dtype=np.int32),
        np.arange(6, dtype=np.int32).reshape(3, 2).T,
        np.array([True, False, True]),
    ]
    packed, starts = pack(arrays, lambda size: torch.full((size,), 255, dtype=torch.uint8))
    assert all(start % 16 == 0 for start in starts) and len(packed) == 96
    for array, start in zip(arrays, starts, strict=True):
        found = unpack_one(packed, start, array)
        assert found.shape == array.shape and found.numpy().dtype == array.dtype
        assert (found.numpy() == array).all()
    assert len(pack([], lambda size: torch.empty(size, dtype=torch.uint8))[0]) == 16


def test_the_largest_step_runs(tiny: Tiny) -> None:
    """What the memory profile runs: as many tokens and samples as the limits allow."""
    model = load_model(tiny("llama"))
    seen: list[tuple[int, int]] = []
    forward, logits = model.forward, model.logits
    model.forward = lambda t, p, kv: (seen.append((len(t), 0)), forward(t, p, kv))[1]  # type: ignore[method-assign]
    model.logits = lambda h: (seen.append((0, len(h))), logits(h))[1]  # type: ignore[method-assign]
    run_largest_step(model, None, EngineConfig(max_num_seqs=7, max_num_batched_tokens=100, block_size=4))
    assert seen == [(100, 0), (0, 7)]


def test_facts_name_the_implementations(tiny: Tiny) -> None:
    with engine_on(tiny("llama"), 1, ()) as llm:
        found = kernels_of(llm.ready.model, llm.ready.runner)
    assert found == {"rope_append_kv": "reference", "paged_attention": "reference"}


def test_driven_steps_are_the_engines(tiny: Tiny) -> None:
    """The loop of the GPU's tests, on a CPU."""
    plain, _ = drive(tiny("llama"), "cpu", ())
    assert drive(tiny("llama"), "cpu", (1, 2, 4, 8))[0] == plain
    assert drive(tiny("llama"), "cpu", (1, 2, 4, 8, 16, 24))[0] == plain
    assert drive(tiny("llama"), "cpu", (1, 2, 4, 8), pieces=(12, 24))[0] == plain
    assert [len(tokens) for tokens in plain] == [4 + 3 * index for index in range(len(PROMPTS))]


@pytest.mark.parametrize("cache", [None, EXACT], ids=["rounded", "newest exact"])
def test_steps_that_begin_with_the_kernels_records_are_the_same(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, cache: Scheme | None
) -> None:
    """All of it but the kernel itself, which does on a GPU what stands in begin_model.py."""
    plain, _ = drive(tiny("llama"), "cpu", (), cache=cache)
    kernel = BeginModel()
    monkeypatch.setattr(begin, "begin_kernel", lambda: kernel)
    load = KernelInputs.load

    def watched(inputs: KernelInputs, padded: Batch, rings: Any = None) -> torch.Tensor:
        lanes, arrays = load(inputs, padded, rings), inputs.arrays(padded.num_seqs)
        assert arrays.lengths is not None and arrays.lengths.tolist() == padded.seqlens_k.tolist(), "warm-up included"
        return lanes

    monkeypatch.setattr(KernelInputs, "load", watched)

    def make(*options: Any) -> KernelInputs:
        return KernelInputs(*options[:6], options[7])

    monkeypatch.setattr(decode_buckets, "decode_inputs", make)
    for buckets in ((1, 2, 4, 8), (1, 2, 4, 8, 16, 24)):
        assert drive(tiny("llama"), "cpu", buckets, cache=cache)[0] == plain
    assert kernel.without > 10


def test_a_cache_of_two_formats_takes_the_same_steps(tiny: Tiny) -> None:
    plain, runner = drive(tiny("llama"), "cpu", (), cache=MIXED)
    assert drive(tiny("llama"), "cpu", (1, 2, 4, 8), pieces=(12, 24), cache=MIXED)[0] == plain
    assert len(runner.kv.choices) == 4 and len({layout.block_bytes for layout in runner.kv.pool.layouts}) == 2


def test_two_formats_read_beginnings_together_or_not_at_all(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = drive(tiny("llama"), "cpu", (), cache=MIXED)
    asked: list[str] = []

    def prepare(self: Any, step: PagedStep, windows: Any, queries: int, share: str = "auto") -> bool:
        asked.append(share)
        return share != "never" and self.layout.spec == KV8  # the other format would not

    monkeypatch.setattr(PagedAttentionReference, "prepare", prepare)
    found, runner = drive(tiny("llama"), "cpu", (1, 2, 4, 8), cache=MIXED)
    assert found == plain and "never" in asked
    assert runner.buckets is not None and not any(shares for _, shares in runner.buckets._replays)


def test_steps_that_share_prefixes_have_graphs_of_their_own(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """What attention says of a step decides which graph of its size runs, captured when the first such step comes."""
    plain, _ = drive(tiny("llama"), "cpu", ())
    said: list[bool] = []

    def prepare(self: Any, step: PagedStep, windows: Any, queries: int, share: str = "auto") -> bool:
        said.append(share == "always" or int((step.seqlens_k > 1).sum()) >= 4)
        return said[-1]

    monkeypatch.setattr(PagedAttentionReference, "prepare", prepare)
    found, runner = drive(tiny("llama"), "cpu", (1, 2, 4, 8))
    assert found == plain and any(said)
    assert runner.buckets is not None
    assert (
        {(size, False) for size in (1, 2, 4, 8)}
        < set(runner.buckets._replays)
        <= {(size, shares) for size in (1, 2, 4, 8) for shares in (False, True)}
    )
