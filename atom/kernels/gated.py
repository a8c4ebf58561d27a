"""The gated activation of an MLP and the quantization of its output in one op: the producer of down's input.

There is no permutation to run: the rows of gate and up already stand in the order that down wants.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..quant.mixed import fake_quantize_activation
from ..quant.schemes import LinearScheme
from .activation import Activation
from .refusals_fp4 import refuses_fp4_producer
from .refusals_sm90 import refuses_producer
from .registry import Implementation, Op

Gate = Literal["silu", "gelu_tanh"]


def gated_activation(gate: Tensor, up: Tensor, kind: Gate) -> Tensor:
    """act(gate) * up, in the dtype given: SwiGLU with silu, GeGLU (Gemma) with the tanh form of gelu."""
    if kind == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def gated_quantize_reference(linear: LinearScheme, kind: Gate) -> Callable[[Tensor, Tensor], Activation]:
    """(gate, up) [T, K] each -> round(act(gate) * up), as float32."""

    def run(gate: Tensor, up: Tensor) -> Activation:
        return fake_quantize_activation(gated_activation(gate, up, kind), linear)

    return run


GATED_QUANTIZE = Op(
    name="gated_quantize",
    formula="quantize(act(gate) * up)",
    reference=gated_quantize_reference,
    implementations=(
        Implementation("producers_sm90", "atom.kernels.producers:build_gated_quantize", refuses_producer),
        Implementation("producers_fp4", "atom.kernels.gemm_fp4:build_gated_quantize", refuses_fp4_producer),
    ),
)
