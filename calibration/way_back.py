"""How much of what training found to keep: all of it, or less where less predicts held-back text better.

Between the parameters that training started from and those that it ended with, the divergence on held-back text is
nearly convex. Short training at one rate for all overshoots where there is little to gain, and then a part of its way
is better than either end. So its whole, half and a quarter are tried, as long as each is better than the one before.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

SHARES = (1.0, 0.5, 0.25)


class WayBack:
    """The line between parameters as they are when this is made and as they are when `best` is called."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._start = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def best(self, divergence: Callable[[], float]) -> dict[float, float]:
        """Leave the parameters at the share of their way where divergence is least; the shares tried, and their values.

        divergence  of the model with the parameters as they are; also prepares what else depends on them
        """
        end = [parameter.detach().clone() for parameter in self._parameters]
        found: dict[float, float] = {}
        least = math.inf
        for share in SHARES:
            self._go(end, share)
            found[share] = divergence()
            if not found[share] < least:
                break
            least = found[share]
        kept = min(found, key=lambda share: found[share])
        if kept != share:
            self._go(end, kept)
        return found

    def _go(self, end: list[torch.Tensor], share: float) -> None:
        for parameter, first, last in zip(self._parameters, self._start, end, strict=True):
            parameter.copy_(torch.lerp(first, last, share))
