"""The quantized twins of a decoder layer's modules, and the swap that puts them in.

A producer (norm, o_input, gated activation) permutes and rounds what its linears take; a QuantizedLinear multiplies
it with a low-bit weight. Each twin chooses its implementation from the op registry once, when it is made, and runs it
from then on. The layer's `forward` is the same as in full precision.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..kernels.activation import PERMUTE_QUANTIZE, Activation
from ..kernels.gated import GATED_QUANTIZE
from ..kernels.linear import LINEAR
from ..kernels.norm import RMS_NORM_QUANTIZE
from ..kernels.registry import Kernels, Problem, device_arch
from ..quant.mixed import MixedWeight
from ..quant.permutation import check_permutation
from ..quant.schemes import LinearScheme, Scheme
from ..quant.stored import load_weight
from .family import Family, InputGroup
from .layers import GatedActivation
from .layout import KEY_OFFSET, PERM, Expected, check_tensor, group_scheme, key_offset_tensor, linear_tensors
from .norm import RMSNorm
from .shards import some


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

    def forward(self, x: Activation) -> Tensor:
        """[T, in_features] as its producer hands it on -> [T, out_features] in the model's dtype."""
        y: Tensor = self._run(x)
        return y.to(self.dtype)


class QuantizingRMSNorm(Quantized):
    """RMSNorm, permutation and rounding."""

    def __init__(self, norm: RMSNorm, scheme: LinearScheme, perm: Tensor | None, kernels: Kernels = "auto") -> None:
        gain = norm.gain().detach()
        problem = Problem(device_arch(gain.device), scheme, K=gain.numel())
        choice = RMS_NORM_QUANTIZE.choose(problem, kernels)
        super().__init__(RMS_NORM_QUANTIZE.name, choice.name, f"{gain.numel()}")
        self._run = choice.build(scheme, perm, gain, norm.eps)

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
        self._run = choice.build(scheme, kind)

    def forward(self, gate: Tensor, up: Tensor) -> Activation:
        """gate, up [T, K] -> what down_proj takes."""
        y: Activation = self._run(gate, up)
        return y


@torch.no_grad()
def quantize_layer_(
    layer: nn.Module,
    family: Family,
    scheme: Scheme,
    tensors: Mapping[str, Tensor],
    prefix: str,
    kernels: Kernels = "auto",
) -> None:
    """Swap the modules of one decoder layer for quantized twins, in place.

    layer    in full precision; its norms are loaded, on the device and in the dtype in which the layer is to run (its
             linears may be on the meta device, they are dropped)
    tensors  the layer's checkpoint tensors by full name, as atom/quant/stored.py lays them out; others are ignored
    prefix   the layer's name, model.layers.3 say

    Linears whose scheme has no weight format stay as they are. Raises CheckpointError for a missing or mis-shaped
    tensor, UnsupportedError if the device has no implementation of an op.
    """
    device, dtype = _placement(layer)
    offset = key_offset_tensor(layer) if scheme.stores_key_offset else None
    for group in family.groups:
        shared = group_scheme(family, scheme, prefix, group.name)
        if shared.weight is None:
            continue
        perms: list[Tensor | None] = []
        size = 0
        for name in group.linears:
            linear = layer.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            size = linear.in_features
            own = scheme.for_linear(f"{prefix}.{name}")
            found = _own_tensors(linear, own, group, tensors, f"{prefix}.{name}", device)
            perms.append(found.pop(PERM, None))
            bias = found.pop("bias", None)
            shape = (linear.out_features, linear.in_features)
            weight = load_weight(found, linear.in_features, own)
            layer.set_submodule(name, QuantizedLinear(own, weight, bias, shape, dtype, kernels))
        perm = _shared_perm(perms, group, prefix)
        layer.set_submodule(group.producer, _producer(layer, group, shared, perm, size, device, kernels))
    if offset is not None:
        layer.get_submodule("self_attn").key_offset = _key_offset(offset, tensors, prefix, device)


def _key_offset(expected: Expected, tensors: Mapping[str, Tensor], prefix: str, device: torch.device) -> Tensor:
    """The stored mean key of a layer, checked, on `device`."""
    name = f"{prefix}.{KEY_OFFSET}"
    if name not in tensors:
        raise CheckpointError(f"{name} is missing; a scheme with kv_offset 'mean' needs it; quantize again.")
    tensor = tensors[name]
    check_tensor(name, tuple(tensor.shape), tensor.dtype, expected, "checkpoint")
    return tensor.to(device)


def _placement(layer: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a layer's loaded parameters; those of its norms, since linears may be gone or on meta."""
    for name, parameter in layer.named_parameters():
        if "norm" in name and parameter.device.type != "meta":
            return parameter.device, parameter.dtype
    raise CheckpointError("a layer is quantized before its norms are loaded; load its other tensors first.")


def _own_tensors(
    linear: nn.Linear,
    scheme: LinearScheme,
    group: InputGroup,
    tensors: Mapping[str, Tensor],
    name: str,
    device: torch.device,
) -> dict[str, Tensor]:
    """The checkpoint tensors of one linear, checked, on `device`, by name without prefix."""
    expected = linear_tensors(linear, scheme, group.is_gathered)
    if missing := [f"{name}.{key}" for key in expected if f"{name}.{key}" not in tensors]:
        raise CheckpointError(f"{some(missing)} are missing; all tensors of the layer are needed; quantize again.")
    found = {}
    for key, want in expected.items():
        tensor = tensors[f"{name}.{key}"]
        check_tensor(f"{name}.{key}", tuple(tensor.shape), tensor.dtype, want, "checkpoint")
        found[key] = tensor.to(device)
    return found


def _shared_perm(perms: list[Tensor | None], group: InputGroup, prefix: str) -> Tensor | None:
    """The one permutation of a group's input (int64); CheckpointError if its linears disagree or it is none."""
    first = perms[0]
    if first is None:
        return None
    name = f"{prefix}.{group.linears[0]}.{PERM}"
    try:
        check_permutation(first, first.numel(), name)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    for linear, other in zip(group.linears[1:], perms[1:], strict=True):
        if other is None or not torch.equal(first, other):
            raise CheckpointError(
                f"{prefix}.{linear}.{PERM} differs from {name}; linears that share an input share its order; "
                "quantize again."
            )
    return first.long()


def _producer(
    layer: nn.Module,
    group: InputGroup,
    scheme: LinearScheme,
    perm: Tensor | None,
    size: int,
    device: torch.device,
    kernels: Kernels,
) -> nn.Module:
    """The quantizing twin of the module that produces a group's input."""
    plain = layer.get_submodule(group.producer)
    if isinstance(plain, RMSNorm):
        return QuantizingRMSNorm(plain, scheme, perm, kernels)
    if isinstance(plain, GatedActivation):
        return QuantizingGatedActivation(plain.kind, size, scheme, device, kernels)
    assert isinstance(plain, nn.Identity), group.producer
    return PermuteQuantize(size, scheme, perm, device, kernels)
