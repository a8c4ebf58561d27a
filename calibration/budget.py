"""Bits where they matter: for each input and cache of each layer one of several formats, so that a budget goes far.

The cost of a choice is the mean bits of an operand: every multiplication of a linear reads a weight and an activation,
and the bits of both, scales and outliers included, are averaged over all multiplications; a token reads every cached
key and value of its context once, and their bits are averaged along. The loss of a choice is measured: the
divergence KL(full || rounded) of the next token on calibration text when this input and its linears alone are rounded
(to nearest, its channels in order of energy), or this layer's cache, and everything else is exact, in a model that has
the form in which the base's calibration rounds it (prepared.py). Losses of different places are taken to add up, which
is right while they are small; then the best choice under a budget is a knapsack with one item a place, solved exactly
on a grid of costs by dynamic programming.

Additive sensitivities for mixed precision: HAWQ (arXiv:1905.03696) and its successors; here measured, not estimated.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from atom.models.family import model_config
from atom.models.layout import layer_prefix
from atom.models.loader import meta_model
from atom.models.source import Source
from atom.quant.schemes import CacheOverride, Override, Scheme, TensorSpec

from .config import CalibrationConfig
from .places import CONTEXT, Choices, Losses, Place, find_places
from .prepared import load_prepared
from .sensitivity import Sensitivity

GRID = 20000  # steps of cost between the cheapest and the dearest choice
FRONTIER = 9  # points that are printed


@dataclass(frozen=True)
class Plan:
    """A solution: the choice for each place by name, mean bits of an operand, predicted loss in nats a token."""

    chosen: dict[str, str]
    bits: float
    loss: float


class Choice(NamedTuple):
    """What a budget affords: the scheme and its plan, plans from the cheapest to the dearest, mean bits by kind."""

    scheme: Scheme
    plan: Plan
    frontier: list[Plan]
    bits: dict[str, float]


def solve(places: list[Place], losses: Losses, budget: float) -> Plan:
    """The choices of least total loss whose mean bits do not exceed `budget`.

    Raises ValueError if the cheapest choices need more. Costs are rounded up to the grid, so the budget always holds.
    """
    total = sum(place.macs for place in places)
    cheapest, dearest = _reach(places, budget)
    step = max(dearest - cheapest, 1e-9) / GRID
    room = min(GRID, int((budget - cheapest) / step + 1e-6)) + 1
    if budget >= dearest:
        room += len(places)  # what rounding up may add to all the dearest
    best = torch.zeros(room, dtype=torch.float64)  # least loss with at most so many steps spent beyond the cheapest
    taken = []
    for place in places:
        base = min(place.bits.values())
        options, steps = list(place.bits), []
        tries = torch.full((len(options), room), float("inf"), dtype=torch.float64)
        for i, name in enumerate(options):
            spent = -int(-(place.macs * (place.bits[name] - base) / total / step) // 1)  # rounded up
            steps.append(spent)
            if spent < room:
                tries[i, spent:] = best[: room - spent] + losses[place.name][name]
        best, index = tries.min(0)
        taken.append((index, options, steps))
    chosen: dict[str, str] = {}
    left = room - 1
    for place, (index, options, steps) in zip(reversed(places), reversed(taken), strict=True):
        i = int(index[left])
        chosen[place.name] = options[i]
        left -= steps[i]
    return plan_of(chosen, places, losses)


def plan_of(chosen: dict[str, str], places: list[Place], losses: Losses) -> Plan:
    """The plan that takes the choice of this name at each place."""
    total = sum(place.macs for place in places)
    bits = sum(place.macs * place.bits[chosen[place.name]] for place in places) / total
    return Plan(chosen, bits, sum(losses[place.name][chosen[place.name]] for place in places))


def solve_for_loss(places: list[Place], losses: Losses, most: float) -> Plan:
    """The fewest bits whose predicted loss is at most `most`; ValueError if no choice is that good."""
    low, high = _reach(places)
    best = solve(places, losses, high)
    if best.loss > most:
        raise ValueError(f"a loss of {most:g} nats cannot be met: the best choices lose {best.loss:.4g}")
    for _ in range(20):
        middle = (low + high) / 2
        plan = solve(places, losses, middle)
        if plan.loss <= most:
            best, high = plan, middle
        else:
            low = middle
    return best


def frontier(places: list[Place], losses: Losses) -> list[Plan]:
    """Solutions from the cheapest to the dearest budget."""
    low, high = _reach(places)
    return [solve(places, losses, low + (high - low) * i / (FRONTIER - 1) + 1e-9) for i in range(FRONTIER)]


def mean_bits(plan: Plan, places: list[Place]) -> dict[str, float]:
    """Mean bits of a weight, an activation and a cached value (kv) under a plan, each where it is chosen."""
    sums: dict[str, tuple[float, int]] = {}  # kind -> bits of all multiplications, their number
    for place in places:
        for kind, bits in place.by_kind[plan.chosen[place.name]].items():
            spent, macs = sums.get(kind, (0.0, 0))
            sums[kind] = spent + place.macs * bits, macs + place.macs
    return {kind: spent / macs for kind, (spent, macs) in sums.items()}


def build_scheme(base: Scheme, plan: Plan, places: list[Place], choices: Choices) -> Scheme:
    """`base` with the plan's choices as overrides of every linear and every layer's cache that they change."""
    overrides: list[Override] = []
    caches: list[CacheOverride] = []
    for place in places:
        chosen = choices[place.name][plan.chosen[place.name]]
        if isinstance(chosen, TensorSpec):
            caches += [] if chosen == base.kv else [CacheOverride(place.layer, chosen)]
        elif place.group is not None and chosen != base.default_linear:
            overrides += [Override(f"{layer_prefix(place.layer)}.{name}", chosen) for name in place.group.linears]
    return replace(base, overrides=(*base.overrides, *overrides), kv_overrides=(*base.kv_overrides, *caches))


def choose_by_budget(
    source: Source,
    base: Scheme,
    tokens: Tensor,
    file: Path,
    config: CalibrationConfig,
    budget: float | None = None,
    max_loss: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    context: int = CONTEXT,
) -> Choice:
    """The scheme for a budget in bits, or for a largest loss in nats a token.

    tokens  [windows, length] of calibration text
    file    keeps what is measured: a stopped run goes on from there
    config  how the checkpoint will be calibrated
    context see find_places
    Raises ValueError if neither or both limits are given, or the one that is cannot be met: of a budget before anything
    is measured.
    """
    if (budget is None) == (max_loss is None):
        raise ValueError(f"give a budget in bits or a largest loss, one of them; got {budget} and {max_loss}")
    places, choices = find_places(meta_model(model_config(source.config, source.generation_config)), base, context)
    _reach(places, budget)
    model = load_prepared(source, base, tokens, config)
    losses = Sensitivity(model, base, tokens, file).measure(places, choices, progress)
    if budget is not None:
        plan = solve(places, losses, budget)
    else:
        assert max_loss is not None
        plan = solve_for_loss(places, losses, max_loss)
    return Choice(build_scheme(base, plan, places, choices), plan, frontier(places, losses), mean_bits(plan, places))


def _reach(places: list[Place], budget: float | None = None) -> tuple[float, float]:
    """Mean bits of an operand under the cheapest choices, and under the dearest.

    Raises ValueError if the cheapest need more than `budget`.
    """
    total = sum(place.macs for place in places)
    low, high = (sum(place.macs * end(place.bits.values()) for place in places) / total for end in (min, max))
    if budget is not None and budget < low:
        raise ValueError(f"a budget of {budget:g} bits cannot be met: the cheapest choices need {low:.3f}")
    return low, high
