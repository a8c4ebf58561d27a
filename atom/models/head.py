"""The head in eight bits: the vocabulary's rows in INT8 under a scale each, hidden states under one scale a token.

The 16-bit head of Llama-3-8B is 1.05 GB, a fifth of all that a decode step of a 4-bit model reads: 240 us of 1.3 ms on
an H200. It is rounded when a model is loaded; checkpoints keep 16 bits.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from ..kernels.registry import Kernels
from ..quant.mixed import MixedWeight, quantize_weight
from ..quant.presets import get_scheme
from ..quant.rounding import Quantized, Scale
from .model import Model
from .twins import PermuteQuantize, QuantizedLinear

HeadFormat = Literal["full", "int8"]
ROWS = 16384  # rounded at a time, in float32


class Int8Head(nn.Module):
    """Scores of the next token from INT8 weights and activations."""

    def __init__(self, weight: Tensor, kernels: Kernels = "auto") -> None:
        """weight [vocab_size, hidden_size] in the model's dtype, on its device."""
        super().__init__()
        scheme = get_scheme("w8a8").default_linear
        parts = [quantize_weight(rows, scheme, "lm_head.weight").normal for rows in weight.split(ROWS)]
        codes = torch.cat([part.codes for part in parts])
        scale = torch.cat([part.scale.scale for part in parts])
        rounded = MixedWeight(Quantized(codes, Scale(scale)))
        size = weight.shape[1]
        self.quantize = PermuteQuantize(size, scheme, None, weight.device, kernels)
        self.linear = QuantizedLinear(scheme, rounded, None, (weight.shape[0], size), weight.dtype, kernels)

    def forward(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [T, hidden_size] -> [T, vocab_size], in `out` if there is one."""
        y: Tensor = self.linear(self.quantize(hidden), out)
        return y


@torch.no_grad()
def round_head_(model: Model, kernels: Kernels = "auto") -> None:
    """Give a loaded model its head in INT8, in place; the 16-bit one goes, but for an embedding that it is tied to."""
    head = model.model.embed_tokens if model.lm_head is None else model.lm_head
    model.int8_head = Int8Head(head.weight, kernels)
    model.lm_head = None
