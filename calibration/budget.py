"""Bits where they matter: for each input and cache of each layer one of several formats, so that a budget goes far.

The cost of a choice is the mean bits of an operand: every multiplication of a linear reads a weight and an activation,
and the bits of both, scales and outliers included, are averaged over all multiplications; a token reads every cached
key and value of its context once, and their bits are averaged along. The loss of a choice is measured: the
divergence KL(full || rounded) of the next token on calibration text when this input and its linears alone are rounded
(to nearest, its channels in order of energy), or this layer's cache (keys less their centre, factors left out), and
everything else is exact. Losses of different places are taken to add up, which is right while they are small; then the
best choice under a budget is a knapsack with one item a place, solved exactly on a grid of costs by dynamic
programming.

Additive sensitivities for mixed precision: HAWQ (arXiv:1905.03696) and its successors; here measured, not estimated.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atom.kernels.dense_attention import AttentionSpec
from atom.models.family import InputGroup
from atom.models.kv import DenseKV
from atom.models.layers import DecoderLayer
from atom.models.layout import layer_prefix
from atom.models.loader import load_source
from atom.models.model import Model
from atom.models.rope import Rotation
from atom.models.source import Source
from atom.quant.mixed import dequantize_weight, fake_quantize_activation, quantize_weight
from atom.quant.permutation import energy_order, invert
from atom.quant.presets import KV_SUFFIXES, get_scheme
from atom.quant.schemes import CacheOverride, LinearScheme, OutlierSpec, Override, Scheme, TensorSpec

from .keys import mirror_of, second_moments
from .observe import hooked
from .plan import unrotate_input

GRID = 20000  # steps of cost between the cheapest and the dearest choice
FRONTIER = 9  # points that are printed
OUTLIERS = (0, 64, 128, 256)
CACHES = ("kv4", "kv8")
CONTEXT = 2048  # tokens whose keys and values a token reads

Losses = dict[str, dict[str, float]]  # place ("3.mlp_input", "3.cache") -> choice -> nats a token
Choices = Mapping[str, Mapping[str, LinearScheme | TensorSpec]]  # place -> choice -> what runs


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
    """One input of one layer, or its cache, and what is known of its choices.

    group   None for the cache
    macs    multiplications a token, in all linears that read it; of a cache, keys and values that a token reads
    bits    mean bits of an operand under each choice
    """

    layer: int
    group: InputGroup | None
    macs: int
    bits: dict[str, float]

    @property
    def name(self) -> str:
        return f"{self.layer}.{'cache' if self.group is None else self.group.name}"


@dataclass(frozen=True)
class Plan:
    """A solution: the choice for each place by name, mean bits of an operand, predicted loss in nats a token."""

    chosen: dict[str, str]
    bits: float
    loss: float


def find_places(model: Model, base: Scheme, context: int = CONTEXT) -> tuple[list[Place], Choices]:
    """All places of a model (which may be on the meta device), and the choices of each by its name.

    base     whose cache, where it has one of few bits, is chosen layer by layer; where its weights are in full
             precision, nothing but the cache
    context  tokens whose keys and values a token reads; 0 leaves the cache as it is
    Raises ValueError where that leaves nothing to choose.
    """
    places: list[Place] = []
    choices: dict[str, Mapping[str, LinearScheme | TensorSpec]] = {}
    config = model.config
    cached = 2 * config.num_kv_heads * config.head_dim
    caches = {name: spec for name in CACHES if (spec := KV_SUFFIXES[name]) is not None}
    for index, layer in enumerate(model.model.decoder_layers()):
        for group in model.family.groups if base.weight is not None else ():
            shapes = [layer.get_parameter(f"{name}.weight").shape for name in group.linears]
            K = shapes[0][1]
            known = default_choices(K)
            bits = {name: (_bits(c, K, "weight") + _bits(c, K, "activation")) / 2 for name, c in known.items()}
            place = Place(index, group, sum(n * k for n, k in shapes), bits)
            places.append(place)
            choices[place.name] = known
        if base.kv is not None and context:
            seen = min(context, config.windows[index] or context)
            bits = {name: spec.bits_per_value(config.head_dim) for name, spec in caches.items()}
            places.append(Place(index, None, cached * seen, bits))
            choices[places[-1].name] = caches
    if not places:
        raise ValueError(
            f"{base.name} leaves nothing to choose: weights are in full precision, and so is the cache, or it does not "
            "count; use +kv4 and a budget_context above 0, or a scheme that rounds weights"
        )
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


class Sensitivity:
    """Measures what every choice at every place loses; what is measured is kept in a file and not measured again.

    model   in full precision, on the device
    base    how its cache treats keys
    tokens  [windows, length] of calibration text
    """

    def __init__(self, model: Model, base: Scheme, tokens: Tensor, file: Path) -> None:
        self.model = model
        self.base = base
        self.tokens = tokens.to(model.device)
        self.file = file
        self.losses: Losses = json.loads(file.read_text()) if file.exists() else {}
        self.config = model.config

    @torch.no_grad()
    def measure(
        self,
        places: list[Place],
        choices: Choices,
        progress: Callable[[int, int], None] | None = None,
    ) -> Losses:
        """The losses of all choices; `progress` is told (places done, places in all)."""
        inputs = list(self._inputs())
        final = inputs.pop()
        for number, place in enumerate(places):
            if place.name not in self.losses:
                hidden = inputs[place.layer]
                found = {
                    name: max(self._loss(place, choice, hidden, final), 0.0)
                    for name, choice in choices[place.name].items()
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

    def _run(self, layer: DecoderLayer, hidden: Tensor, scheme: Scheme | None = None) -> Tensor:
        kv = _CentredKV.for_scheme(self.config, scheme, self.tokens.shape[0], self.model.device)
        out: Tensor = layer(hidden, layer.rope(kv.positions(self.tokens.shape[1])), kv)
        return out

    def _loss(self, place: Place, choice: LinearScheme | TensorSpec, hidden: Tensor, final: Tensor) -> float:
        """Mean KL(full || rounded) of the next token with `choice` at `place` alone."""
        layers = list(self.model.model.decoder_layers())
        if isinstance(choice, TensorSpec):
            hidden = self._run(layers[place.layer], hidden, replace(get_scheme("bf16"), **_cache(self.base, choice)))
        else:
            assert place.group is not None
            hidden = self._run_rounded(layers[place.layer], place.group, choice, hidden)
        for later in layers[place.layer + 1 :]:
            hidden = self._run(later, hidden)
        return self._divergence(hidden, final) / self.tokens.numel()

    def _run_rounded(self, layer: DecoderLayer, group: InputGroup, linear: LinearScheme, hidden: Tensor) -> Tensor:
        """What `layer` makes of `hidden` with the inputs of `group` and its linears rounded."""
        modules = [layer.get_submodule(name) for name in group.linears]
        weights = [layer.get_parameter(f"{name}.weight") for name in group.linears]
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
            with hooked({group.producer: round_input}, layer):
                return self._run(layer, hidden)
        finally:
            for module, weight in zip(modules, weights, strict=True):
                module.weight = weight

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
    context: int = CONTEXT,
) -> tuple[Scheme, Plan, list[Plan]]:
    """The scheme for a budget in bits, or for a largest loss in nats a token; the plan, and the whole frontier.

    tokens  [windows, length] of calibration text
    file    keeps what is measured: a stopped run goes on from there
    context see find_places
    Raises ValueError if neither or both limits are given, or the one that is cannot be met.
    """
    if (budget is None) == (max_loss is None):
        raise ValueError(f"give a budget in bits or a largest loss, one of them; got {budget} and {max_loss}")
    model = load_source(source, device, torch.float32)
    places, choices = find_places(model, base, context)
    losses = Sensitivity(model, base, tokens, file).measure(places, choices, progress)
    if budget is not None:
        plan = solve(places, losses, budget)
    else:
        assert max_loss is not None
        plan = solve_for_loss(places, losses, max_loss)
    return build_scheme(base, plan, places, choices), plan, frontier(places, losses)


class _CentredKV(DenseKV):
    """The dense cache, whose keys' centre is their mean in the very call."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, spec: AttentionSpec) -> Tensor:
        if self.centred:
            centre = rotation.apply(k.float()).mean(0)
            if self.rotates and self.scheme_kv is not None and self.scheme_kv.zero == "mean":
                moments = second_moments(rotation.apply(q.float()), k.shape[1])
                centre = torch.stack((centre, mirror_of(moments, is_rotated=True)))
            spec = replace(spec, key_centre=centre)
        return super().attend(layer, q, k, v, rotation, spec)


def _cache(base: Scheme, kv: TensorSpec) -> dict[str, Any]:
    """Fields of a scheme whose cache is `kv` and treats keys as that of `base`."""
    keys = {"kv_pre_rope": base.kv_pre_rope, "kv_offset": base.kv_offset, "kv_rotation": base.kv_rotation}
    return {"kv": kv, **keys}


def _rounded(weight: Tensor, linear: LinearScheme, perm: Tensor | None) -> nn.Parameter:
    """The weight [N, K] as it is read once rounded, its columns in their own order."""
    ordered = weight if perm is None else weight[:, perm]
    found = unrotate_input(dequantize_weight(quantize_weight(ordered, linear), linear), linear)
    return nn.Parameter(found if perm is None else found[:, invert(perm)], requires_grad=False)


def _bits(linear: LinearScheme, K: int, what: str) -> float:
    scheme = Scheme("bits", linear.weight, linear.activation, outliers=linear.outliers, reorder=linear.reorder)
    return scheme.weight_bits(K) if what == "weight" else scheme.activation_bits(K)
