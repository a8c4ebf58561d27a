"""How far activation grids reach, chosen for the model at hand by what clipping does to its predictions.

The constants of the paper fit Llama. Here the whole model is asked, one kind of input at a time: some text runs through
it several times at once, layer by layer, weights and other inputs in full precision, with the inputs of one kind
rounded at one of the candidate clips. What counts is the divergence of the next token's distribution from full
precision.

Two things keep chance small. Only one kind is rounded at a time: with all of them rounded, the noise of the others
drowns the difference. And the text is cut into many short windows: an error in a window's first token, on which all
others attend, is shared by the whole window, so that windows count and not tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as product

from atom.models.family import InputGroup
from atom.models.layers import DecoderLayer, norm
from atom.models.layout import layer_prefix
from atom.models.model import Model
from atom.models.source import Source
from atom.quant.mixed import fake_quantize_activation
from atom.quant.permutation import energy_order
from atom.quant.schemes import LinearScheme, Override, Scheme

from .hidden import HiddenStates, LayerRunner
from .observe import Hook, hooked, input_name
from .plan import InputPlan, plan_layer, unrotate_input
from .stats import EnergyAccumulator

CANDIDATES = (1.0, 0.9, 0.8)
PROBE_TOKENS = 2048  # at most, and no more than about a sixth of the calibration text
PROBE_LENGTH = 128  # of a window, at most
LOGITS_BYTES = 128 * 2**20  # of one chunk of float32 logits

Variant = tuple[str, float]  # the input group that is rounded, and at which clip


@dataclass(frozen=True)
class Measured:
    """What was chosen, and from what.

    chosen       the clip of each input group
    divergence   mean KL(full precision || that group rounded at that clip) in nats a token
    tokens       that it is a mean over
    """

    chosen: dict[str, float]
    divergence: dict[str, dict[str, float]]
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return {"chosen": self.chosen, "divergence": self.divergence, "tokens": self.tokens}

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

    A kind that the scheme's own overrides touch in any layer keeps the clips that the scheme gives it.
    """
    if scheme.activation is None or scheme.activation.clip == 1.0:
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
    """Runs all variants of a model side by side through one layer after another.

    source, model   the full-precision weights; the model on the meta device
    scheme          before anything is measured
    runner          runs layers over hidden states, with a cache in full precision
    """

    source: Source
    model: Model
    scheme: Scheme
    runner: LayerRunner
    device: torch.device
    groups: tuple[InputGroup, ...] = field(init=False)
    variants: list[Variant] = field(init=False)

    def __post_init__(self) -> None:
        self.groups = measured_groups(self.model, self.scheme)
        self.variants = [(group.name, clip) for group in self.groups for clip in CANDIDATES]

    def measure(self, hidden: HiddenStates, layers: Iterator[DecoderLayer]) -> Measured:
        """The clips for `hidden`, the embedded probe windows, run through the full-precision `layers`."""
        states = [hidden.copy() for _ in self.variants]
        for index, layer in enumerate(layers):
            plans = plan_layer(self.model.family, self.scheme, index)
            self._run_exact(layer, index, plans, hidden)
            by_name = {plan.group.name: plan for plan in plans}
            for (name, clip), state in zip(self.variants, states, strict=True):
                with hooked({by_name[name].group.producer: _round(by_name[name], clip)}, layer):
                    self._run(layer, state)
        return self._choose(hidden, states)

    def _run(self, layer: DecoderLayer, hidden: HiddenStates) -> None:
        for number in range(len(hidden)):
            hidden.put(number, self.runner.run(layer, hidden, number, None))

    def _run_exact(self, layer: DecoderLayer, index: int, plans: list[InputPlan], hidden: HiddenStates) -> None:
        """Run the layer as it is; the order of every input that the scheme sorts goes into its plan."""
        energies: dict[str, EnergyAccumulator] = {}

        def watch(plan: InputPlan) -> Hook:
            def hook(module: nn.Module, args: Any, x: Tensor) -> None:
                name = plan.group.name
                if name not in energies:
                    energies[name] = EnergyAccumulator(x.shape[-1], x.device, input_name(plan, index))
                energies[name].add(x)

            return hook

        with hooked({plan.group.producer: watch(plan) for plan in plans if plan.needs_order}, layer):
            self._run(layer, hidden)
        for plan in plans:
            if plan.needs_order:
                plan.perm = energy_order(energies[plan.group.name].mean())

    def _choose(self, exact: HiddenStates, states: list[HiddenStates]) -> Measured:
        logits = self._head()
        totals = [0.0] * len(states)
        tokens = 0
        for number in range(len(exact)):
            wanted = exact.get(number)
            rows = max(1, LOGITS_BYTES // (4 * self.model.config.vocab_size))
            for start in range(0, len(wanted), rows):
                part = slice(start, start + rows)
                expected = logits(wanted[part]).log_softmax(-1)
                for variant, state in enumerate(states):
                    found = logits(state.get(number)[part]).log_softmax(-1)
                    totals[variant] += float((expected.exp() * (expected - found)).sum(dtype=torch.float64))
            tokens += len(wanted)
        means = {variant: total / tokens for variant, total in zip(self.variants, totals, strict=True)}
        divergence = {g.name: {str(clip): means[g.name, clip] for clip in CANDIDATES} for g in self.groups}
        chosen = {name: float(min(found, key=found.__getitem__)) for name, found in divergence.items()}
        rounded = {name: {k: float(f"{v:.5g}") for k, v in found.items()} for name, found in divergence.items()}
        return Measured(chosen, rounded, tokens)

    def _head(self) -> Callable[[Tensor], Tensor]:
        """Final hidden states [T, hidden_size] -> logits [T, vocab_size], float32."""
        last = norm(self.model.config).to(self.device)
        last.load_state_dict({"weight": self.source.get("model.norm.weight").to(self.device).float()})
        name = "model.embed_tokens.weight" if self.model.lm_head is None else "lm_head.weight"
        head = self.source.get(name).to(self.device).float()
        cap = self.model.config.logit_soft_cap

        def logits(hidden: Tensor) -> Tensor:
            scores = product(last(hidden), head)
            return scores if cap is None else cap * torch.tanh(scores / cap)

        return logits


def _clipped(linear: LinearScheme, clip: float) -> LinearScheme:
    assert linear.activation is not None
    return replace(linear, activation=replace(linear.activation, clip=clip))


def _round(plan: InputPlan, clip: float) -> Hook:
    """Round what the plan's producer gives, and put it back in order."""
    linear = _clipped(plan.linear, clip)
    perm = plan.perm
    inverse = None if perm is None else torch.argsort(perm)

    def hook(module: nn.Module, args: Any, x: Tensor) -> Tensor:
        rounded = fake_quantize_activation(x if perm is None else x[..., perm], linear)
        found = unrotate_input(rounded, linear)
        return found if inverse is None else found[..., inverse]

    return hook
