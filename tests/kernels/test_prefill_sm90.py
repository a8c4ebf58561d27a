"""Prefill on Hopper as far as a CPU can run it: the plan, and attention with stand-ins for the GPU's kernels."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from atom.kernels import prefill_plan, prefill_sm90, square_shapes
from atom.kernels.dense_attention import AttentionSpec
from atom.kernels.kv_layout import KVLayout
from atom.kernels.prefill_plan import SquarePart, plan_prefill
from atom.kernels.prefill_sm90 import Prefill, on_device
from atom.kernels.square_shapes import SquareShape, SquareShapes
from atom.quant.presets import KV4

from .test_paged_attention import Case, expected, make_case

EVERYTHING = 1 << 60  # flops of one query and key: every chunk is worth a launch


@pytest.fixture
def small_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_plan, "SQUARE", 32)
    monkeypatch.setattr(prefill_plan, "PREFIX_FLOPS", 3e10)


@pytest.fixture
def gather(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gather kernel in torch; what it leaves is NaN."""

    def of(layout: KVLayout) -> Callable[..., None]:
        def run(layer: Tensor, tiles: Tensor, *dense: Tensor) -> None:
            for part, out in enumerate(dense):
                rows = out.view(torch.int32).view(torch.bfloat16)
                rows.fill_(float("nan"))
                for block, row, first, end in tiles.tolist():
                    target = rows[row : row + end - first]
                    if block < 0:
                        target.zero_()
                    else:
                        target.copy_(layout.read(layer[block], part)[:, first:end].transpose(0, 1))

        return run

    monkeypatch.setattr(prefill_sm90, "gather_kernel", lambda config: of(LAYOUTS[config.head_dim]))


LAYOUTS: dict[int, KVLayout] = {}


def check(case: Case, spec: AttentionSpec, flops: int = EVERYTHING) -> Any:
    LAYOUTS[case.layout.head_dim] = case.layout
    prefill = Prefill(case.layout)
    plan = plan_prefill(case.step, spec.window, case.layout.block_size, flops, spec.soft_cap is None)
    assert plan is not None
    out = prefill(case.q, case.layer, on_device(plan, case.q.device), spec, torch.zeros_like(case.q))
    wanted = expected(case, spec)
    is_chunk = np.repeat(case.step.counts > 1, case.step.counts)
    assert not out.isnan().any()
    assert float((out.double() - wanted)[is_chunk].abs().max()) < 2e-2
    return plan


@pytest.mark.usefixtures("small_squares", "gather")
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_squares_with_and_without_prefix(block_size: int) -> None:
    """A prompt of whole squares, others, chunks behind prefixes below, at and beyond a square's side."""
    lengths = (64, 50, 70, 96, 64, 150)
    case = make_case(KV4, lengths, (64, 50, 40, 32, 33, 17), 4, 2, 64, block_size, dtype=torch.bfloat16)
    plan = check(case, AttentionSpec(0.125))
    assert plan.ragged is None and len(plan.squares) == 6
    assert [part.prefix for part in plan.squares] == [0, 0, 0, 64, 0, 128]
    assert [part.side for part in plan.squares] == [64, 64, 96, 32, 64, 32]


@pytest.mark.usefixtures("small_squares", "gather")
def test_equal_chunks_share_a_launch_and_small_ones_are_ragged() -> None:
    lengths = (40, 40, 40, 9, 90, 30, 5, 60)
    counts = (40, 40, 40, 9, 1, 12, 0, 20)
    case = make_case(KV4, lengths, counts, 4, 2, 64, dtype=torch.bfloat16)
    plan = check(case, AttentionSpec(0.125))
    assert [(part.count, part.queries) for part in plan.squares] == [(3, 40), (1, 20)]
    assert plan.ragged is not None and not isinstance(plan.ragged.tokens, slice) and not plan.is_all
    assert plan.ragged.cu_seqlens_q.tolist() == [0, 9, 21] and plan.ragged.cu_seqlens_k.tolist() == [0, 9, 39]


@pytest.mark.usefixtures("small_squares", "gather")
@pytest.mark.parametrize(
    "window,cap,flops", [(20, None, EVERYTHING), (None, 3.0, EVERYTHING), (None, None, 1), (1, None, 1)]
)
def test_what_is_no_square_is_ragged(window: int | None, cap: float | None, flops: int) -> None:
    """Windows, caps and chunks that are not worth a launch."""
    case = make_case(KV4, (64, 50, 70), (64, 20, 40), 4, 2, 64, dtype=torch.bfloat16)
    plan = check(case, AttentionSpec(0.125, window, cap), flops)
    assert not plan.squares and plan.is_all and plan.ragged.tokens == slice(0, 124)


@pytest.mark.usefixtures("small_squares", "gather")
def test_a_window_that_hides_nothing_is_none() -> None:
    case = make_case(KV4, (64, 50), (64, 50), 4, 2, 64, dtype=torch.bfloat16)
    assert len(check(case, AttentionSpec(0.125, 64)).squares) == 2


def test_positions_are_those_of_the_keys() -> None:
    case = make_case(KV4, (40, 9, 33), (5, 1, 2), 2, 1, 64)
    plan = plan_prefill(case.step, 10, 16)
    assert plan is not None
    assert plan.positions.tolist() == [*range(26, 40), *range(22, 33)]
    assert plan_prefill(make_case(KV4, (40,), (1,), 2, 1, 64).step, None, 16) is None


@pytest.mark.usefixtures("small_squares", "gather")
def test_a_shape_is_prepared_once_it_has_been_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are ragged until that has lost what preparing takes, a layer after the other; then they are squares."""
    case = make_case(KV4, (64, 96), (64, 40), 4, 2, 64, dtype=torch.bfloat16)
    flops = 4 * 4 * 64
    monkeypatch.setattr(prefill_plan, "SQUARE_FLOPS", 1)
    monkeypatch.setattr(prefill_plan, "PREFIX_FLOPS", 1)
    monkeypatch.setattr(square_shapes, "PREPARE_S", 6.8 * square_shapes.GAIN_S * 64 * 32 * flops)
    LAYOUTS[64] = case.layout
    prefill, squares = Prefill(case.layout), []
    wanted = expected(case, AttentionSpec(0.125))
    for _ in range(5):
        chunks = prefill.plan(replace(case.step, _derived={}), None, 4)
        squares.append([(part.side, part.prefix) for part in chunks.plan.squares])
        for _ in range(2):  # layers
            out = prefill(case.q, case.layer, chunks, AttentionSpec(0.125), torch.zeros_like(case.q))
            assert float((out.double() - wanted).abs().max()) < 2e-2
    # The chunk's 1.48 times as many flops pay half for the prompt's square, whose shape is its own too: of the 6.8
    # wanted there are 1.74, 5.2, 7.2 (a layer, then two a step); and half for its prefix, then all: 0.74, 2.2, 5.2, 8.2
    assert squares == [[], [], [(64, 0)], [(64, 0), (64, 32)], [(64, 0), (64, 32)]]


def test_shapes_are_told_apart_by_what_cudnn_sees() -> None:
    """One chunk's square is the same behind every prefix, several chunks' are not; each is paid for by what it lost."""
    shapes = SquareShapes(prepare_s=1.0)
    large = 0.6 / square_shapes.GAIN_S
    one = (SquareShape(1, 512, 512, 512), SquareShape(1, 512, 1024, 1024))
    assert not shapes.takes(one, large) and shapes.lost == {one[0]: pytest.approx(0.3), one[1]: pytest.approx(0.3)}
    shapes.prepared(one[0])
    assert not shapes.takes(one, large) and shapes.takes(one, large), "all that is lost goes to what is missing"
    assert shapes.takes(one[:1], 0.0) and not shapes.takes((SquareShape(2, 512, 512, 1536),), large)
    for _ in range(3):
        shapes.count_layer()
    shapes.begin_step()
    shapes.begin_step()  # another window's plan of the same step
    assert shapes.takes((SquareShape(1, 1024, 1024, 1024),), large), "three layers lose it in one step"
    assert SquareShapes(prepare_s=0).takes(one, 1.0)


def test_one_chunks_rows_have_the_strides_of_their_own() -> None:
    rows = torch.zeros(20, 2, 8)
    for first, prefix in ((0, 4), (3, 8)):
        part = SquarePart(slice(0, 4), first, 1, 4, prefix, 0, 4)
        square, full = (prefill_sm90._rows(rows, part, is_prefix) for is_prefix in (False, True))
        assert square.shape == (1, 4, 2, 8) and square.stride() == (64, 16, 8, 1)
        assert full.shape == (1, prefix, 2, 8) and full.data_ptr() == rows[first].data_ptr()
        assert square.data_ptr() == rows[first + prefix].data_ptr()
    part = SquarePart(slice(0, 8), 2, 2, 4, 4, 0, 4)
    assert prefill_sm90._rows(rows, part, False).stride()[0] == 8 * 16
