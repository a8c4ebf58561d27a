"""A rounded checkpoint as a model that can be trained: the same numbers, with gradients.

What was rounded is made of the parts in trainable.py. Norms and biases are learned too, embedding and head are not. So
are attention's weights where they keep full precision and the cache does not.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from atom.models.family import model_config
from atom.models.layers import DecoderLayer
from atom.models.layout import KEY_CENTRE, PERM, key_tensors, layer_prefix
from atom.models.loader import meta_model
from atom.models.model import Model
from atom.models.source import Source
from atom.quant.schemes import Scheme
from atom.quant.stored import load_weight

from .latent import REST
from .trainable import TrainableLinear, TrainingKV, round_inputs

KEPT_HIDDEN, KEPT_INTERMEDIATE = 44, 19  # float32 values that a layer keeps for its gradients, in units of its sizes


@dataclass(frozen=True)
class Learning:
    """The parameters that learn, by what their size means.

    codes    latent columns, in steps of their grids; none unless asked for
    factors  logarithms of what scales are multiplied with
    plain    norms' gains and biases, in their own units
    weights  of linears in full precision, in their own units
    """

    codes: list[nn.Parameter]
    factors: list[nn.Parameter]
    plain: list[nn.Parameter]
    weights: list[nn.Parameter]


class Student:
    """A rounded checkpoint in training. `model` runs like the loaded checkpoint, in float32, on the reference path.

    Raises CheckpointError like any reader if a tensor is missing.
    """

    def __init__(self, source: Source, scheme: Scheme, device: torch.device, learns_codes: bool = False) -> None:
        self.scheme = scheme
        self.device = device
        self.learns_codes = learns_codes
        self.keeps_activations: bool | None = None  # found out at the first run
        self.model: Model = meta_model(model_config(source.config, source.generation_config))
        outside = [name for name in self.model.state_dict() if not name.startswith("model.layers.")]
        self.model.load_state_dict({name: self._read(source, name) for name in outside}, assign=True, strict=False)
        self.model.requires_grad_(False)
        for index, layer in enumerate(self.model.model.decoder_layers()):
            self._load_layer(source, layer, index)
        self.model.model.norm.requires_grad_(True)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Hidden states behind the final norm [windows * length, hidden_size] of tokens [windows, length].

        Where the activations of all layers would crowd a GPU, and on a CPU, each layer keeps its input alone and runs
        again for its gradients.
        """
        decoder = self.model.model
        states = decoder.embed(tokens.to(self.device).flatten())
        if self.keeps_activations is None and torch.is_grad_enabled():
            self.keeps_activations = self._fits(tokens.numel())
        for layer in decoder.decoder_layers():
            if self.keeps_activations or not torch.is_grad_enabled():
                states = self._run_layer(layer, states, tokens.shape)
            else:
                states = checkpoint(
                    self._run_layer, layer, states, tokens.shape, use_reentrant=False, preserve_rng_state=False
                )
        normed: Tensor = decoder.norm(states)
        return normed

    @torch.no_grad()
    def recentre(self, tokens: Tensor) -> None:
        """Put the first key of sequences [windows, length] on the grid again, layer by layer: what learned moved it."""
        if not self.scheme.stores_key_centre:
            return
        first = tokens[:, :1]
        states = self.model.model.embed(first.to(self.device).flatten())
        for layer in self.model.model.decoder_layers():
            states = self._run_layer(layer, states, first.shape, self.scheme)

    def parameters(self) -> Learning:
        """All that learns."""
        found: dict[str, list[nn.Parameter]] = {"codes": [], "factors": [], "plain": [], "weights": []}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                found[_kind(name)].append(parameter)
        return Learning(**found)

    def tensors(self, index: int | None) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all that was learned in layer `index`, or outside of layers, as checkpoints name it."""
        if index is None:
            yield "model.norm.weight", self.model.get_parameter("model.norm.weight").detach()
            return
        prefix, layer = layer_prefix(index), list(self.model.model.decoder_layers())[index]
        for name, module in layer.named_modules():
            if isinstance(module, TrainableLinear):
                yield from ((f"{prefix}.{name}.{part}", tensor) for part, tensor in module.stored().items())
        for name, parameter in layer.named_parameters():
            if name.endswith((".weight", ".bias")) and parameter.requires_grad:
                yield f"{prefix}.{name}", parameter.detach()
        if layer.self_attn.key_centre is not None:
            yield f"{prefix}.{KEY_CENTRE}", layer.self_attn.key_centre

    def _fits(self, tokens: int) -> bool:
        """Whether all activations of so many tokens take less than a third of what is free on the GPU."""
        if self.device.type != "cuda":
            return False
        config = self.model.config
        per_token = KEPT_HIDDEN * config.hidden_size + KEPT_INTERMEDIATE * config.intermediate_size
        free, _ = torch.cuda.mem_get_info(self.device)
        return 4 * tokens * config.num_layers * per_token < free / 3

    def _run_layer(
        self, layer: DecoderLayer, states: Tensor, shape: torch.Size, moves_centres: Scheme | None = None
    ) -> Tensor:
        kv = TrainingKV.for_scheme(self.model.config, self.scheme, shape[0], self.device)
        assert isinstance(kv, TrainingKV)
        kv.moves_centres = moves_centres
        out: Tensor = layer(states, layer.rope(kv.positions(shape[1])), kv)
        return out

    def _read(self, source: Source, name: str) -> Tensor:
        return source.get(name).to(self.device).float()

    def _load_layer(self, source: Source, layer: DecoderLayer, index: int) -> None:
        prefix = layer_prefix(index)
        names = set(source.names())
        plain = [name for name in layer.state_dict() if f"{prefix}.{name}" in names]
        loaded = {name: self._read(source, f"{prefix}.{name}") for name in plain}
        layer.load_state_dict(loaded, assign=True, strict=False)
        layer.requires_grad_(False)
        for key in key_tensors(layer, self.scheme):
            kept = source.get(f"{prefix}.{key}").to(self.device, copy=True)  # recentre writes to it
            setattr(layer.self_attn, key.rpartition(".")[2], kept)
        for group in self.model.family.groups:
            perm, shared = None, self.scheme.for_linear(f"{prefix}.{group.linears[0]}")
            if shared.weight is None:
                if self.scheme.kv is not None and group.linears[0].startswith("self_attn."):
                    for name in group.linears:
                        layer.get_submodule(name).requires_grad_(True)
                continue
            for name in group.linears:
                full, own = f"{prefix}.{name}", self.scheme.for_linear(f"{prefix}.{name}")
                parts = {n.removeprefix(f"{full}."): source.get(n).to(self.device) for n in names if _is_of(n, full)}
                perm, bias, rest = (parts.pop(part, None) for part in (PERM, "bias", REST))
                shape = layer.get_submodule(name).in_features
                assert isinstance(shape, int)
                weight = load_weight(parts, shape, own)
                layer.set_submodule(name, TrainableLinear(own, weight, bias, self.learns_codes, rest))
            layer.get_submodule(group.producer).register_forward_hook(round_inputs(shared, perm))
        for name, parameter in layer.named_parameters():
            if name.endswith("norm.weight"):
                parameter.requires_grad_(True)


def _kind(name: str) -> str:
    """Which list of `Learning` a parameter belongs to."""
    if name.endswith(".latent"):
        return "codes"
    if name.endswith(".log_factor"):
        return "factors"
    return "weights" if name.endswith("_proj.weight") else "plain"


def _is_of(name: str, linear: str) -> bool:
    return name.startswith(f"{linear}.")
