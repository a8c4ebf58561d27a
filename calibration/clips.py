"""How far activation grids reach, chosen for the model at hand by the output error of its linears.

The constants of the paper fit Llama. Here some text runs through the full-precision model, layer by layer, and the
input of every linear is rounded at each of some clips, its weight left as it is. What counts is how far that moves the
linear's output, token by token and relative to the token's own output: behind some layers the first token of a window
is a hundred times louder than the others, and would decide alone.

What the gate lets through is not clipped, whatever the error of down_proj says: there each token's largest values are
what it has to say. On Qwen2.5-Coder-0.5B a clip of 0.85 lowers that error by a fifth and raises perplexity by 3 to 4 %
(docs/accuracy-steps.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from atom.models.family import InputGroup
from atom.models.layers import DecoderLayer
from atom.models.layout import layer_prefix
from atom.models.model import Model
from atom.quant.mixed import fake_quantize_activation
from atom.quant.permutation import energy_order
from atom.quant.schemes import LinearScheme, Override, Scheme

from .hidden import HiddenStates, LayerRunner
from .observe import Hook, hooked, input_name
from .plan import InputPlan, plan_layer, unrotate_input
from .stats import EnergyAccumulator

CANDIDATES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
PROBE_TOKENS = 2048  # at most, and no more than about a sixth of the calibration text
PROBE_LENGTH = 128  # of a window, at most: many short ones are more of the text than one long one


@dataclass(frozen=True)
class Measured:
    """What was chosen, and from what.

    chosen   the clip of each input group
    errors   ||Q(x) W^T - x W^T||^2 / ||x W^T||^2 of each group and candidate, mean over tokens and layers
    tokens   of text that it is a mean over
    """

    chosen: dict[str, float]
    errors: dict[str, dict[str, float]]
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return {"chosen": self.chosen, "errors": self.errors, "tokens": self.tokens}

    def apply(self, scheme: Scheme, groups: tuple[InputGroup, ...]) -> Scheme:
        """`scheme` with the chosen clips as overrides, behind its own."""
        assert scheme.activation is not None
        found = [
            Override(f"*.{linear}", _clipped(scheme.default_linear, self.chosen[group.name]))
            for group in groups
            if self.chosen.get(group.name, scheme.activation.clip) != scheme.activation.clip
            for linear in group.linears
        ]
        return replace(scheme, overrides=(*scheme.overrides, *found))


def measured_groups(model: Model, scheme: Scheme) -> tuple[InputGroup, ...]:
    """The kinds of input whose clip is to be measured: all if the scheme clips activations, else none.

    Behind a Hadamard block no channel is loud and a clip changes little: the scheme's own stays. A kind that the
    scheme's own overrides touch in any layer keeps the clips that the scheme gives it.
    """
    if scheme.activation is None or scheme.activation.clip == 1.0 or scheme.rotation is not None:
        return ()
    names = [layer_prefix(index) for index in range(model.config.num_layers)]
    return tuple(
        group
        for group in model.family.groups
        if all(scheme.for_linear(f"{n}.{linear}") == scheme.default_linear for n in names for linear in group.linears)
    )


def probe_windows(tokens: Tensor) -> Tensor:
    """The first windows of the calibration text, cut up: at least one window, at most PROBE_TOKENS tokens.

    tokens [windows, length] -> [n, PROBE_LENGTH or what is left of shorter windows]
    """
    count, length = tokens.shape
    short = min(length, PROBE_LENGTH)
    pieces = tokens[:, : length // short * short].reshape(-1, short)
    return pieces[: max(1, min(PROBE_TOKENS, count * length // 6) // short)]


def probe_tokens(windows: int, window_length: int) -> int:
    """How many tokens `probe_windows` takes of so many windows."""
    return probe_windows(torch.empty(windows, window_length, device="meta")).numel()


@dataclass
class ClipProbe:
    """Measures the output errors of all linears at all candidates.

    model    on the meta device
    scheme   before anything is measured
    runner   runs layers over hidden states, with a cache in full precision
    """

    model: Model
    scheme: Scheme
    runner: LayerRunner
    groups: tuple[InputGroup, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.groups = measured_groups(self.model, self.scheme)

    def measure(self, hidden: HiddenStates, layers: Iterator[DecoderLayer]) -> Measured:
        """The clips for `hidden`, the embedded probe windows (spent), run through the full-precision `layers`."""
        sums = {group.name: [0.0] * len(CANDIDATES) for group in self.groups}
        depth = self.model.config.num_layers
        for index, layer in enumerate(layers):
            plans = [p for p in plan_layer(self.model.family, self.scheme, index) if p.group in self.groups]
            inputs = self._run(layer, plans, hidden)
            for plan in plans:
                found = output_errors(plan, index, inputs.pop(plan.group.name), layer)
                sums[plan.group.name] = [a + b / depth for a, b in zip(sums[plan.group.name], found, strict=True)]
        errors = {
            name: {str(clip): float(f"{e:.5g}") for clip, e in zip(CANDIDATES, found, strict=True)}
            for name, found in sums.items()
        }
        chosen = {group.name: _choose(group, sums[group.name]) for group in self.groups}
        return Measured(chosen, errors, hidden.tokens)

    def _run(self, layer: DecoderLayer, plans: list[InputPlan], hidden: HiddenStates) -> dict[str, Tensor]:
        """Move `hidden` behind the layer; the input [T, K] of every plan's linears, by the group's name."""
        seen: dict[str, list[Tensor]] = {plan.group.name: [] for plan in plans}

        def watch(plan: InputPlan) -> Hook:
            def hook(module: nn.Module, args: Any, x: Tensor) -> None:
                seen[plan.group.name].append(x)

            return hook

        with hooked({plan.group.producer: watch(plan) for plan in plans}, layer):
            for number in range(len(hidden)):
                hidden.put(number, self.runner.run(layer, hidden, number, None))
        return {name: torch.cat(parts) for name, parts in seen.items()}


def output_errors(plan: InputPlan, index: int, x: Tensor, layer: DecoderLayer) -> list[float]:
    """For each candidate, how far rounding the input x [T, K] moves the output of the plan's linears.

    ||Q(x) W^T - x W^T||^2 / ||x W^T||^2, mean over tokens. Raises CalibrationError where x is not finite.
    """
    energy = EnergyAccumulator(x.shape[-1], x.device, input_name(plan, index))
    energy.add(x)
    weight = torch.cat([layer.get_parameter(f"{name}.weight") for name in plan.group.linears])
    energies = energy.mean()
    if plan.needs_order:
        perm = energy_order(energies)
        x, weight = x[:, perm], weight[:, perm]
    size = (x @ weight.T).square().sum(1).clamp_min(1e-30)  # [T]
    errors = []
    for clip in CANDIDATES:
        linear = _clipped(plan.linear, clip)
        moved = (unrotate_input(fake_quantize_activation(x, linear), linear) - x) @ weight.T
        errors.append(float((moved.square().sum(1) / size).mean()))
    return errors


def _choose(group: InputGroup, errors: list[float]) -> float:
    """The candidate with the least error; 1.0 for the gated product, whose order the rows of gate and up carry."""
    return 1.0 if group.fold_into_rows else CANDIDATES[errors.index(min(errors))]


def _clipped(linear: LinearScheme, clip: float) -> LinearScheme:
    assert linear.activation is not None
    return replace(linear, activation=replace(linear.activation, clip=clip))
