"""Shared rows of a decode step against the tables they come from, and their partial results' slots."""

import time

import numpy as np
import pytest
import torch

from atom.kernels.attention_plan import plan_balanced
from atom.kernels.cascade_plan import (
    LEAST_MEMBERS,
    Cascade,
    Costs,
    most_prefix_segments,
    most_rows,
    plan_cascade,
    plan_prefix,
)
from atom.kernels.cascade_sm90 import SharedPrefixes
from atom.kernels.kv_layout import KVLayout
from atom.quant.presets import KV4


def check_cascade(cascade: Cascade, tables: np.ndarray, lengths: np.ndarray, block_size: int, most: int) -> None:
    """Every promise of Cascade."""
    seen = np.zeros(len(lengths), dtype=int)
    for row, (members, blocks) in enumerate(zip(cascade.members, cascade.blocks, strict=True)):
        assert blocks > 0 and len(members) == most
        first = members[0]
        for sequence in members:
            assert np.array_equal(tables[sequence, :blocks], tables[first, :blocks])
            assert cascade.skipped[sequence] == blocks and blocks * block_size < lengths[sequence]
        own = [m for i, m in enumerate(members) if i == 0 or m != first]
        assert len(set(own)) == len(own)
        assert (cascade.rows[own] == row).all() and cascade.places[own].tolist() == list(range(len(own)))
        seen[own] += 1
    assert np.array_equal(seen, (cascade.skipped > 0).astype(int)), "each shares in one row"
    assert len(cascade.members) <= most_rows(len(lengths), most)


def check_plans(cascade: Cascade, lengths: np.ndarray, block_size: int, heads: int, ctas: int) -> None:
    """Every block of every sequence is read for it once, and all that is left of it is merged."""
    base, most = 5000, cascade.members.shape[1]
    prefix = plan_prefix(cascade, heads, ctas, 2, 3, 4, base)
    plan = plan_balanced(lengths, block_size, heads, ctas, None, 2, 3, 4, cascade.skipped, prefix.shared)
    assert len(prefix.segments) <= most_prefix_segments(len(lengths), most, heads, ctas)
    assert prefix.work[-1] == len(prefix.segments)
    written: dict[tuple[int, int, int], int] = {}  # sequence, head, slot: blocks
    covered = np.zeros((len(cascade.members), heads), dtype=int)
    for leader, head, begin, end, slot, row, _, parts in prefix.segments.tolist():
        assert leader == cascade.members[row, 0] and covered[row, head] == begin
        covered[row, head] = end
        for place, sequence in enumerate(cascade.members[row].tolist()):
            at = slot + place * parts
            assert base <= at < base + most * most_prefix_segments(len(lengths), most, heads, ctas)
            if place == 0 or sequence != leader:
                assert (sequence, head, at) not in written
                written[sequence, head, at] = end - begin
    assert (covered == cascade.blocks[:, None]).all()
    taken = {slot for _, _, slot in written}
    assert len(taken) == len(written), "a slot of one's own for each"
    own = np.zeros((len(lengths), heads), dtype=int)
    shared = np.zeros((len(lengths), heads, 2), dtype=int)
    for sequence, head, begin, end, _, both, first, _ in plan.segments.tolist():
        own[sequence, head] += end - begin
        shared[sequence, head] = first, both >> 16
    for sequence in np.flatnonzero(lengths).tolist():
        for head in range(heads):
            first, count = shared[sequence, head].tolist()
            assert (count > 0) == (cascade.skipped[sequence] > 0)
            before = sum(written.pop((sequence, head, first + i)) for i in range(count))
            assert before + own[sequence, head] == -(-lengths[sequence] // block_size)
    assert not written


def test_two_groups_and_others() -> None:
    tables = np.array([[7, 8, 9, 1], [3, 4, 0, 0], [7, 8, 9, 2], [3, 4, 5, 0], [7, 8, 6, 0], [10, 0, 0, 0]] * 3)
    tables[6:, 3] += 20
    lengths = np.array([60, 32, 64, 40, 40, 9] * 3)
    cascade = plan_cascade(tables, lengths - 1, 16, 4, Costs(2.0))
    assert cascade is not None
    assert cascade.members.tolist() == [[1, 3, 7, 1], [9, 13, 15, 9], [0, 2, 4, 0], [6, 8, 10, 6], [12, 14, 16, 12]]
    assert cascade.blocks.tolist() == [1, 1, 2, 2, 2]
    assert cascade.saved == 6 - 2 * 2.0 + 2 * (9 - 3 * 2.0)
    check_cascade(cascade, tables, lengths, 16, 4)
    check_plans(cascade, lengths, 16, 2, 7)


def test_what_does_not_pay_is_left() -> None:
    tables, lengths = np.array([[1, 2, 3], [1, 2, 4], [1, 2, 5], [1, 2, 6]]), np.array([48] * 4)
    assert plan_cascade(tables, lengths - 1, 16, 4, Costs(1.0, 0.0, 6.0)) is None
    assert plan_cascade(tables, lengths - 1, 16, 4, Costs(1.0, 0.0, 5.9)) is not None
    assert plan_cascade(tables, lengths - 1, 16, 4, Costs(1.0, 0.1, 5.6)) is None, "four partial results"
    assert plan_cascade(tables, lengths - 1, 16, 4, Costs(4.0)) is None, "a shared row takes as long as its members"
    assert plan_cascade(tables, lengths - 1, 16, 1, Costs(1.0)) is None
    assert plan_cascade(tables[: LEAST_MEMBERS - 1], lengths[: LEAST_MEMBERS - 1] - 1, 16, 4, Costs(1.0)) is None
    assert plan_cascade(tables, np.array([47, 47, 47, -1]), 16, 4, Costs(1.0)) is None
    assert plan_cascade(tables, np.array([15] * 4), 16, 4, Costs(1.0)) is None, "the last token is a sequence's own"
    assert plan_cascade(np.zeros((0, 3), dtype=int), np.zeros(0, dtype=int), 16, 4, Costs(1.0)) is None


@pytest.mark.parametrize("most", [4, 16, 64])
def test_random_trees(most: int) -> None:
    generator = np.random.default_rng(most)
    found = 0
    for _ in range(150):
        count, width, block_size = int(generator.integers(1, 40)), int(generator.integers(1, 60)), 16
        tables = generator.integers(0, 1000, (count, width))
        for row in range(1, count):
            other, shared = int(generator.integers(0, min(row, 3))), int(generator.integers(0, width + 1))
            tables[row, :shared] = tables[other, :shared]
        lengths = generator.integers(0, width * block_size + 1, count)
        cascade = plan_cascade(tables, lengths - 1, block_size, most, Costs(2.0))
        if cascade is not None:
            found += 1
            check_cascade(cascade, tables, lengths, block_size, most)
            check_plans(cascade, lengths, block_size, int(generator.integers(1, 4)), int(generator.integers(1, 60)))
    assert found > 20


def test_costs_decide_as_measurements_do() -> None:
    """An H200's sweep, INT4, 8 heads of 128: sequences, shared tokens, whether reading them together was faster."""
    layout = KVLayout(KV4, torch.bfloat16, 8, 128, 16)
    prefixes = SharedPrefixes(layout)
    prefixes.is_ready = lambda queries, has_cap: True  # type: ignore[method-assign]
    slower = ((4, 4096), (8, 4096), (16, 1024), (16, 4096), (32, 1024), (64, 256), (64, 1024), (128, 256))
    for count, shared in (*slower, (32, 4096), (64, 4096), (128, 1024), (256, 1024)):
        blocks = (shared + 512) // 16
        tables = np.arange(count * blocks).reshape(count, blocks)
        tables[:, : shared // 16] = tables[0, : shared // 16]
        found = prefixes.find(tables, np.full(count, shared + 511), 4)
        assert (found is None) == ((count, shared) in slower), f"{count} x {shared}"


@pytest.mark.slow
def test_looking_for_prefixes_takes_little() -> None:
    """Batch 256, the fastest of many: where nobody shares, and where all do."""
    tables = np.arange(256 * 512).reshape(256, 512)
    lengths = np.full(256, 4600)
    for shared, bound in ((0, 100e-6), (256, 500e-6)):
        tables[:, :shared] = tables[0, :shared]
        took = []
        for _ in range(100):
            start = time.perf_counter()
            plan_cascade(tables, lengths - 1, 16, 16, Costs(5.0, 15.0, 2800.0))
            took.append(time.perf_counter() - start)
        assert min(took) < bound
