"""The two parts of a step with prompts hold what the whole held, each in its own counting."""

import numpy as np

from atom.serving.batch import Batch, Step
from atom.serving.config import SchedulerConfig
from atom.serving.request import Request
from atom.serving.result import StepResult
from atom.serving.sampling_params import SamplingParams
from atom.serving.scheduler import Scheduler
from atom.serving.split import MOST_TOKENS, is_split, split_decodes

from .fake_runner import check_shapes


def mixed_step(prompt: int = 9) -> Step:
    """Two decode, one of them from a token that is still being sampled; two prompts follow, the second in part."""
    scheduler = Scheduler(SchedulerConfig(2048, 4096, 2048, 2, 8, 2 * prompt + 4))
    params = SamplingParams(max_tokens=8)
    scheduler.add(Request("a", (1, 2, 3), params))
    first = scheduler.schedule()
    assert first is not None and not is_split(first.batch)
    scheduler.update(first, StepResult([50]))
    scheduler.add(Request("b", (4, 5), params))
    second = scheduler.schedule()
    assert second is not None and is_split(second.batch)
    for name in "cd":
        scheduler.add(Request(name, tuple(range(prompt + 3)), params))
    third = scheduler.schedule()
    assert third is not None
    return third


def test_parts_are_the_whole() -> None:
    batch = mixed_step().batch
    assert batch.num_decodes == 2 and batch.num_seqs == 4 and len(batch.sample_rows) == 3 and is_split(batch)
    decodes, rest = split_decodes(batch)
    for part in (decodes, rest):
        check_shapes(part)
    assert decodes.num_decodes == decodes.num_tokens == 2 and rest.num_decodes == 0
    for name in (
        "token_ids",
        "positions",
        "slots",
        "seqlens_k",
        "lanes",
        "sample_lanes",
        "masks_stop",
        "pending_lanes",
    ):
        joined = np.concatenate([getattr(decodes, name), getattr(rest, name)])
        assert joined.tolist() == getattr(batch, name).tolist() and joined.dtype == getattr(batch, name).dtype
    assert decodes.pending.tolist() == [0, 1] and rest.pending.tolist() == []
    assert rest.cu_seqlens_q.tolist() == [0, 12, 20] and rest.cu_seqlens_q.dtype == np.int32
    assert decodes.sample_rows.tolist() == [0, 1] and rest.sample_rows.tolist() == [11]
    assert (np.concatenate([decodes.block_tables, rest.block_tables]) == batch.block_tables).all()


def test_long_prompts_stay_with_the_decodes() -> None:
    def of(tokens: int) -> Batch:
        return mixed_step(tokens // 2).batch

    assert is_split(of(MOST_TOKENS - 10)) and not is_split(of(MOST_TOKENS + 10))
