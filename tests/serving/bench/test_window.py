"""A run that begins in the middle is drawn as a steady state holds it, and cut where it is measured."""

import numpy as np
import pytest

from atom.serving.bench.sample import Sample
from atom.serving.bench.window import StepTime, full_window, mid_life, within
from atom.serving.bench.workload import Segment, WorkItem


def test_requests_under_way_are_the_longer_ones_at_any_age() -> None:
    """Outputs of 10 and 30: a quarter and three quarters of what is under way, half done on average."""
    items = [WorkItem((Segment("a", 5),), 10), WorkItem((Segment("b", 7),), 30)]
    found = mid_life(items, 20_000, seed=1)
    short, long = ([i for i in found if i.total_tokens == total] for total in (15, 37))
    assert len(short) + len(long) == 20_000 and len(long) / 20_000 == pytest.approx(0.75, abs=0.02)
    assert np.mean([i.output_tokens for i in long]) == pytest.approx(15.5, abs=0.3)
    assert {i.output_tokens for i in short} == set(range(1, 11)) and min(i.prompt_tokens for i in short) == 5
    assert len({i.segments[0].key for i in found}) == 20_000, "none is the other's prefix"
    assert mid_life(items, 5, seed=1) == mid_life(items, 5, seed=1) != mid_life(items, 5, seed=2)


def test_the_window_is_where_the_batch_is_full() -> None:
    steps = [StepTime(0.1 * i, n, n) for i, n in enumerate([1, 5, 9, 10, 10, 9, 2], 1)]
    assert full_window(steps) == (pytest.approx(0.3), pytest.approx(0.6))
    assert full_window(steps[:1]) is None and full_window([]) is None


def test_samples_are_cut_to_it() -> None:
    begun = Sample(0, 4, 5, due_s=0.0, token_s=[0.5, 1.5, 2.5, 3.5], end_s=3.5, output_tokens=4)
    fresh = Sample(1, 4, 5, due_s=1.2, token_s=[2.0, 3.0], end_s=3.0, output_tokens=2)
    over = Sample(2, 4, 5, due_s=0.0, token_s=[0.5], end_s=0.5, output_tokens=1)
    found = within([begun, fresh, over], 1.0, 3.0)
    assert [s.index for s in found] == [0, 1]
    assert found[0].token_s == [1.5, 2.5] and found[0].tokens == 2 and found[0].ttft_s is None
    assert found[0].tpot_s == pytest.approx(1.0) and found[0].due_s == 1.0 and found[0].end_s == 3.0
    assert found[1].ttft_s == pytest.approx(0.8) and found[1].tokens == 2
