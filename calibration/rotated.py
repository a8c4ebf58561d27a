"""Rotation of the residual stream, folded into the weights: the same function, without loud channels.

With an orthogonal R the stream h becomes h R. RMSNorm commutes with R once its gain has moved into the linears behind
it, so for a norm with gain g, linears W that read the stream, and linears V (bias b) that write to it

    embedding E -> E R      W -> W diag(g) R      V -> R^T V      b -> b R      head -> head diag(g_final) R, untied

and every gain becomes 1. R is a Hadamard matrix with random signs, R = diag(signs) H. The values of each head are
turned by a Hadamard matrix of their own, v -> v Q, which o undoes: W_v -> Q^T W_v, W_o -> W_o Q by heads; that helps
o's input and a low-bit cache of values, and needs nothing of the stream: it can be had alone. Q = H diag(signs): the
signs come last, or a Hadamard block over o's input would turn values back. Nothing is left for run time; what stays to
be rotated there, the inputs of o and down, is the scheme's `rotation`.

Tensors are rotated when they are read, one at a time, so a model of any size streams through.
Source: QuaRot, arXiv:2404.00456.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from atom.errors import UnsupportedError
from atom.models.family import model_config
from atom.models.loader import meta_model
from atom.models.model import Model
from atom.models.norm import RMSNorm
from atom.models.source import Source, Weights
from atom.quant.rotation import hadamard, rotate
from atom.quant.schemes import RotationSpec

from .gptq import exact_float32

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
WHOLE = RotationSpec("hadamard")

Change = Callable[[Tensor], Tensor]


def rotate_source(
    source: Source, seed: int = 0, device: torch.device | str = "cpu", values_alone: bool = False
) -> Source:
    """`source` with its residual stream and its values rotated: the same logits, from other weights.

    seed          of the signs
    device        where products run; tensors come back on the CPU, in float32
    values_alone  the stream stays as it is
    Raises UnsupportedError for a stream that cannot be rotated, where layers norm what they add to it (Gemma 3),
    ValueError where no Hadamard matrix of the hidden size or of a head's size is known.
    """
    model = meta_model(model_config(source.config, source.generation_config))
    weights = RotatedWeights(source.weights, model, seed, torch.device(device), values_alone)
    if values_alone:
        return replace(source, weights=weights)
    return replace(source, config={**source.config, "tie_word_embeddings": False}, weights=weights)


class RotatedWeights:
    """The tensors of `weights` (a `Weights` itself) under the rotation; `model` says what each of them does."""

    def __init__(
        self, weights: Weights, model: Model, seed: int, device: torch.device, values_alone: bool = False
    ) -> None:
        config = model.config
        if not values_alone:
            _refuse_inner_norms(model)
            hadamard(config.hidden_size)  # ValueError before any work
        hadamard(config.head_dim)
        self._weights = weights
        self._model = model
        self._device = device
        self._values_alone = values_alone
        generator = torch.Generator().manual_seed(seed)
        self._signs = _draw_signs(config.hidden_size, generator).to(device)
        self._head_signs = _draw_signs(config.head_dim, generator).to(device)
        self._is_tied = config.tie_embeddings and not values_alone

    def names(self) -> list[str]:
        if self._values_alone:
            return self._weights.names()
        found = [name for name in self._weights.names() if name != HEAD]
        return [*found, HEAD]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.shape(self._stored(name))

    def dtype(self, name: str) -> torch.dtype:
        """That of the tensor before rotation, in which a checkpoint stores it again if it is not quantized."""
        return self._weights.dtype(self._stored(name))

    def get(self, name: str) -> Tensor:
        change = self._change(name)
        x = self._weights.get(self._stored(name))
        if change is None:
            return x
        with exact_float32():
            return change(x.to(self._device).float()).cpu()

    def _stored(self, name: str) -> str:
        return EMBEDDING if name == HEAD and self._is_tied else name

    def _change(self, name: str) -> Change | None:
        """What happens to the tensor `name`; None leaves it as it is."""
        if self._values_alone:
            return self._value_change(name)
        if name == EMBEDDING:
            return self._turn
        if name == HEAD:
            return partial(self._read, norm=FINAL_NORM)
        if name == FINAL_NORM:
            return self._plain_gain
        if not name.startswith("model.layers."):
            return None
        _, _, index, inner = name.split(".", 3)
        module, _, kind = inner.rpartition(".")
        return self._layer_change(f"model.layers.{index}", module, kind)

    def _value_change(self, name: str) -> Change | None:
        """What happens to the tensor `name` where only values turn."""
        if name.endswith(".self_attn.v_proj.weight"):
            return lambda W: self._turn_heads(W.T).T.contiguous()
        is_turned = name.endswith((".self_attn.v_proj.bias", ".self_attn.o_proj.weight"))
        return self._turn_heads if is_turned else None

    def _layer_change(self, prefix: str, module: str, kind: str) -> Change | None:
        groups = self._model.family.groups
        norms = [g.producer for g in groups if isinstance(self._module(g.producer), RMSNorm)]
        if module in norms:
            return self._plain_gain
        if module == "self_attn.v_proj" and kind == "bias":
            return self._turn_heads
        if kind == "bias":
            return self._turn if module in ("self_attn.o_proj", "mlp.down_proj") else None
        if module == "self_attn.o_proj":
            return lambda W: self._write(self._turn_heads(W))
        if module == "mlp.down_proj":
            return self._write
        if module in self._model.family.linears:
            read = partial(self._read, norm=f"{prefix}.{self._model.family.group_of(module).producer}.weight")
            return (lambda W: self._turn_heads(read(W).T).T) if module == "self_attn.v_proj" else read
        return None

    def _module(self, name: str) -> torch.nn.Module:
        return self._model.model.layers[0].get_submodule(name)

    def _turn(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] -> x R."""
        return rotate(x * self._signs, WHOLE)

    def _turn_heads(self, x: Tensor) -> Tensor:
        """x [..., heads * head_dim] -> each head times Q."""
        return (rotate(x.unflatten(-1, (-1, self._model.config.head_dim)), WHOLE) * self._head_signs).flatten(-2)

    def _read(self, W: Tensor, norm: str) -> Tensor:
        """A weight [N, hidden_size] that reads what `norm` gives."""
        gain = self._weights.get(norm).to(self._device).float() + self._model.config.norm_offset
        return self._turn(W * gain)

    def _write(self, W: Tensor) -> Tensor:
        """A weight [hidden_size, K] that writes to the stream."""
        return self._turn(W.T).T.contiguous()

    def _plain_gain(self, gain: Tensor) -> Tensor:
        return torch.full_like(gain, 1.0 - self._model.config.norm_offset)


def _draw_signs(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (n,), generator=generator).float().mul_(2).sub_(1)


def _refuse_inner_norms(model: Model) -> None:
    layer = model.model.layers[0]
    known = [group.producer for group in model.family.groups]
    inner = [name for name, module in layer.named_children() if isinstance(module, RMSNorm) and name not in known]
    if inner or model.config.embedding_scale is not None:
        raise UnsupportedError(
            f"the residual stream of {model.config.architecture} cannot be rotated: {' and '.join(inner)} norm what is "
            "added to it, and their gains cannot move on; use --rotate values and --rotation block_hadamard"
        )
