"""The two looks at a layer's inputs: their energies in full precision, their Hessians once they are rounded.

Both hang forward hooks on the producers that the family names. For the report the first look also keeps what the
layer and its linears give for a few tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from atom.models.layers import DecoderLayer
from atom.models.layout import layer_prefix
from atom.quant.mixed import fake_quantize_activation
from atom.quant.schemes import Scheme

from .hidden import HiddenStates, LayerRunner
from .keys import KeyStatistics, centre_on_sink
from .plan import InputPlan, unrotate_input
from .stats import EnergyAccumulator, HessianAccumulator
from .values import ValueStatistics, attention_paid

SAMPLE_TOKENS = 1024  # of the first batch, over which the report compares outputs

Hook = Callable[[nn.Module, Any, Tensor], Tensor | None]


@dataclass
class Sample:
    """Outputs for the first tokens: of the layer [T, hidden_size], and of its linears [T, N] by name."""

    output: Tensor = field(default_factory=lambda: torch.empty(0))
    linears: dict[str, Tensor] = field(default_factory=dict)


def observe_energies(
    layer: DecoderLayer,
    index: int,
    plans: list[InputPlan],
    hidden: HiddenStates,
    runner: LayerRunner,
    all_batches: bool = False,
    values: ValueStatistics | None = None,
) -> tuple[dict[str, Tensor], KeyStatistics, Sample]:
    """Run the full-precision layer: channel energies [K] of every input group, what keys and queries are like, and a
    sample of its outputs.

    `values`, where they are wanted, see those of the first batch; with them come second moments of keys and queries.
    All batches run if an input is to be reordered, or if asked for, else only the first, which the report wants.
    """
    energies: dict[str, EnergyAccumulator] = {}
    keys = KeyStatistics(layer.rope, hidden.length, hidden.device, 0 if values is None else values.num_kv_heads)
    seen: dict[str, Tensor] = {}  # of a batch whose values are wanted: those, then queries, before keys come

    def watch_values(module: nn.Module, args: Any, v: Tensor) -> None:
        if values is not None and values.is_empty:
            seen["v"] = v

    def watch_queries(module: nn.Module, args: Any, q: Tensor) -> None:
        keys.add_queries(q)
        if "v" in seen:
            seen["q"] = q

    def watch_keys(module: nn.Module, args: Any, k: Tensor) -> None:
        keys.add_keys(k)
        if values is not None and "v" in seen:
            rotation = layer.rope(torch.arange(hidden.length, device=k.device))
            values.add(seen.pop("v"), attention_paid(seen.pop("q"), k, rotation, layer.self_attn.rules))

    def watch(plan: InputPlan) -> Hook:
        name = plan.group.name

        def hook(module: nn.Module, args: Any, x: Tensor) -> None:
            if name not in energies:
                where = input_name(plan, index)
                energies[name] = EnergyAccumulator(x.shape[-1], x.device, where)
            energies[name].add(x)

        return hook

    watched = {plan.group.producer: watch(plan) for plan in plans}
    heads: dict[str, Hook] = {"self_attn.q_norm": watch_queries, "self_attn.k_norm": watch_keys}
    with hooked({**watched, **heads, "self_attn.v_proj": watch_values}, layer):
        sample = sample_outputs(layer, plans, hidden, runner, None)
        if all_batches or any(plan.needs_order for plan in plans):
            with stopped_after(plans[-1].group.producer, layer):
                for number in range(1, len(hidden)):
                    with suppress(_SeenEnough):
                        runner.run(layer, hidden, number, None)
    return {name: energy.mean() for name, energy in energies.items()}, keys, sample


def observe_hessians(
    layer: DecoderLayer,
    index: int,
    plans: list[InputPlan],
    hidden: HiddenStates,
    runner: LayerRunner,
    scheme: Scheme,
    only: str | None = None,
) -> dict[str, HessianAccumulator]:
    """Run the permuted layer on rounded inputs: the Hessian accumulator of every quantized input group.

    only  the one group that is wanted; the layer runs no further than its input
    """
    hessians: dict[str, HessianAccumulator] = {}

    def watch(plan: InputPlan) -> Hook:
        name = plan.group.name

        def hook(module: nn.Module, args: Any, x: Tensor) -> Tensor:
            if plan.perm is not None and plan.group.is_gathered:
                x = x[..., plan.perm]
            rounded = fake_quantize_activation(x, plan.linear)
            if only in (None, name):
                if name not in hessians:
                    where = input_name(plan, index)
                    hessians[name] = HessianAccumulator(x.shape[-1], x.device, where)
                hessians[name].add(rounded)
            return unrotate_input(rounded, plan.linear)

        return hook

    watched = {plan.group.producer: watch(plan) for plan in plans if plan.is_quantized}
    if not watched:
        return hessians
    last = list(watched)[-1] if only is None else next(p.group.producer for p in plans if p.group.name == only)
    with hooked(watched, layer), stopped_after(last, layer):
        for number in range(len(hidden)):
            with suppress(_SeenEnough):
                runner.run(layer, hidden, number, scheme)
    return hessians


def first_keys(layer: DecoderLayer, hidden: HiddenStates, runner: LayerRunner) -> Tensor:
    """The mean key after RoPE of the first token of every window, float32 [num_kv_heads, head_dim]."""
    found: list[Tensor] = []

    def watch(module: nn.Module, args: Any, k: Tensor) -> None:
        found.append(layer.rope(torch.zeros(len(k), dtype=torch.int64, device=k.device)).apply(k.float()).mean(0))

    with hooked({"self_attn.k_norm": watch}, layer), stopped_after("self_attn.k_norm", layer), suppress(_SeenEnough):
        runner.run(layer, hidden.first_tokens(), 0, None)
    return found[0]


def centre_on_sink_(layer: DecoderLayer, index: int, hidden: HiddenStates, runner: LayerRunner, scheme: Scheme) -> None:
    """Move the centre of the layer's keys, where it has one, by the error that `scheme` leaves sequences' first key."""
    centre = layer.self_attn.key_centre
    if centre is not None:
        layer.self_attn.key_centre = centre_on_sink(centre, first_keys(layer, hidden, runner), scheme, index)


def sample_outputs(
    layer: DecoderLayer, plans: list[InputPlan], hidden: HiddenStates, runner: LayerRunner, scheme: Scheme | None
) -> Sample:
    """Run the first batch and keep what the layer and its linears give for its first tokens."""
    sample = Sample()

    def keep(name: str) -> Hook:
        def hook(module: nn.Module, args: Any, y: Tensor) -> None:
            sample.linears[name] = y[:SAMPLE_TOKENS].clone()

        return hook

    with hooked({name: keep(name) for plan in plans for name in plan.group.linears}, layer):
        sample.output = runner.run(layer, hidden, 0, scheme)
    return sample


def input_name(plan: InputPlan, index: int) -> str:
    """How messages call an input: by its producer, and the linears that take it."""
    return f"{layer_prefix(index)}.{plan.group.producer} (input of {', '.join(plan.group.linears)})"


class _SeenEnough(Exception):  # noqa: N818  no error: the last input was seen, the linear behind it need not run
    pass


@contextmanager
def stopped_after(producer: str, layer: nn.Module) -> Iterator[None]:
    """Leave every run of the layer once `producer` and its hooks have run: a quarter of the products is saved."""

    def stop(module: nn.Module, args: Any, x: Tensor) -> None:
        raise _SeenEnough

    with hooked({producer: stop}, layer):
        yield


@contextmanager
def hooked(hooks: dict[str, Hook], layer: nn.Module) -> Iterator[None]:
    """Forward hooks on modules of the layer by name, taken off at the end."""
    handles = [layer.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
