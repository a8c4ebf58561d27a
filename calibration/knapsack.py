"""The best choice at every place under every budget at once: a knapsack with one item a place.

Costs, the mean bits of an operand that a choice adds to the cheapest ones, are rounded up to steps of a grid, so that a
budget always holds; dynamic programming over places then finds the least total loss for every number of steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .places import Losses, Place

GRID = 200_000  # steps of cost between the cheapest and the dearest choices: rounding wastes half of one a place
FRONTIER = 9  # points


@dataclass(frozen=True)
class Plan:
    """A solution: the choice for each place by name, mean bits of an operand, predicted loss in nats a token."""

    chosen: dict[str, str]
    bits: float
    loss: float


class Knapsack:
    """Solutions for `places` with these `losses`, of which all are known."""

    def __init__(self, places: list[Place], losses: Losses) -> None:
        self.places = places
        self.losses = losses
        self.cheapest, self.dearest = reach(places)
        self._step = max(self.dearest - self.cheapest, 1e-9) / GRID
        total = sum(place.macs for place in places)
        room = GRID + len(places) + 1  # rounding up may add a step a place to all the dearest
        self._best = torch.zeros(room, dtype=torch.float64)  # least loss with at most so many steps
        self._taken: list[tuple[Tensor, list[int]]] = []  # by place: the choice for every number of steps, their costs
        for place in places:
            base = min(place.bits.values())
            costs = [-int(-(place.macs * (bits - base) / total / self._step) // 1) for bits in place.bits.values()]
            tries = torch.full((len(costs), room), float("inf"), dtype=torch.float64)
            for i, (name, cost) in enumerate(zip(place.bits, costs, strict=True)):
                tries[i, cost:] = self._best[: room - cost] + losses[place.name][name]
            self._best, index = tries.min(0)
            self._taken.append((index.to(torch.uint8), costs))

    def solve(self, budget: float) -> Plan:
        """The least total loss whose mean bits do not exceed `budget`; ValueError if the cheapest choices need more."""
        reach(self.places, budget)
        steps = int((budget - self.cheapest) / self._step + 1e-6)
        return self._trace(len(self._best) - 1 if budget >= self.dearest else min(steps, GRID))

    def solve_for_loss(self, most: float) -> Plan:
        """The fewest bits whose predicted loss is at most `most`; ValueError if no choice is that good."""
        enough = (self._best <= most).nonzero()
        if not len(enough):
            least = float(self._best[-1])
            raise ValueError(f"a loss of {most:g} nats cannot be met: the best choices lose {least:.4g}")
        return self._trace(int(enough[0]))

    def frontier(self) -> list[Plan]:
        """Solutions from the cheapest to the dearest budget."""
        apart = (self.dearest - self.cheapest) / (FRONTIER - 1)
        return [self.solve(self.cheapest + apart * i + 1e-9) for i in range(FRONTIER)]

    def _trace(self, steps: int) -> Plan:
        """The plan of least loss that spends at most so many steps."""
        chosen: dict[str, str] = {}
        for place, (index, costs) in zip(reversed(self.places), reversed(self._taken), strict=True):
            i = int(index[steps])
            chosen[place.name] = list(place.bits)[i]
            steps -= costs[i]
        return plan_of(chosen, self.places, self.losses)


def plan_of(chosen: dict[str, str], places: list[Place], losses: Losses) -> Plan:
    """The plan that takes the choice of this name at each place."""
    total = sum(place.macs for place in places)
    bits = sum(place.macs * place.bits[chosen[place.name]] for place in places) / total
    return Plan(chosen, bits, sum(losses[place.name][chosen[place.name]] for place in places))


def reach(places: list[Place], budget: float | None = None) -> tuple[float, float]:
    """Mean bits of an operand under the cheapest choices, and under the dearest.

    Raises ValueError if the cheapest need more than `budget`.
    """
    total = sum(place.macs for place in places)
    low, high = (sum(place.macs * end(place.bits.values()) for place in places) / total for end in (min, max))
    if budget is not None and budget < low:
        raise ValueError(f"a budget of {budget:g} bits cannot be met: the cheapest choices need {low:.3f}")
    return low, high
