"""Quantize one decoder layer: look at its inputs, permute, look again, round, and run what was written.

The third pass runs the quantized twin, built from exactly the tensors that go to disk, so that the next layer is
calibrated on what this one will really give it: errors of earlier layers are carried along.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from atom.errors import CheckpointError
from atom.kernels.registry import Kernels
from atom.models.layers import DecoderLayer
from atom.models.layout import KEY_CENTRE, KEY_OFFSET, layer_prefix
from atom.models.loader import load_layer_
from atom.models.model import Model, build_layer
from atom.models.quantized import quantize_layer_
from atom.models.source import Source
from atom.quant.mixed import MixedWeight, dequantize_weight, quantize_weight
from atom.quant.permutation import dealt_order, energy_order
from atom.quant.schemes import LinearScheme, Scheme
from atom.quant.stored import store_weight

from .balance import balance_layer_
from .clock import Clock, peak_gpu_bytes, peak_host_bytes
from .columns import ColumnRounder
from .config import CalibrationConfig
from .gptq import gptq
from .hidden import HiddenStates, LayerRunner
from .keys import KeyStatistics, fold_factors_, has_norms
from .latent import REST, rest_of
from .layer_record import input_record, linear_errors, relative_error, weight_error
from .observe import Sample, centre_on_sink_, observe_energies, observe_hessians, sample_outputs
from .plan import InputPlan, linear_of, plan_layer, unrotate_input
from .stats import HessianAccumulator
from .values import ValueStatistics, transform_values_

REFERENCE: Kernels = "reference"  # rounding that is the same on every device


@dataclass
class LayerQuantizer:
    """Quantizes decoder layers one after another; holds what they share."""

    source: Source
    model: Model  # on the meta device, in full precision: its shapes and its family
    scheme: Scheme
    config: CalibrationConfig
    device: torch.device
    clock: Clock
    runner: LayerRunner = field(init=False)
    rounder: ColumnRounder = field(default_factory=ColumnRounder)

    def __post_init__(self) -> None:
        self.runner = LayerRunner(self.model.config, self.device)

    def quantize(self, index: int, hidden: HiddenStates) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Quantize layer `index` and move `hidden` behind it.

        Returns the layer's tensors as the checkpoint holds them, and its entry in the report.
        """
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with self.clock.phase("io"):
            layer = self.load(index)
        plans = plan_layer(self.model.family, self.scheme, index)
        with self.clock.phase("stats"):
            energies, before, factors = self.prepare(layer, index, plans, hidden)
            for plan in plans:
                if plan.needs_order:
                    plan.perm = self._order(plan, energies[plan.group.name])
        permute_layer_(layer, plans)
        tensors, weight_errors, rests = self._round(layer, index, plans, hidden)
        with self.clock.phase("propagate"):
            self._swap(layer, tensors, index)
            centre_on_sink_(layer, index, hidden, self.runner, self.scheme)
            if layer.self_attn.key_centre is not None:
                tensors[f"{layer_prefix(index)}.{KEY_CENTRE}"] = layer.self_attn.key_centre
            after = self.propagate(layer, plans, hidden)
        record = {
            "layer": index,
            "output_error": relative_error(after.output, before.output),
            "linears": linear_errors(plans, before, after, weight_errors, factors),
            "inputs": {plan.group.name: input_record(plan, energies[plan.group.name]) for plan in plans},
            "peak_gpu_bytes": peak_gpu_bytes(self.device),
            "peak_host_bytes": peak_host_bytes(),
        }
        return tensors | rests, record

    def prepare(
        self, layer: DecoderLayer, index: int, plans: list[InputPlan], hidden: HiddenStates
    ) -> tuple[dict[str, Tensor], Sample, dict[str, Tensor]]:
        """Give the full-precision layer the form in which it is rounded, in place; what it computes stays the same.

        Returns the channel energies [K] of every input by its group's name, a sample of outputs, those of linears that
        keys and values changed as they are now, and the factors [N] of balance on rows of linears by name.
        """
        balances = bool(self.config.balance)
        values = ValueStatistics(self.model.config.num_kv_heads) if self.scheme.mirrors_keys else None
        energies, keys, before = observe_energies(layer, index, plans, hidden, self.runner, balances, values)
        if values is not None and self._transforms_values(plans):
            name, attention = "self_attn.v_proj", layer.self_attn
            matrix = values.matrix(attention.o_proj.weight)
            before.linears[name] = transform_values_(attention, matrix, before.linears[name])
        self._prepare_keys(layer, index, plans, keys, before)
        factors = self._balance(layer, index, plans, energies) if balances else {}
        return energies, before, factors

    def _prepare_keys(
        self, layer: DecoderLayer, index: int, plans: list[InputPlan], keys: KeyStatistics, before: Sample
    ) -> None:
        """Fold the keys' factors into the weights, and into the sample; set their mean or centre."""
        attention, centre = layer.self_attn, keys.centre
        mirrors = self.scheme.mirrors_keys
        mirror = keys.mirror() if mirrors else None
        if self.scheme.rotates_keys and self.config.balance_keys:
            is_shared = has_norms(attention)
            if mirrors:
                factors, mirror = keys.factors_and_mirror(is_shared)
            else:
                factors = keys.factors(is_shared)
            for name, rows in fold_factors_(attention, factors).items():
                before.linears[name] = before.linears[name] * rows
            centre = centre / torch.cat((factors, factors), -1)
            quantized = {f"{name}.weight" for plan in plans if plan.is_quantized for name in plan.group.linears}
            for name, parameter in layer.named_parameters():  # what is stored as it is runs as it is stored
                if name not in quantized:
                    parameter.data = parameter.data.to(self.source.dtype(f"{layer_prefix(index)}.{name}")).float()
        if self.scheme.stores_key_offset:
            attention.key_offset = keys.mean.to(torch.bfloat16)
        if self.scheme.stores_key_centre:
            attention.key_centre = centre if mirror is None else torch.stack((centre, mirror))

    def _transforms_values(self, plans: list[InputPlan]) -> bool:
        """Values were turned, and o takes them as they are."""
        is_rounded = any(p.linear.activation is not None for p in plans if "self_attn.o_proj" in p.group.linears)
        return self.config.rotate != "none" and not is_rounded

    def load(self, index: int) -> DecoderLayer:
        """The full-precision layer in float32 on the device. Raises CheckpointError naming a tensor that is NaN."""
        layer = self._empty(index)
        state = {}
        for name, _ in layer.named_parameters():  # their names and shapes were compared with the source's before
            full = f"{layer_prefix(index)}.{name}"
            state[name] = self.source.get(full).to(self.device).float()  # widened on the device: half the bytes travel
            if not bool(torch.isfinite(state[name]).all()):
                raise CheckpointError(
                    f"{full} holds NaN or infinity; quantization needs finite weights: "
                    "download the model again, or start from another checkpoint"
                )
        layer.load_state_dict(state, assign=True)
        return layer.requires_grad_(False)

    def rerun(self, index: int, written: Source, hidden: HiddenStates) -> None:
        """Move `hidden` behind a layer that an earlier run has quantized and written."""
        layer = self._empty(index)
        self.model.scheme = self.scheme
        load_layer_(layer, self.model, written, index, self.device, torch.float32, REFERENCE)
        self.model.scheme = None
        self.propagate(layer.requires_grad_(False), plan_layer(self.model.family, self.scheme, index), hidden)

    def _empty(self, index: int) -> DecoderLayer:
        with torch.device("meta"):
            return build_layer(self.model.config, index)

    def propagate(self, layer: DecoderLayer, plans: list[InputPlan], hidden: HiddenStates) -> Sample:
        """Run the quantized layer over all batches, replacing `hidden`; a sample of its outputs."""
        sample = sample_outputs(layer, plans, hidden, self.runner, self.scheme)
        hidden.put(0, sample.output)
        for number in range(1, len(hidden)):
            hidden.put(number, self.runner.run(layer, hidden, number, self.scheme))
        return sample

    def _swap(self, layer: DecoderLayer, tensors: dict[str, Tensor], index: int) -> None:
        quantize_layer_(layer, self.model.family, self.scheme, tensors, layer_prefix(index), REFERENCE)

    def _balance(
        self, layer: DecoderLayer, index: int, plans: list[InputPlan], energies: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        norm = f"{layer_prefix(index)}.{plans[0].group.producer}.weight"
        return balance_layer_(layer, plans, energies, self.source.dtype(norm))

    def _order(self, plan: InputPlan, energy: Tensor) -> Tensor:
        rotation = plan.linear.rotation
        if self.config.order == "ascending" or rotation is None or rotation.kind != "block_hadamard":
            return energy_order(energy)
        return dealt_order(energy, rotation.block, plan.linear.outliers.count)

    def _round(
        self, layer: DecoderLayer, index: int, plans: list[InputPlan], hidden: HiddenStates
    ) -> tuple[dict[str, Tensor], dict[str, float], dict[str, Tensor]]:
        """All tensors of the layer as the checkpoint holds them, and the relative error of each quantized weight.

        Where codes are to be trained, also what rounding left of each weight, by the name that distillation reads. With
        true_sequential the layer's own weights become the rounded ones, input group by input group, and each group's
        Hessian is that of what the rounded ones before it give.
        """
        prefix = f"{layer_prefix(index)}."
        tensors: dict[str, Tensor] = {}
        errors: dict[str, float] = {}
        rests: dict[str, Tensor] = {}
        keeps_rests = self.config.distill_codes and bool(self.config.distill_steps)
        in_turn = self.config.gptq and self.config.true_sequential
        hessians = self._observe(layer, index, plans, hidden) if self.config.gptq and not in_turn else {}
        for plan in plans:
            if not plan.is_quantized:
                continue
            if in_turn:
                hessians = self._observe(layer, index, plans, hidden, plan.group.name)
            with self.clock.phase("gptq"):
                for name, found in self._round_group(layer, plan, hessians, prefix).items():
                    linear, weight = plan.schemes[name], linear_of(layer, name).weight
                    errors[name] = weight_error(weight, found, linear)
                    for part, tensor in store_weight(found, linear).items():
                        tensors[f"{prefix}{name}.{part}"] = tensor
                    if keeps_rests and (rest := rest_of(weight, found, linear)) is not None:
                        rests[f"{prefix}{name}.{REST}"] = rest
                    if plan.perm is not None and plan.group.is_gathered:
                        tensors[f"{prefix}{name}.input_perm"] = plan.perm.to(torch.int32)
                    if in_turn:
                        weight.copy_(unrotate_input(dequantize_weight(found, linear), linear))
        if layer.self_attn.key_offset is not None:
            tensors[prefix + KEY_OFFSET] = layer.self_attn.key_offset
        if layer.self_attn.key_centre is not None:
            tensors[prefix + KEY_CENTRE] = layer.self_attn.key_centre
        quantized = {f"{name}.weight" for name in errors}
        for name, parameter in layer.named_parameters():
            if name not in quantized:
                tensors[prefix + name] = parameter.detach().to(self.source.dtype(prefix + name))
        return tensors, errors, rests

    def _observe(
        self, layer: DecoderLayer, index: int, plans: list[InputPlan], hidden: HiddenStates, only: str | None = None
    ) -> dict[str, HessianAccumulator]:
        with self.clock.phase("hessian"):
            return observe_hessians(layer, index, plans, hidden, self.runner, self.scheme, only)

    def _round_group(
        self, layer: DecoderLayer, plan: InputPlan, hessians: dict[str, HessianAccumulator], prefix: str
    ) -> dict[str, MixedWeight]:
        """The rounded weights of one input group's linears by name; its Hessian is spent."""
        accumulator = hessians.pop(plan.group.name, None)
        H = None if accumulator is None else accumulator.finish()
        rounded: dict[str, MixedWeight] = {}
        for linear, names in _by_scheme(plan).items():
            weights = [linear_of(layer, name).weight for name in names]
            own = H.clone() if H is not None and len(set(plan.schemes.values())) > 1 else H
            found = self._round_weights(weights, own, linear, [prefix + name for name in names])
            rounded.update(zip(names, found, strict=True))
        return rounded

    def _round_weights(
        self, weights: list[Tensor], H: Tensor | None, linear: LinearScheme, names: list[str]
    ) -> list[MixedWeight]:
        if H is None:
            return [quantize_weight(w, linear, name) for w, name in zip(weights, names, strict=True)]
        config = self.config
        return gptq(
            weights, H, linear, config.damping, ", ".join(names), self.rounder, config.scale_search, config.act_order
        )


def permute_layer_(layer: DecoderLayer, plans: list[InputPlan]) -> None:
    """Sort the columns of every linear as its input is sorted, and the rows of those that carry another's order."""
    for plan in plans:
        if plan.perm is None:
            continue
        for name in plan.group.linears:
            linear = linear_of(layer, name)
            linear.weight = nn.Parameter(linear.weight[:, plan.perm], requires_grad=False)
        for name in plan.group.fold_into_rows:
            linear = linear_of(layer, name)
            linear.weight = nn.Parameter(linear.weight[plan.perm], requires_grad=False)
            if linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias[plan.perm], requires_grad=False)


def _by_scheme(plan: InputPlan) -> dict[LinearScheme, list[str]]:
    found: dict[LinearScheme, list[str]] = {}
    for name, linear in plan.schemes.items():
        found.setdefault(linear, []).append(name)
    return found
