"""How much of what training found is kept."""

import math

import pytest
import torch
from torch import nn

from atom.calibration.way_back import FARTHEST, WayBack, vertex


@pytest.mark.parametrize(
    ("least", "tried", "kept"),
    [
        (1.0, [1.0, 0.5], 1.0),
        (0.5, [1.0, 0.5], 0.5),
        (0.83, [1.0, 0.5, 0.83], 0.83),
        (0.2, [1.0, 0.5, 0.2], 0.2),
        (1.2, [1.0, 0.5, 1.2], 1.2),
        (4.0, [1.0, 0.5, FARTHEST], FARTHEST),
        (-1.0, [1.0, 0.5], 0.5),
    ],
)
def test_the_least_of_a_parabola_is_found(least: float, tried: list[float], kept: float) -> None:
    values, factor = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor(5.0))
    way = WayBack([values, factor])
    with torch.no_grad():
        values.copy_(torch.tensor([3.0, -2.0]))
        factor.copy_(torch.tensor(1.0))
    found = way.best(lambda: ((values[0].item() - 1) / 2 - least) ** 2, least**2)
    assert list(found) == tried and min(found, key=lambda share: found[share]) == kept
    torch.testing.assert_close(values.detach(), torch.tensor([1 + 2 * kept, 2 - 4 * kept]))
    torch.testing.assert_close(factor.detach(), torch.tensor(5 - 4 * kept))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_never_better(bad: float) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    way = WayBack([parameter])
    with torch.no_grad():
        parameter.fill_(1.0)
    assert way.best(lambda: bad if parameter.item() < 1 else 1.0, 2.0) == {1.0: 1.0, 0.5: math.inf}
    assert parameter.item() == 1.0


def test_a_line_that_bends_down_has_no_least() -> None:
    assert vertex(1.0, 0.9, 0.0) is None and vertex(1.0, 1.0, 1.0) is None
