"""How much of what training found is kept."""

import pytest
import torch
from torch import nn

from atom.calibration.way_back import WayBack


@pytest.mark.parametrize(
    ("least", "tried", "kept"),
    [
        (0.9, [1.0, 0.5], 1.0),
        (0.6, [1.0, 0.5, 0.25], 0.5),
        (0.2, [1.0, 0.5, 0.25], 0.25),
        (-1.0, [1.0, 0.5, 0.25], 0.25),
    ],
)
def test_the_best_of_the_shares_that_are_tried_is_kept(least: float, tried: list[float], kept: float) -> None:
    """The divergence is a parabola along the way, its least at `least` of it."""
    values, factor = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor(5.0))
    way = WayBack([values, factor])
    with torch.no_grad():
        values.copy_(torch.tensor([3.0, -2.0]))
        factor.copy_(torch.tensor(1.0))
    found = way.best(lambda: ((values[0].item() - 1) / 2 - least) ** 2)
    assert list(found) == tried
    torch.testing.assert_close(values.detach(), torch.tensor([1 + 2 * kept, 2 - 4 * kept]))
    torch.testing.assert_close(factor.detach(), torch.tensor(5 - 4 * kept))


def test_what_is_not_finite_is_never_better() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    way = WayBack([parameter])
    with torch.no_grad():
        parameter.fill_(1.0)
    assert list(way.best(lambda: float("nan") if parameter.item() < 1 else 1.0)) == [1.0, 0.5]
    assert parameter.item() == 1.0
