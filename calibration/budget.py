"""Bits where they matter: for each input and cache of each layer one of several formats, so that a budget goes far.

The cost of a choice is the mean bits of an operand: every multiplication of a linear reads a weight and an activation,
and the bits of both, scales and outliers included, are averaged over all multiplications; a token reads every cached
key and value of its context once, and their bits are averaged along. The loss of a choice is measured: the
divergence KL(full || rounded) of the next token on calibration text when this input and its linears alone are rounded
(to nearest, its channels in order of energy), or this layer's cache, and everything else is exact, in a model that has
the form in which the base's calibration rounds it (prepared.py). Losses of different places are taken to add up, which
is right while they are small; then the best choice under a budget is a knapsack (knapsack.py).

Additive sensitivities for mixed precision: HAWQ (arXiv:1905.03696) and its successors; here measured, not estimated.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from atom.models.family import model_config
from atom.models.layout import layer_prefix
from atom.models.loader import meta_model
from atom.models.source import Source
from atom.quant.schemes import CacheOverride, Override, Scheme, TensorSpec

from .config import CalibrationConfig
from .knapsack import Knapsack, Plan, reach
from .places import CONTEXT, Choices, Losses, Place, find_places
from .prepared import load_prepared
from .sensitivity import Sensitivity, kept_losses


class Choice(NamedTuple):
    """What a budget affords: the scheme and its plan, plans from the cheapest to the dearest, mean bits by kind."""

    scheme: Scheme
    plan: Plan
    frontier: list[Plan]
    bits: dict[str, float]


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


def measure_losses(
    source: Source,
    base: Scheme,
    tokens: Tensor,
    file: Path,
    config: CalibrationConfig,
    places: list[Place],
    choices: Choices,
    progress: Callable[[int, int], None] | None = None,
) -> Losses:
    """What every choice at every place loses; the model is loaded where `file` does not hold all of it already."""
    kept = kept_losses(file)
    if all(place.name in kept for place in places):
        return kept
    model = load_prepared(source, base, tokens, config)
    return Sensitivity(model, base, tokens, file).measure(places, choices, progress)


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
    reach(places, budget)
    losses = measure_losses(source, base, tokens, file, config, places, choices, progress)
    knapsack = Knapsack(places, losses)
    if budget is not None:
        plan = knapsack.solve(budget)
    else:
        assert max_loss is not None
        plan = knapsack.solve_for_loss(max_loss)
    return Choice(build_scheme(base, plan, places, choices), plan, knapsack.frontier(), mean_bits(plan, places))
