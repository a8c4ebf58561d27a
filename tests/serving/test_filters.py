"""Filters against their definitions in float64, ties included."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atom.serving.filters import floor_by_sort, min_p_floor, ties_beyond, top_k_floor, top_p_floor


def nucleus(logits: Tensor, floor: float, share: float) -> set[int]:
    """Tokens of the smallest set of most likely values with at least `share` of the mass at or above the floor."""
    values = logits.double().numpy()
    kept = values >= floor
    mass = np.where(kept, np.exp(values - values[kept].max()), 0.0)
    for value in np.unique(values[kept])[::-1]:
        if mass[values >= value].sum() >= share * mass.sum():
            return set(np.flatnonzero(values >= value))
    raise AssertionError


# logits on a grid of few values have many ties; shares that no sum of such masses meets exactly
GRID = st.lists(st.integers(-6, 6), min_size=1, max_size=40)
SHARES = st.floats(0.01, 0.99).map(lambda p: p + 1.2345e-4)


@settings(deadline=None, max_examples=200)
@given(GRID, SHARES, st.integers(1, 40), st.booleans())
def test_top_p_and_top_k(grid: list[int], share: float, top_k: int, uses_k: bool) -> None:
    logits = torch.tensor([grid]) * 0.37
    top_k = min(top_k, len(grid)) if uses_k else len(grid)
    by_size = logits.sort(-1, descending=True).values
    floor = top_k_floor(by_size, torch.tensor([top_k]))
    assert floor == np.sort(logits[0].numpy())[::-1][top_k - 1]
    expected = nucleus(logits[0], floor.item(), share)
    none = torch.full((1,), -torch.inf)
    sorted_out = floor_by_sort(logits, none, torch.tensor([top_k]), torch.tensor([share]))
    assert floor_by_sort(logits, none, torch.tensor([top_k]), torch.ones(1)) == floor
    best = logits.topk(top_k).values
    among = top_p_floor(best, floor, torch.tensor([share]), ties_beyond(logits, best, floor))
    assert sorted_out == among
    assert set(np.flatnonzero((logits >= sorted_out)[0])) == expected


def test_top_p_takes_rows_of_its_own_over_several_splits() -> None:
    torch.manual_seed(0)
    logits, share = torch.randn(75, 33), torch.rand(75) * 0.98 + 0.01
    got = floor_by_sort(logits, torch.full((75,), -torch.inf), torch.full((75,), 33), share)
    for row in range(75):
        assert set(np.flatnonzero(logits[row] >= got[row])) == nucleus(logits[row], -np.inf, share[row].item())


def test_ties_beyond_the_candidates_have_mass() -> None:
    """Four equal tokens, two of them candidates: 0.6 of the mass needs the border's value, and so all four."""
    logits = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]])
    best = logits.topk(3).values
    floor = top_k_floor(best, torch.tensor([3]))
    beyond = ties_beyond(logits, best, floor)
    assert beyond.tolist() == [2]
    e = np.e
    for share, expected in ((e / (e + 4) - 1e-3, 1.0), (e / (e + 4) + 1e-3, 0.0)):
        assert top_p_floor(best, floor, torch.tensor([share]), beyond) == expected


@pytest.mark.parametrize("share", [1e-6, 0.5, 1.0])
def test_top_p_keeps_the_best_token_of_any_row(share: float) -> None:
    rows = torch.tensor([[0.0, -torch.inf, -torch.inf], [3e38, -3e38, 0.0], [-3e38, -3e38, -torch.inf]])
    floor = floor_by_sort(rows, torch.full((3,), -torch.inf), torch.full((3,), 3), torch.full((3,), share))
    assert (rows.max(-1).values >= floor).all()
    if share < 1:
        assert floor.tolist() == rows.max(-1).values.tolist()


def test_min_p() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    for min_p, kept in ((np.exp(-1.5), 2), (np.exp(-2.5), 3), (1.0, 1), (0.0, 4)):
        floor = min_p_floor(logits.max(-1).values, torch.tensor([min_p]).log())
        assert (logits >= floor[:, None]).sum() == kept
