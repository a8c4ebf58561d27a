"""What a choice of formats loses at one place: the divergence of the model's predictions, measured, kept in a file."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atom.models.family import InputGroup
from atom.models.kv import DenseKV
from atom.models.layers import DecoderLayer
from atom.models.model import Model
from atom.models.source import Source
from atom.quant.mixed import dequantize_weight, fake_quantize_activation, quantize_weight
from atom.quant.permutation import energy_order, invert
from atom.quant.presets import get_scheme
from atom.quant.schemes import LinearScheme, Scheme, TensorSpec

from .config import CalibrationConfig
from .hidden import HiddenStates, LayerRunner
from .observe import centre_on_sink_, hooked
from .places import Choices, Losses, Place
from .plan import unrotate_input

FORM = 2  # of kept losses: those of another were measured otherwise
KEPT_LOGITS = 2**30  # log probabilities of full precision that are kept, on a GPU: 4 GiB


def losses_file(output: Path, source: Source, base: Scheme, text: str, config: CalibrationConfig) -> Path:
    """Where the losses for a checkpoint at `output` are kept: a file OUT.sensitivity-*.json for whatever they hang on.

    That is the model, how the base's cache treats keys, the form in which it is rounded, and the text (the hash of its
    tokens). All choices of weights and activations are the same for every base.
    """
    config = config.for_scheme(base)
    form = [config.balance, config.balance_keys, config.rotate, config.seed]
    known = [FORM, dict(source.provenance), dict(source.config), _keys_of(base), form, text]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
    return output.with_name(f"{output.name}.sensitivity-{digest[:8]}.json")


def kept_losses(file: Path) -> Losses:
    """What an earlier run has measured, of all places or some; nothing where there is no file."""
    found: Losses = json.loads(file.read_text()) if file.exists() else {}
    return found


class Sensitivity:
    """Measures what every choice at every place loses; what is measured is kept in a file and not measured again.

    model   in full precision, on the device, in the form in which it is rounded (prepared.py)
    base    how its cache treats keys
    tokens  [windows, length] of calibration text
    """

    def __init__(self, model: Model, base: Scheme, tokens: Tensor, file: Path) -> None:
        self.model = model
        self.base = base
        self.tokens = tokens.to(model.device)
        self.file = file
        self.losses = kept_losses(file)
        self.config = model.config
        self.layers = list(model.model.decoder_layers())
        self.runner = LayerRunner(model.config, model.device)
        on_gpu = model.device.type == "cuda"
        self._together = 2**16 if on_gpu else 2**13  # tokens that run through layers at once
        self._logits = 2**28 if on_gpu else 2**26  # elements of a block of logits: 1 GiB, 256 MiB
        self._keeps = on_gpu and tokens.numel() * model.config.vocab_size <= KEPT_LOGITS
        self._kept: dict[int, Tensor] = {}  # first token -> log probabilities [rows, vocab_size]

    @torch.no_grad()
    def measure(
        self,
        places: list[Place],
        choices: Choices,
        progress: Callable[[int, int], None] | None = None,
    ) -> Losses:
        """The losses of all choices; `progress` is told (places done, places in all)."""
        if all(place.name in self.losses for place in places):
            return self.losses
        inputs = list(self._inputs())
        final = inputs.pop()
        for number, place in enumerate(places):
            if place.name not in self.losses:
                self.losses[place.name] = self._measure_place(place, choices[place.name], inputs[place.layer], final)
                partial = self.file.with_suffix(".partial")
                partial.write_text(json.dumps(self.losses))
                partial.replace(self.file)
            if progress is not None:
                progress(number + 1, len(places))
        return self.losses

    def _inputs(self) -> Iterator[Tensor]:
        """What enters each layer [T, hidden_size], and what the last one gives."""
        hidden = self.model.model.embed(self.tokens.flatten())
        for layer in self.layers:
            yield hidden
            hidden = self._run([layer], hidden)
        yield hidden

    def _run(self, layers: Sequence[DecoderLayer], hidden: Tensor, scheme: Scheme | None = None) -> Tensor:
        """Hidden states [several T, hidden_size] behind `layers`, of the same texts several times over."""
        length = self.tokens.shape[1]
        batch = hidden.shape[0] // length
        rotations = self.model.model.rotations(torch.arange(length, device=hidden.device).repeat(batch))
        for layer in layers:
            kv = DenseKV.for_scheme(self.config, scheme, batch, hidden.device)
            hidden = layer(hidden, rotations[layer.rope.config], kv)
        return hidden

    def _measure_place(
        self, place: Place, choices: Mapping[str, LinearScheme | TensorSpec], hidden: Tensor, final: Tensor
    ) -> dict[str, float]:
        """Mean KL(full || rounded) of the next token with each choice at `place` alone, by its name.

        hidden [T, hidden_size] enters the place's layer, final [T, hidden_size] is what the last layer gives. Layers
        behind the place see the states of several choices as one batch.
        """
        layer, later = self.layers[place.layer], self.layers[place.layer + 1 :]
        sums: list[Tensor] = []
        several = max(1, self._together // hidden.shape[0])
        known = list(choices.values())
        for start in range(0, len(known), several):
            states = [self._behind(layer, place, choice, hidden) for choice in known[start : start + several]]
            found = self._run(later, torch.cat(states))
            sums += [self._divergence(part, final) for part in found.chunk(len(states))]
        means = torch.stack(sums).div(self.tokens.numel()).clamp(min=0.0).tolist()
        return dict(zip(choices, means, strict=True))

    def _behind(self, layer: DecoderLayer, place: Place, choice: LinearScheme | TensorSpec, hidden: Tensor) -> Tensor:
        """What `layer` makes of `hidden` with `choice` at `place`."""
        if isinstance(choice, TensorSpec):
            return self._run_cached(
                layer, place.layer, replace(get_scheme("bf16"), **_cache(self.base, choice)), hidden
            )
        assert place.group is not None
        return self._run_rounded(layer, place.group, choice, hidden)

    def _run_cached(self, layer: DecoderLayer, index: int, scheme: Scheme, hidden: Tensor) -> Tensor:
        """What `layer` makes of `hidden` with its keys and values in the cache of `scheme`."""
        attention, centre = layer.self_attn, layer.self_attn.key_centre
        texts = HiddenStates(hidden.view(*self.tokens.shape, -1), len(self.tokens), hidden.device)
        try:
            centre_on_sink_(layer, index, texts, self.runner, scheme)
            return self._run([layer], hidden, scheme)
        finally:
            attention.key_centre = centre

    def _run_rounded(self, layer: DecoderLayer, group: InputGroup, linear: LinearScheme, hidden: Tensor) -> Tensor:
        """What `layer` makes of `hidden` with the inputs of `group` and its linears rounded."""
        modules = [layer.get_submodule(name) for name in group.linears]
        weights: list[Tensor] = [layer.get_parameter(f"{name}.weight") for name in group.linears]

        def round_input(module: nn.Module, args: Any, x: Tensor) -> Tensor:
            perm = energy_order(x.square().mean(0)) if linear.reorder else None
            rounded = _rounded(torch.cat(weights), linear, perm).split([len(weight) for weight in weights])
            for module_, weight in zip(modules, rounded, strict=True):
                module_.weight = nn.Parameter(weight, requires_grad=False)
            back: Tensor = unrotate_input(fake_quantize_activation(x if perm is None else x[:, perm], linear), linear)
            return back if perm is None else back[:, invert(perm)]

        try:
            with hooked({group.producer: round_input}, layer):
                return self._run([layer], hidden)
        finally:
            for module, weight in zip(modules, weights, strict=True):
                module.weight = weight

    def _divergence(self, found: Tensor, exact: Tensor) -> Tensor:
        """The sum over tokens of KL(full || rounded), of what the last layer gives, in nats: a scalar."""
        rows = max(1, self._logits // self.config.vocab_size)
        total = torch.zeros((), device=found.device)
        for start in range(0, found.shape[0], rows):
            rounded = self._log_probabilities(found[start : start + rows])
            wanted = self._exact(exact, start, rows)
            total += nn.functional.kl_div(rounded, wanted, reduction="sum", log_target=True)
        return total

    def _exact(self, final: Tensor, start: int, rows: int) -> Tensor:
        """Full precision's log probabilities [rows, vocab_size] of the tokens from `start` on; kept where they fit."""
        if not self._keeps:
            return self._log_probabilities(final[start : start + rows])
        if start not in self._kept:
            self._kept[start] = self._log_probabilities(final[start : start + rows])
        return self._kept[start]

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        return self.model.logits(self.model.model.norm(hidden)).float().log_softmax(-1)


def _cache(base: Scheme, kv: TensorSpec) -> dict[str, Any]:
    """Fields of a scheme whose cache is `kv` and treats keys as that of `base`."""
    return {"kv": kv, **_keys_of(base)}


def _keys_of(base: Scheme) -> dict[str, Any]:
    """How a scheme's cache treats keys, as fields of a scheme."""
    return {name: getattr(base, name) for name in ("kv_pre_rope", "kv_offset", "kv_rotation", "kv_recent")}


def _rounded(weight: Tensor, linear: LinearScheme, perm: Tensor | None) -> Tensor:
    """The weights [N, K] of linears, stacked, as they are read once rounded, their columns in their own order.

    Scales are of rows, or of groups in them, so that stacked weights are rounded as each alone.
    """
    ordered = weight if perm is None else weight[:, perm]
    found: Tensor = unrotate_input(dequantize_weight(quantize_weight(ordered, linear), linear), linear)
    return found if perm is None else found[:, invert(perm)]
