"""The arrays of a step, written out by hand for three small steps."""

import pytest

from atom.serving.config import SchedulerConfig
from atom.serving.lane_tables import LaneTables
from atom.serving.request import Request
from atom.serving.result import StepResult
from atom.serving.sampling_params import SamplingParams
from atom.serving.scheduler import Scheduler

from .fake_runner import check_shapes


def scheduler(**limits: int) -> Scheduler:
    config = {"vocab_size": 100, "max_model_len": 32, "num_blocks": 8, "block_size": 2, "max_num_seqs": 2}
    return Scheduler(SchedulerConfig(**{**config, "max_num_batched_tokens": 4, **limits}))  # type: ignore[arg-type]


def test_chunked_prefill_beside_decode_with_a_token_not_known_yet() -> None:
    engine = scheduler()
    engine.add(Request("a", (11, 12, 13), SamplingParams(max_tokens=3, min_tokens=2)))
    engine.add(Request("b", (21, 22, 23, 24, 25), SamplingParams(max_tokens=1)))

    first = engine.schedule()  # all of a, and a first chunk of one token of b
    assert first is not None
    batch = first.batch
    check_shapes(batch)
    assert [s.request.request_id for s in first.admitted] == ["a", "b"]
    assert batch.token_ids.tolist() == [11, 12, 13, 21] and batch.positions.tolist() == [0, 1, 2, 0]
    assert batch.cu_seqlens_q.tolist() == [0, 3, 4] and batch.seqlens_k.tolist() == [3, 1]
    assert batch.lanes.tolist() == [0, 1] and batch.num_decodes == 0
    assert batch.block_tables.tolist() == [[0, 1], [2, 3]]  # 3 is for b's later chunks
    assert batch.slots.tolist() == [0, 1, 2, 4]
    assert batch.sample_rows.tolist() == [2] and batch.sample_lanes.tolist() == [0]
    assert batch.masks_stop.tolist() == [True]  # min_tokens: neither the first token may end it ...
    assert (batch.max_seqlen_q, batch.max_seqlen_k) == (3, 3)

    second = engine.schedule()  # a's token is still being sampled
    assert second is not None and second.admitted == ()
    batch = second.batch
    check_shapes(batch)
    assert batch.token_ids.tolist() == [0, 22, 23, 24] and batch.positions.tolist() == [3, 1, 2, 3]
    assert batch.pending.tolist() == [0] and batch.pending_lanes.tolist() == [0]
    assert batch.num_decodes == 1 and batch.sample_rows.tolist() == [0]
    assert batch.block_tables.tolist() == [[0, 1], [2, 3]]
    assert batch.slots.tolist() == [3, 5, 6, 7]
    assert batch.masks_stop.tolist() == [False]  # ... but the second may

    assert [o.token_ids for o in engine.update(first, StepResult([77]))] == [(77,)]
    assert [o.token_ids for o in engine.update(second, StepResult([78]))] == [(78,)]
    third = engine.schedule()  # known now
    assert third is not None
    batch = third.batch
    assert batch.token_ids.tolist() == [78, 25] and len(batch.pending) == 0
    assert batch.positions.tolist() == [4, 4] and batch.sample_rows.tolist() == [0, 1]
    assert batch.block_tables.tolist() == [[0, 1, 5], [2, 3, 4]]  # b's blocks were its own from its admission
    assert engine.schedule() is None  # both have sampled all they may
    assert [o.finish_reason for o in engine.update(third, StepResult([1, 2]))] == ["length", "length"]
    engine.check()
    assert not engine.has_unfinished and engine.blocks.num_used == 0


def test_rows_of_a_batch_do_not_change_with_the_next_step() -> None:
    engine = scheduler()
    engine.add(Request("a", (11, 12), SamplingParams(max_tokens=4)))
    first = engine.schedule()
    assert first is not None
    before = first.batch.block_tables.copy()
    assert engine.schedule() is not None  # a's second block
    assert (first.batch.block_tables == before).all() and before.shape == (1, 1)


def test_a_lane_is_given_back_once() -> None:
    lanes = LaneTables(2, 1, 1)
    lane = lanes.take()
    lanes.give_back(lane)
    assert lanes.num_free == 2
    with pytest.raises(AssertionError, match="free already"):
        lanes.give_back(lane)
