"""The split of a decode step's attention: every block exactly once, evenly, and soon enough."""

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atom.kernels.attention_plan import (
    AttentionPlan,
    block_ranges,
    most_segments,
    plan_balanced,
    plan_fixed,
)

SEGMENT_OVERHEAD = 12
LENGTHS = st.lists(st.integers(0, 5000), min_size=1, max_size=40)


def check(plan: AttentionPlan, lengths: list[int], heads: int, block_size: int, window: int | None, ctas: int) -> None:
    """Every block that a query sees is read once by one CTA; partial results lie in order."""
    assert plan.work[0] == 0 and plan.work[-1] == len(plan.segments) and (np.diff(plan.work) >= 0).all()
    assert len(plan.work) == ctas + 1
    firsts, ends = block_ranges(np.array(lengths), block_size, window)
    seen: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for index, (sequence, head, begin, end, first, parts, *rest) in enumerate(plan.segments.tolist()):
        assert begin < end and (index == first + parts - 1) == (end == ends[sequence]) and rest == [0, 0]
        row = seen.setdefault((sequence, head), [])
        assert index == first + len(row) and (plan.segments[first : first + parts, :2] == (sequence, head)).all()
        row.append((begin, end))
    for sequence, length in enumerate(lengths):
        for head in range(heads):
            row = seen.pop((sequence, head), [])
            if length == 0:
                assert not row
                continue
            assert row[0][0] == firsts[sequence] and row[-1][1] == ends[sequence]
            assert all(a[1] == b[0] for a, b in pairwise(row)), "a gap or an overlap"
    assert not seen


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.sampled_from([1, 2, 8]), st.sampled_from([16, 32, 64]), st.sampled_from([None, 1, 100, 1024]),
       st.integers(1, 500), st.sampled_from([1, 2]))  # fmt: skip
def test_every_block_once(
    lengths: list[int], heads: int, block_size: int, window: int | None, ctas: int, grain: int
) -> None:
    plan = plan_balanced(np.array(lengths), block_size, heads, ctas, window, grain, 3, 4)
    check(plan, lengths, heads, block_size, window, ctas)
    assert len(plan.segments) <= most_segments(len(lengths), heads, ctas)
    assert ((plan.segments[:, 2] - block_ranges(np.array(lengths), block_size, window)[0][plan.segments[:, 0]]) % grain
            == 0).all()  # fmt: skip
    check(plan_fixed(np.array(lengths), block_size, heads, ctas, 32, window), lengths, heads, block_size, window, ctas)


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(0, 39), st.sampled_from([None, 700]))
def test_fixed_splits_depend_on_the_own_length_alone(lengths: list[int], index: int, window: int | None) -> None:
    index %= len(lengths)
    together = plan_fixed(np.array(lengths), 16, 2, 396, 32, window)
    alone = plan_fixed(np.array(lengths[index : index + 1]), 16, 2, 7, 32, window)
    mine = together.segments[together.segments[:, 0] == index]
    assert np.array_equal(mine[:, 1:4], alone.segments[:, 1:4])


def shares(plan: AttentionPlan) -> np.ndarray:
    """Blocks of each CTA, what segments cost on top included."""
    blocks = plan.segments[:, 3] - plan.segments[:, 2] + SEGMENT_OVERHEAD
    return np.add.reduceat(np.append(blocks, 0), np.minimum(plan.work[:-1], len(blocks))) * (np.diff(plan.work) > 0)


@pytest.mark.parametrize(
    "lengths",
    [[1024] * 64, [4096] * 64, [1024] * 256, [32768] * 8, [8192], [131072] + [1] * 100, None],
    ids=["64x1024", "64x4096", "256x1024", "8x32768", "1x8192", "one of 128k", "lognormal"],
)
def test_balance(lengths: list[int] | None) -> None:
    """No CTA has more than the mean and one segment's overhead on either side."""
    if lengths is None:
        draws = np.random.default_rng(0).lognormal(0, 1, 128)
        lengths = np.clip(draws / draws.mean() * 1500, 1, 32768).astype(int).tolist()
    plan = plan_balanced(np.array(lengths), 16, 8, 396, grain=2, overhead=SEGMENT_OVERHEAD, least=4)
    load = shares(plan)
    mean = load.sum() / 396
    assert load.max() <= mean + 2 * SEGMENT_OVERHEAD + 2
    assert load.max() <= mean * 1.25 + 2


@pytest.mark.parametrize("spread,is_whole", [(0, True), (30, True), (200, False)])
def test_rows_of_one_length_are_dealt_whole(spread: int, is_whole: bool) -> None:
    """Where that gives nearly all CTAs as much to do; unused lanes have no rows."""
    lengths = [1024 - spread, *([1024] * 62), 0, 1024]
    plan = plan_balanced(np.array(lengths), 16, 8, 264, grain=2)
    check(plan, lengths, 8, 16, None, 264)
    assert (len(plan.segments) == 512) == is_whole
    assert not is_whole or sorted(set(np.diff(plan.work))) == [0, 2]
    assert len(plan_balanced(np.array(lengths), 16, 8, 396, grain=2).segments) > 512


def test_nothing_to_do() -> None:
    for plan in (plan_balanced(np.zeros(3, dtype=np.int32), 16, 8, 10), plan_fixed(np.zeros(3, int), 16, 8, 10, 32)):
        assert not len(plan.segments) and not plan.work.any()


def test_short_work_leaves_ctas_idle() -> None:
    """No CTA is started for fewer blocks than a merge costs."""
    plan = plan_balanced(np.array([64]), 16, 1, 396, grain=2)
    assert len(plan.segments) == 1
    plan = plan_balanced(np.array([8192]), 16, 8, 396, grain=2, least=24)
    assert (np.diff(plan.work) > 0).sum() == 8 * 8192 // 16 // 24


@pytest.mark.slow
def test_planning_takes_less_than_a_tenth_of_a_millisecond() -> None:
    """Batch 256 with 8 KV heads; the fastest of many, since the machine may be busy."""
    lengths = np.random.default_rng(0).integers(1, 8000, 256).astype(np.int32)
    took = []
    for _ in range(200):
        start = time.perf_counter()
        plan_balanced(lengths, 16, 8, 396, grain=2)
        took.append(time.perf_counter() - start)
    assert min(took) < 250e-6, "the goal is 100 us; a slower or busy machine gets some room"
