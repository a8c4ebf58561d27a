"""What a model in 16 bits runs as fewer kernels on a GPU: linears of one input as one product, norms with the add
before them, gate and up in one pass.

These are the producers of quantized layers without their rounding, so the 16-bit baseline stands on the same ground as
what is compared with it. On a CPU, and on the reference path, a model stays as it was built.
"""

import torch
from torch import Tensor, nn

from ..kernels.activation import Activation, QuantizedActivation
from ..kernels.gated import GATED_QUANTIZE
from ..kernels.norm import RMS_NORM_QUANTIZE
from ..kernels.registry import REFERENCE, Kernels, Problem, device_arch
from ..quant.schemes import LinearScheme
from .family import Family
from .layers import GatedActivation
from .model import Model
from .norm import RMSNorm
from .together import LinearPart, stack_biases
from .twins import QuantizingGatedActivation, QuantizingRMSNorm


class FusedRMSNorm(QuantizingRMSNorm):
    """RMSNorm and the residual add before it, in the model's own format."""

    def __init__(self, norm: RMSNorm, kernels: Kernels = "auto") -> None:
        super().__init__(norm, LinearScheme(), None, kernels)

    def after(self, hidden: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        """See Norm.after."""
        total, y = super().after(hidden, update)
        return total, _values(y)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> the same shape."""
        return _values(super().forward(x))


class FusedGatedActivation(QuantizingGatedActivation):
    """act(gate) * up in the model's own format."""

    def __init__(self, kind: str, size: int, device: torch.device | str = "cpu", kernels: Kernels = "auto") -> None:
        super().__init__(kind, size, LinearScheme(), device, kernels)

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate, up [T, K] -> the same."""
        return _values(super().forward(gate, up))


@torch.no_grad()
def fuse_model_(model: Model, kernels: Kernels = "auto") -> None:
    """Fuse what is not quantized in a loaded model, in place, where kernels run it: bfloat16 on a GPU."""
    problem = Problem(device_arch(model.device), K=model.config.hidden_size)
    if problem.arch == "cpu" or kernels == REFERENCE or model.dtype != torch.bfloat16:
        return
    for layer in model.model.decoder_layers():
        fuse_layer_(layer, model.family, kernels)
    if isinstance(model.model.norm, RMSNorm) and RMS_NORM_QUANTIZE.runs(problem):
        model.model.norm = FusedRMSNorm(model.model.norm, kernels)


@torch.no_grad()
def fuse_layer_(layer: nn.Module, family: Family, kernels: Kernels = "auto") -> None:
    """Fuse those groups of a decoder layer whose linears are in full precision, in place."""
    for group in family.groups:
        found = [layer.get_submodule(name) for name in group.linears]
        linears = [linear for linear in found if isinstance(linear, nn.Linear)]
        if len(linears) < len(found):
            continue
        if len(linears) > 1:
            for name, part in zip(group.linears, stack_linears(linears), strict=True):
                layer.set_submodule(name, part)
        device, size = linears[0].weight.device, linears[0].in_features
        problem, producer = Problem(device_arch(device), K=size), layer.get_submodule(group.producer)
        if isinstance(producer, RMSNorm) and RMS_NORM_QUANTIZE.runs(problem):
            layer.set_submodule(group.producer, FusedRMSNorm(producer, kernels))
        elif isinstance(producer, GatedActivation) and GATED_QUANTIZE.runs(problem):
            layer.set_submodule(group.producer, FusedGatedActivation(producer.kind, size, device, kernels))


def stack_linears(linears: list[nn.Linear]) -> list[LinearPart]:
    """Linears of one input as parts of one, for run_together."""
    weight = torch.cat([linear.weight for linear in linears])
    bias = stack_biases([linear.bias for linear in linears], [linear.out_features for linear in linears])
    whole = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    whole.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        whole.bias = nn.Parameter(bias, requires_grad=False)
    parts, start = [], 0
    for linear in linears:
        parts.append(LinearPart(whole, start, linear.out_features, linear.bias))
        start += linear.out_features
    return parts


def _values(x: Activation) -> Tensor:
    return x.packed if isinstance(x, QuantizedActivation) else x
