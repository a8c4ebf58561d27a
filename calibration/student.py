"""A rounded checkpoint as a model that can be trained: the same numbers, with gradients.

Every scale has a factor to learn; norms and biases are learned too, embedding and head are not. So are attention's
weights where they keep full precision and the cache does not. Codes are, where they are asked to: then every rounded
column keeps a latent value in units of its own grid, starting at its code, and what runs is the latent rounded, times
the scale. Rounding passes gradients as if it were not there (the straight-through estimator, arXiv:1308.3432), and
none where the grid ends.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from atom.kernels.dense_attention import AttentionSpec
from atom.models.family import model_config
from atom.models.kv import DenseKV
from atom.models.layers import DecoderLayer
from atom.models.layout import KEY_CENTRE, PERM, key_tensors, layer_prefix
from atom.models.loader import meta_model
from atom.models.model import Model
from atom.models.rope import Rotation
from atom.models.source import Source
from atom.quant.formats import get_format
from atom.quant.granularity import Channel
from atom.quant.mixed import MixedWeight, fake_quantize_activation
from atom.quant.rotation import rotate
from atom.quant.rounding import Quantized, Scale, code_values, encode_float, expand_scale
from atom.quant.scales import round_scale
from atom.quant.schemes import LinearScheme, Scheme, TensorSpec
from atom.quant.stored import load_weight, store_weight

from .keys import centre_on_sink
from .latent import REST
from .observe import Hook
from .scaled_rows import ScaledRows, has_scaled_rows

KEPT_HIDDEN, KEPT_INTERMEDIATE = 44, 19  # float32 values that a layer keeps for its gradients, in units of its sizes


def straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `exact`."""
    return exact + (rounded - exact).detach()


class TrainableColumns(nn.Module):
    """Columns of a weight under one spec.

    latent       [N, k] in units of the grid, whatever the scale; learns if asked to. Starts at the codes' values, or
                 where `rest` says (latent.py), which rounds to them
    log_factor   like the scales that learn: the outer ones, if inner scales are whole numbers under them, which move in
                 steps too large to learn; else the inner ones. The scale is what was stored times exp(log_factor),
                 rounded to its storage format
    """

    scale: Tensor
    outer: Tensor | None
    zero_point: Tensor | None

    def __init__(
        self, columns: Quantized, spec: TensorSpec, learns_codes: bool = False, rest: Tensor | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.format = get_format(spec.format)
        latent = code_values(columns.codes, self.format)
        latent = latent if rest is None else latent + rest.float()
        self.latent = nn.Parameter(latent, requires_grad=learns_codes)
        self.register_buffer("scale", columns.scale.scale.clone())
        self.register_buffer("outer", columns.scale.outer)
        self.register_buffer("zero_point", columns.scale.zero_point)
        self.learns_outer = self.outer is not None and spec.scale_format == "uint4"
        learning = self.outer if self.learns_outer else self.scale
        assert learning is not None
        self.log_factor = nn.Parameter(torch.zeros_like(learning))

    def values(self) -> Tensor:
        """What the columns stand for, float32 [N, k]."""
        codes: Tensor = self.latent
        if codes.requires_grad:
            low, high = self._range()
            inside = codes.clamp(low, high)
            grid = inside.round() if self.format.is_integer else self._nearest_float(inside)
            codes = straight_through(inside, grid)
        if self.zero_point is not None:
            codes = codes - expand_scale(self.zero_point, codes.shape[1], self.spec)
        scale, factor = self._stored_scale(), self.log_factor.exp()
        learned = factor / factor.detach()  # 1, and the gradient of the factor
        effective = (scale.scale if scale.outer is None else scale.scale * scale.outer) * learned
        size = self.spec.group_size
        if size is None or effective.shape[1] == 1 or codes.shape[1] % size:
            return codes * expand_scale(effective, codes.shape[1], self.spec)
        grouped: Tensor = codes.unflatten(1, (-1, size)) * effective.unsqueeze(2)
        return grouped.flatten(1)

    def product(self, x: Tensor) -> Tensor:
        """x [T, k] times what the columns stand for."""
        return functional.linear(x, self.values())

    @torch.no_grad()
    def quantized(self) -> Quantized:
        """Codes and scales that dequantize to `values`."""
        low, high = self._range()
        latent = self.latent.clamp(low, high)
        if self.format.is_integer:
            codes = latent.round().to(self.format.dtype if self.spec.symmetric else torch.uint8)
        else:
            codes = encode_float(latent, self.format)
        return Quantized(codes, self._stored_scale())

    def _range(self) -> tuple[float, float]:
        if not self.format.is_integer:
            return -self.format.max, self.format.max
        return self.format.code_range(self.spec.symmetric)

    def _nearest_float(self, x: Tensor) -> Tensor:
        return code_values(encode_float(x.detach(), self.format), self.format)

    @torch.no_grad()
    def _stored_scale(self) -> Scale:
        """The scales as they are now, on the grid of their storage format."""
        factor = self.log_factor.exp()
        if self.learns_outer:
            assert self.outer is not None
            return Scale(self.scale, self.zero_point, self.outer * factor)
        return Scale(round_scale(self.scale * factor, self.spec.scale_format), self.zero_point, self.outer)


class TrainableLinear(nn.Module):
    """A quantized linear whose scales, bias and codes can learn. Outliers that keep bf16 stay as they are.

    normal, outlier  each ScaledRows where its codes stay under one scale a row that learns
    """

    kept: Tensor | None

    def __init__(
        self,
        linear: LinearScheme,
        weight: MixedWeight,
        bias: Tensor | None,
        learns_codes: bool = False,
        rest: Tensor | None = None,
    ) -> None:
        super().__init__()
        assert linear.weight is not None
        self.linear = linear
        self.normal = _columns(weight.normal, linear.weight, learns_codes, rest)
        self.outlier: TrainableColumns | ScaledRows | None = None
        kept = None
        if isinstance(weight.outlier, Quantized):
            spec = linear.outliers.spec(Channel(), dynamic=False)
            assert spec is not None
            self.outlier = _columns(weight.outlier, spec, learns_codes)
        elif weight.outlier is not None:
            kept = weight.outlier
        self.register_buffer("kept", kept)
        self.bias = None if bias is None else nn.Parameter(bias.float())

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K], permuted, rotated and rounded -> [T, N]."""
        normal, _ = self.linear.split(x.shape[1])
        y = self.normal.product(x[:, :normal])
        if self.outlier is not None:
            y = y + self.outlier.product(x[:, normal:])
        elif self.kept is not None:
            y = y + functional.linear(x[:, normal:], self.kept.float())
        return y if self.bias is None else y + self.bias

    def stored(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint that hold this weight, and its bias in float32, by name without prefix."""
        outlier = self.kept if self.outlier is None else self.outlier.quantized()
        tensors = store_weight(MixedWeight(self.normal.quantized(), outlier), self.linear)
        return tensors if self.bias is None else {**tensors, "bias": self.bias.detach()}


def _columns(
    columns: Quantized, spec: TensorSpec, learns_codes: bool, rest: Tensor | None = None
) -> TrainableColumns | ScaledRows:
    if not learns_codes and has_scaled_rows(columns, spec):
        return ScaledRows(columns, spec)
    return TrainableColumns(columns, spec, learns_codes, rest)


class TrainingKV(DenseKV):
    """The dense cache, whose rounding passes gradients.

    It hands attention as many key and value heads as there are queries': with fewer, torch has no kernel in float32
    that does without all scores in memory. With `moves_centres` all tokens are the first of sequences, and the centre
    moves so that their mean key is on the grid (keys.py).
    """

    moves_centres: Scheme | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, spec: AttentionSpec) -> Tensor:
        if self.moves_centres is not None and spec.key_centre is not None:
            first = rotation.apply(k.float()).mean(0)
            spec.key_centre.copy_(centre_on_sink(spec.key_centre, first, self.moves_centres, layer))
        return super().attend(layer, q, k, v, rotation, spec)

    def _round(self, x: Tensor, kv: TensorSpec | None) -> Tensor:
        return straight_through(x, super()._round(x, kv))

    def _append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        repeats = self.config.num_heads // self.config.num_kv_heads
        return super()._append(layer, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1))


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


def round_inputs(linear: LinearScheme, perm: Tensor | None) -> Hook:
    """A hook on a producer that makes its output what the linears behind it take, with gradients."""
    order = None if perm is None else perm.long()
    rotation, plain = linear.rotation, replace(linear, rotation=None)

    def hook(module: nn.Module, args: object, x: Tensor) -> Tensor:
        if order is not None:
            x = x[..., order]
        if rotation is not None:
            normal, _ = linear.split(x.shape[-1])
            x = torch.cat((rotate(x[..., :normal], rotation), x[..., normal:]), -1)
        with torch.no_grad():
            rounded = fake_quantize_activation(x, plain)
        return straight_through(x, rounded)

    return hook


def _kind(name: str) -> str:
    """Which list of `Learning` a parameter belongs to."""
    if name.endswith(".latent"):
        return "codes"
    if name.endswith(".log_factor"):
        return "factors"
    return "weights" if name.endswith("_proj.weight") else "plain"


def _is_of(name: str, linear: str) -> bool:
    return name.startswith(f"{linear}.")
