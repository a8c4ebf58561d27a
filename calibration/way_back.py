"""How much of what training found to keep: all of it, or as much as predicts held-back text best.

On the line from the parameters that training started from (0) to those that it ended with (1), the divergence on
held-back text is close to a parabola. Short training at one rate for all overshoots where there is little to gain, and
noise of the last steps averages out on the way back: the least often lies before the end. So the end and the half are
measured, and the place where the parabola through them and the start is least.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

FARTHEST = 1.5  # beyond the end where the parabola still falls there


class WayBack:
    """The line between parameters as they are when this is made and as they are when `best` is called."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._start = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def best(self, divergence: Callable[[], float], before: float) -> dict[float, float]:
        """Leave the parameters at the share of their way where divergence is least; the shares tried, and their values.

        divergence  of the model with the parameters as they are; also prepares what else depends on them
        before      the divergence at the start
        """
        end = [parameter.detach().clone() for parameter in self._parameters]
        found: dict[float, float] = {}

        def measure(share: float) -> float:
            self._go(end, share)
            value = divergence()
            found[share] = value if math.isfinite(value) else math.inf
            return found[share]

        whole, half = measure(1.0), measure(0.5)
        lowest = vertex(before, half, whole)
        if lowest is not None and lowest not in found:
            measure(lowest)
        self._go(end, min(found, key=lambda share: found[share]))
        return found

    def _go(self, end: Sequence[Tensor], share: float) -> None:
        for parameter, first, last in zip(self._parameters, self._start, end, strict=True):
            parameter.copy_(torch.lerp(first, last, share))


def vertex(start: float, half: float, end: float) -> float | None:
    """Where the parabola through these values at 0, 1/2 and 1 is least, in hundredths; None where it has no least in
    between, or none at all."""
    curvature = start - 2 * half + end
    if not (math.isfinite(curvature) and curvature > 0):
        return None
    found = round(0.5 - (end - start) / (4 * curvature), 2)
    return min(found, FARTHEST) if found > 0 else None
