"""Bits where they matter: for each input of each layer one of several formats, so that a budget is spent best.

The cost of a choice is the mean bits of an operand: every multiplication reads a weight and an activation, and the bits
of both, scales and outliers included, are averaged over all multiplications. The loss of a choice is measured: the
divergence KL(full || rounded) of the next token on calibration text when this input and its linears alone are rounded
(to nearest, its channels in order of energy) and everything else is exact. Losses of different places are taken to add
up, which is right while they are small; then the best choice under a budget is a knapsack with one item a place, solved
exactly on a grid of costs by dynamic programming.

Additive sensitivities for mixed precision: HAWQ (arXiv:1905.03696) and its successors; here measured, not estimated.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atom.models.family import InputGroup
from atom.models.kv import DenseKV
from atom.models.layers import DecoderLayer
from atom.models.layout import layer_prefix
from atom.models.loader import load_source
from atom.models.model import Model
from atom.models.source import Source
from atom.quant.mixed import dequantize_weight, fake_quantize_activation, quantize_weight
from atom.quant.permutation import energy_order, invert
from atom.quant.presets import get_scheme
from atom.quant.schemes import LinearScheme, OutlierSpec, Override, Scheme

from .observe import hooked
from .plan import unrotate_input

GRID = 20000  # steps of cost between the cheapest and the dearest choice
FRONTIER = 9  # points that are printed
OUTLIERS = (0, 64, 128, 256)

Losses = dict[str, dict[str, float]]  # place ("3.mlp_input") -> choice -> nats a token


def default_choices(columns: int) -> dict[str, LinearScheme]:
    """What a place may run, by name: all have kernels. Outlier counts beyond half of `columns` are left out."""
    w4a4, w4a8, w8a8, w3a3 = (get_scheme(name).default_linear for name in ("w4a4", "w4a8", "w8a8", "w3a3"))
    found = {"w3a3": w3a3} if columns > 2 * w3a3.outliers.count else {}
    for count in OUTLIERS:
        if 2 * count < columns:
            found[f"w4a4, {count} outliers"] = replace(w4a4, outliers=OutlierSpec(count))
    by_blocks = {name: get_scheme(name).default_linear for name in ("w4a4-hadamard", "w4a8-hadamard")}
    return {**found, **by_blocks, "w4a8": w4a8, "w8a8": w8a8}


@dataclass(frozen=True)
class Place:
    """One input of one layer, and what is known of its choices.

    macs    multiplications a token, in all linears that read it
    bits    mean bits of an operand under each choice
    """

    layer: int
    group: InputGroup
    macs: int
    bits: dict[str, float]

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.group.name}"


@dataclass(frozen=True)
class Plan:
    """A solution: the choice for each place by name, mean bits of an operand, predicted loss in nats a token."""

    chosen: dict[str, str]
    bits: float
    loss: float


def find_places(model: Model) -> tuple[list[Place], dict[str, dict[str, LinearScheme]]]:
    """All places of a model (which may be on the meta device), and the choices of each by its name."""
    places, choices = [], {}
    for index, layer in enumerate(model.model.decoder_layers()):
        for group in model.family.groups:
            shapes = [layer.get_parameter(f"{name}.weight").shape for name in group.linears]
            K = shapes[0][1]
            known = default_choices(K)
            bits = {name: (_bits(c, K, "weight") + _bits(c, K, "activation")) / 2 for name, c in known.items()}
            place = Place(index, group, sum(n * k for n, k in shapes), bits)
            places.append(place)
            choices[place.name] = known
    return places, choices


def solve(places: list[Place], losses: Losses, budget: float) -> Plan:
    """The choices of least total loss whose mean bits do not exceed `budget`.

    Raises ValueError if the cheapest choices need more. Costs are rounded up to the grid, so the budget always holds.
    """
    total = sum(place.macs for place in places)
    cheapest = sum(place.macs * min(place.bits.values()) for place in places) / total
    dearest = sum(place.macs * max(place.bits.values()) for place in places) / total
    if budget < cheapest:
        raise ValueError(f"a budget of {budget:g} bits cannot be met: the cheapest choices need {cheapest:.3f}")
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
    bits = sum(place.macs * place.bits[chosen[place.name]] for place in places) / total
    return Plan(chosen, bits, sum(losses[place.name][chosen[place.name]] for place in places))


def solve_for_loss(places: list[Place], losses: Losses, most: float) -> Plan:
    """The fewest bits whose predicted loss is at most `most`; ValueError if no choice is that good."""
    total = sum(place.macs for place in places)
    low = sum(place.macs * min(place.bits.values()) for place in places) / total
    high = sum(place.macs * max(place.bits.values()) for place in places) / total
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
    total = sum(place.macs for place in places)
    low = sum(place.macs * min(place.bits.values()) for place in places) / total
    high = sum(place.macs * max(place.bits.values()) for place in places) / total
    return [solve(places, losses, low + (high - low) * i / (FRONTIER - 1) + 1e-9) for i in range(FRONTIER)]


def build_scheme(
    base: Scheme, plan: Plan, places: list[Place], choices: Mapping[str, Mapping[str, LinearScheme]]
) -> Scheme:
    """`base` with the plan's choices as overrides of every linear that they change; its cache stays."""
    overrides = []
    for place in places:
        linear = choices[place.name][plan.chosen[place.name]]
        if linear != base.default_linear:
            overrides += [Override(f"{layer_prefix(place.layer)}.{name}", linear) for name in place.group.linears]
    return replace(base, overrides=(*base.overrides, *overrides))


class Sensitivity:
    """Measures what every choice at every place loses; what is measured is kept in a file and not measured again.

    model   in full precision, on the device
    tokens  [windows, length] of calibration text
    """

    def __init__(self, model: Model, tokens: Tensor, file: Path) -> None:
        self.model = model
        self.tokens = tokens.to(model.device)
        self.file = file
        self.losses: Losses = json.loads(file.read_text()) if file.exists() else {}
        self.config = model.config

    @torch.no_grad()
    def measure(
        self,
        places: list[Place],
        choices: Mapping[str, Mapping[str, LinearScheme]],
        progress: Callable[[int, int], None] | None = None,
    ) -> Losses:
        """The losses of all choices; `progress` is told (places done, places in all)."""
        inputs = list(self._inputs())
        final = inputs.pop()
        for number, place in enumerate(places):
            if place.name not in self.losses:
                hidden = inputs[place.layer]
                found = {
                    name: max(self._loss(place, linear, hidden, final), 0.0)
                    for name, linear in choices[place.name].items()
                }
                self.losses[place.name] = found
                partial = self.file.with_suffix(".partial")
                partial.write_text(json.dumps(self.losses))
                partial.replace(self.file)
            if progress is not None:
                progress(number + 1, len(places))
        return self.losses

    def _inputs(self) -> Iterator[Tensor]:
        """What enters each layer [T, hidden_size], and what the last one gives."""
        hidden = self.model.model.embed(self.tokens.flatten())
        for layer in self.model.model.decoder_layers():
            yield hidden
            hidden = self._run(layer, hidden)
        yield hidden

    def _run(self, layer: DecoderLayer, hidden: Tensor) -> Tensor:
        kv = DenseKV(self.config, self.tokens.shape[0], device=self.model.device)
        out: Tensor = layer(hidden, layer.rope(kv.positions(self.tokens.shape[1])), kv)
        return out

    def _loss(self, place: Place, linear: LinearScheme, hidden: Tensor, final: Tensor) -> float:
        """Mean KL(full || rounded) of the next token with `linear` at `place` alone."""
        layers = list(self.model.model.decoder_layers())
        layer = layers[place.layer]
        modules = [layer.get_submodule(name) for name in place.group.linears]
        weights = [layer.get_parameter(f"{name}.weight") for name in place.group.linears]
        perm: Tensor | None = None

        def round_input(module: nn.Module, args: Any, x: Tensor) -> Tensor:
            nonlocal perm
            if not linear.reorder:
                return unrotate_input(fake_quantize_activation(x, linear), linear)
            perm = energy_order(x.square().mean(0))
            for module_, weight in zip(modules, weights, strict=True):
                module_.weight = _rounded(weight, linear, perm)
            back: Tensor = unrotate_input(fake_quantize_activation(x[:, perm], linear), linear)
            return back[:, invert(perm)]

        try:
            if not linear.reorder:
                for module, weight in zip(modules, weights, strict=True):
                    module.weight = _rounded(weight, linear, None)
            with hooked({place.group.producer: round_input}, layer):
                hidden = self._run(layer, hidden)
        finally:
            for module, weight in zip(modules, weights, strict=True):
                module.weight = weight
        for later in layers[place.layer + 1 :]:
            hidden = self._run(later, hidden)
        return self._divergence(hidden, final) / self.tokens.numel()

    def _divergence(self, found: Tensor, exact: Tensor) -> float:
        norm, total = self.model.model.norm, 0.0
        for a, b in zip(found.split(512), exact.split(512), strict=True):
            rounded = self.model.logits(norm(a)).float().log_softmax(-1)
            wanted = self.model.logits(norm(b)).float().log_softmax(-1)
            total += nn.functional.kl_div(rounded, wanted, reduction="sum", log_target=True).item()
        return total


def choose_by_budget(
    source: Source,
    base: Scheme,
    tokens: Tensor,
    file: Path,
    device: torch.device,
    budget: float | None = None,
    max_loss: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Scheme, Plan, list[Plan]]:
    """The scheme for a budget in bits, or for a largest loss in nats a token; the plan, and the whole frontier.

    tokens  [windows, length] of calibration text
    file    keeps what is measured: a stopped run goes on from there
    Raises ValueError if neither or both limits are given, or the one that is cannot be met.
    """
    if (budget is None) == (max_loss is None):
        raise ValueError(f"give a budget in bits or a largest loss, one of them; got {budget} and {max_loss}")
    model = load_source(source, device, torch.float32)
    places, choices = find_places(model)
    losses = Sensitivity(model, tokens, file).measure(places, choices, progress)
    if budget is not None:
        plan = solve(places, losses, budget)
    else:
        assert max_loss is not None
        plan = solve_for_loss(places, losses, max_loss)
    return build_scheme(base, plan, places, choices), plan, frontier(places, losses)


def _rounded(weight: Tensor, linear: LinearScheme, perm: Tensor | None) -> nn.Parameter:
    """The weight [N, K] as it is read once rounded, its columns in their own order."""
    ordered = weight if perm is None else weight[:, perm]
    found = unrotate_input(dequantize_weight(quantize_weight(ordered, linear), linear), linear)
    return nn.Parameter(found if perm is None else found[:, invert(perm)], requires_grad=False)


def _bits(linear: LinearScheme, K: int, what: str) -> float:
    scheme = Scheme("bits", linear.weight, linear.activation, outliers=linear.outliers, reorder=linear.reorder)
    return scheme.weight_bits(K) if what == "weight" else scheme.activation_bits(K)
