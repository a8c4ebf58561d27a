"""The quantized twins of a decoder layer's modules.

A producer (norm, o_input, gated activation) permutes and rounds what its linears take; a QuantizedLinear multiplies
it with a low-bit weight. Each twin chooses its implementation from the op registry once, when it is made, and runs it
from then on. The layer's `forward` is the same as in full precision.
"""

import torch
from torch import Tensor, nn

from ..kernels.activation import PERMUTE_QUANTIZE, Activation
from ..kernels.gated import GATED_QUANTIZE
from ..kernels.linear import LINEAR
from ..kernels.norm import ADD_RMS_NORM_QUANTIZE, RMS_NORM_QUANTIZE
from ..kernels.registry import REFERENCE, Kernels, Problem, device_arch
from ..quant.mixed import MixedWeight
from ..quant.schemes import LinearScheme
from .norm import Norm, RMSNorm


class Quantized(nn.Module):
    """What all twins say of themselves: the op, and the implementation that runs it."""

    def __init__(self, op: str, implementation: str, detail: str) -> None:
        super().__init__()
        self.op = op
        self.implementation = implementation
        self.detail = detail

    def extra_repr(self) -> str:
        return f"{self.detail}, {self.op}: {self.implementation}"


class QuantizedLinear(Quantized):
    """x @ w.T + bias for a weight in low-bit columns; x comes from a producer of the same scheme."""

    def __init__(
        self,
        scheme: LinearScheme,
        weight: MixedWeight,
        bias: Tensor | None,
        shape: tuple[int, int],
        dtype: torch.dtype = torch.float32,
        kernels: Kernels = "auto",
    ) -> None:
        out_features, in_features = shape
        problem = Problem(device_arch(weight.normal.codes.device), scheme, out_features, in_features)
        choice = LINEAR.choose(problem, kernels)
        super().__init__(LINEAR.name, choice.name, f"{in_features} -> {out_features}, {scheme.weight}")
        self.scheme = scheme
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.bias = bias
        self._run = choice.build(scheme, weight, bias)

    def forward(self, x: Activation, out: Tensor | None = None) -> Tensor:
        """[T, in_features] as its producer hands it on -> [T, out_features] in the model's dtype, in `out` if given."""
        y: Tensor
        if out is not None and getattr(self._run, "writes_out", False):
            y = self._run(x, out)
            return y
        y = self._run(x)
        return y.to(self.dtype) if out is None else out.copy_(y)


class QuantizingRMSNorm(Quantized, Norm):
    """RMSNorm, permutation and rounding; with the residual add before it where a kernel does all of it."""

    def __init__(self, norm: RMSNorm, scheme: LinearScheme, perm: Tensor | None, kernels: Kernels = "auto") -> None:
        gain = norm.gain().detach()
        problem = Problem(device_arch(gain.device), scheme, K=gain.numel())
        choice = RMS_NORM_QUANTIZE.choose(problem, kernels)
        is_fused = choice.name != REFERENCE and ADD_RMS_NORM_QUANTIZE.runs(problem)
        super().__init__(RMS_NORM_QUANTIZE.name, choice.name, f"{gain.numel()}" + (", adds" if is_fused else ""))
        self._run = choice.build(scheme, perm, gain, norm.eps)
        self._add_run = None
        if is_fused:
            self._add_run = ADD_RMS_NORM_QUANTIZE.choose(problem, kernels).build(scheme, perm, gain, norm.eps)

    def after(self, hidden: Tensor, update: Tensor | None) -> tuple[Tensor, Activation]:
        """See Norm.after."""
        if update is None or self._add_run is None:
            return super().after(hidden, update)
        total, y = self._add_run(hidden, update)
        return total, y

    def forward(self, x: Tensor) -> Activation:
        """x [T, K] -> what the linears behind this norm take."""
        y: Activation = self._run(x)
        return y


class PermuteQuantize(Quantized):
    """Permutation and rounding of what attention returns."""

    def __init__(
        self,
        size: int,
        scheme: LinearScheme,
        perm: Tensor | None,
        device: torch.device | str = "cpu",
        kernels: Kernels = "auto",
    ) -> None:
        choice = PERMUTE_QUANTIZE.choose(Problem(device_arch(device), scheme, K=size), kernels)
        super().__init__(PERMUTE_QUANTIZE.name, choice.name, f"{size}")
        self.size = size
        self._run = choice.build(scheme, perm)

    def forward(self, x: Tensor) -> Activation:
        """x [T, K] -> what o_proj takes."""
        y: Activation = self._run(x)
        return y


class QuantizingGatedActivation(Quantized):
    """act(gate) * up and rounding; the order is already that of the rows of gate and up."""

    def __init__(
        self,
        kind: str,
        size: int,
        scheme: LinearScheme,
        device: torch.device | str = "cpu",
        kernels: Kernels = "auto",
    ) -> None:
        choice = GATED_QUANTIZE.choose(Problem(device_arch(device), scheme, K=size), kernels)
        super().__init__(GATED_QUANTIZE.name, choice.name, f"{size}, {kind}")
        self.size = size
        self._run = choice.build(scheme, kind)

    def forward(self, gate: Tensor, up: Tensor) -> Activation:
        """gate, up [T, K] -> what down_proj takes."""
        y: Activation = self._run(gate, up)
        return y
