"""A step as rows says of every token what the step said; only short prompts are taken so."""

from dataclasses import replace

import numpy as np
import pytest

from atom.serving.config import SchedulerConfig
from atom.serving.request import Request
from atom.serving.result import StepResult
from atom.serving.rows import MOST_BYTES, as_rows, fits_rows
from atom.serving.sampling_params import SamplingParams
from atom.serving.scheduler import Scheduler
from atom.serving.step_inputs import is_decode, pad_decodes

from .fake_runner import check_shapes
from .test_split import mixed_step


def test_every_token_is_a_sequence_that_ends_with_it() -> None:
    batch = mixed_step().batch  # two decodes, a prompt of 12, 8 tokens of another
    rows = as_rows(batch)
    check_shapes(replace(rows, lanes=np.arange(22, dtype=np.int32)))
    assert rows.num_tokens == rows.num_seqs == rows.num_decodes == batch.num_tokens == 22
    assert rows.sample_rows.tolist() == [0, 1, 2] and rows.sample_lanes is batch.sample_lanes
    assert rows.pending.tolist() == [0, 1] and rows.cu_seqlens_q.tolist() == list(range(23))
    order = [0, 1, 13, *range(2, 13), *range(14, 22)]  # the first prompt's last token is sampled from
    owners = [0, 1, 2, *[2] * 11, *[3] * 8]
    for name in ("token_ids", "positions", "slots"):
        assert getattr(rows, name).tolist() == getattr(batch, name)[order].tolist()
        assert getattr(rows, name).dtype == getattr(batch, name).dtype
    assert rows.seqlens_k.tolist() == (batch.positions[order] + 1).tolist()
    assert rows.lanes.tolist() == batch.lanes[owners].tolist()
    assert (rows.block_tables == batch.block_tables[owners]).all()
    assert rows.ahead is not None and rows.ahead.tolist() == [0, 0, 11, *range(11), *range(8)]
    padded = pad_decodes(rows, 24, scratch_block=7, block_size=2)
    check_shapes(replace(padded, lanes=np.arange(24, dtype=np.int32)))
    assert padded.ahead is not None and padded.ahead[-3:].tolist() == [7, 0, 0]


def test_drafts_are_rows_that_are_all_sampled_from() -> None:
    scheduler = Scheduler(SchedulerConfig(100, 64, 32, 4, 4, 64, num_speculative_tokens=2))
    scheduler.add(Request("a", (1, 2, 3, 1, 2), SamplingParams(max_tokens=8, temperature=0.0)))
    first = scheduler.schedule()
    assert first is not None
    scheduler.update(first, StepResult([3]))
    scheduler.add(Request("b", (7, 8), SamplingParams(max_tokens=8)))
    step = scheduler.schedule()
    assert step is not None and step.entries[0].drafts == (1, 2)
    rows = as_rows(step.batch)
    assert not is_decode(step.batch) and rows.sample_rows.tolist() == [0, 1, 2, 3]
    assert rows.token_ids.tolist() == [3, 1, 2, 8, 7] and rows.seqlens_k.tolist() == [6, 7, 8, 2, 1]
    assert rows.ahead is not None and rows.ahead.tolist() == [0, 1, 2, 1, 0]


@pytest.mark.parametrize(
    ("prompt", "most_rows", "most_samples", "token_bytes", "fits"),
    [
        (9, 22, 3, 1.0, True),
        (9, 21, 3, 1.0, False),
        (9, 22, 2, 1.0, False),
        (9, 22, 3, MOST_BYTES / 114, True),  # 1 + 2 + ... + 12 and 1 + 2 + ... + 8 keys are read
        (9, 22, 3, MOST_BYTES / 113, False),
    ],
)
def test_what_fits(prompt: int, most_rows: int, most_samples: int, token_bytes: float, fits: bool) -> None:
    assert fits_rows(mixed_step(prompt).batch, most_rows, most_samples, token_bytes) == fits
