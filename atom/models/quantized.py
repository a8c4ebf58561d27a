"""The swap that puts quantized twins into a decoder layer, and the checks of the tensors they are made of."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..kernels.refusals_sm90 import fuses_rows
from ..kernels.registry import REFERENCE, Kernels, Problem, device_arch
from ..quant.mixed import MixedWeight
from ..quant.permutation import check_permutation
from ..quant.schemes import LinearScheme, Scheme
from ..quant.stored import load_weight
from .family import Family, InputGroup
from .layers import GatedActivation
from .layout import PERM, Expected, check_tensor, group_scheme, key_tensors, linear_tensors
from .norm import RMSNorm
from .shards import some
from .together import LinearPart, stack_biases, stack_rows
from .twins import PermuteQuantize, QuantizingGatedActivation, QuantizingRMSNorm
from .twins import Quantized as Quantized
from .twins import QuantizedLinear as QuantizedLinear


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
    of_keys = key_tensors(layer, scheme)
    for group in family.groups:
        shared = group_scheme(family, scheme, prefix, group.name)
        if shared.weight is None:
            continue
        perms: list[Tensor | None] = []
        parts: list[_Part] = []
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
            parts.append(_Part(name, own, weight, bias, shape))
        _place_linears(layer, parts, dtype, kernels)
        perm = _shared_perm(perms, group, prefix)
        layer.set_submodule(group.producer, _producer(layer, group, shared, perm, size, device, kernels))
    for name, expected in of_keys.items():
        module, _, attribute = name.rpartition(".")
        setattr(layer.get_submodule(module), attribute, _key_tensor(name, expected, tensors, prefix, device))


@dataclass(frozen=True)
class _Part:
    """One linear of a group, loaded."""

    name: str
    scheme: LinearScheme
    weight: MixedWeight
    bias: Tensor | None
    shape: tuple[int, int]


def _place_linears(layer: nn.Module, parts: list[_Part], dtype: torch.dtype, kernels: Kernels) -> None:
    """Put the linears of one group into the layer: each on its own, or as parts of one where its kernel allows it."""
    first = parts[0]
    N, K = sum(part.shape[0] for part in parts), first.shape[1]
    problem = Problem(device_arch(first.weight.normal.codes.device), first.scheme, N, K)
    is_one = len(parts) > 1 and kernels != REFERENCE and all(part.scheme == first.scheme for part in parts)
    if not is_one or not fuses_rows(problem):
        for part in parts:
            linear = QuantizedLinear(part.scheme, part.weight, part.bias, part.shape, dtype, kernels)
            layer.set_submodule(part.name, linear)
        return
    bias = stack_biases([part.bias for part in parts], [part.shape[0] for part in parts])
    whole = QuantizedLinear(first.scheme, stack_rows([part.weight for part in parts]), bias, (N, K), dtype, kernels)
    start = 0
    for part in parts:
        layer.set_submodule(part.name, LinearPart(whole, start, part.shape[0], part.bias))
        start += part.shape[0]


def _key_tensor(
    own: str, expected: Expected, tensors: Mapping[str, Tensor], prefix: str, device: torch.device
) -> Tensor:
    """What is stored of a layer's keys, the mean or the centre, checked, on `device`."""
    name = f"{prefix}.{own}"
    if name not in tensors:
        raise CheckpointError(f"{name} is missing; the scheme's kv_offset needs it; quantize again.")
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
