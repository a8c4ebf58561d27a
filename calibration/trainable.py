"""What of a rounded model can be trained: columns of a weight, a linear, what rounds its inputs, and its cache.

Each gives the numbers that the checkpoint gives, with gradients. Every scale has a factor to learn. Codes learn where
they are asked to: then every rounded column keeps a latent value in units of its own grid, starting at its code, and
what runs is the latent rounded, times the scale. Rounding passes gradients as if it were not there (the
straight-through estimator, arXiv:1308.3432), and none where the grid ends.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from atom.kernels.dense_attention import AttentionSpec
from atom.models.kv import DenseKV
from atom.models.rope import Rotation
from atom.quant.formats import get_format
from atom.quant.granularity import Channel
from atom.quant.mixed import MixedWeight, fake_quantize_activation
from atom.quant.rotation import rotate
from atom.quant.rounding import Quantized, Scale, code_values, encode_float, expand_scale
from atom.quant.scales import round_scale
from atom.quant.schemes import LinearScheme, Scheme, TensorSpec
from atom.quant.stored import store_weight

from .keys import centre_on_sink
from .observe import Hook
from .scaled_rows import ScaledRows, has_scaled_rows


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
