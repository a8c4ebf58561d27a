"""The hidden states of all calibration windows between two decoder layers, and how a layer runs over them.

They are float32 and lie on the device, or in host memory when they would crowd it. A layer takes them in batches of
whole windows, always the same ones: that a resumed run ends in the same bits rests on it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from atom.models.config import ModelConfig
from atom.models.kv import DenseKV
from atom.models.layers import DecoderLayer
from atom.quant.schemes import Scheme


class HiddenStates:
    """[windows, length, hidden_size] float32, read and replaced in batches of `batch` windows."""

    def __init__(self, states: Tensor, batch: int, device: torch.device) -> None:
        self._states = states
        self._batch = batch
        self._device = device

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self._states.shape[0] // self._batch)

    def batches(self) -> Iterator[tuple[int, Tensor]]:
        """(number, tokens [T, hidden_size] on the device) of each batch."""
        for number in range(len(self)):
            yield number, self.get(number)

    def get(self, number: int) -> Tensor:
        return self._part(number).to(self._device, non_blocking=True).flatten(0, 1)

    def put(self, number: int, tokens: Tensor) -> None:
        part = self._part(number)
        part.copy_(tokens.view(part.shape))

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return self._states.shape[0] * self._states.shape[1]

    @property
    def device(self) -> torch.device:
        """Where layers run over them."""
        return self._device

    def first_tokens(self) -> "HiddenStates":
        """Those of every window's first token, as windows of one token in one batch."""
        return HiddenStates(self._states[:, :1], self._states.shape[0], self._device)

    def windows_in(self, number: int) -> int:
        return self._part(number).shape[0]

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self._states.shape[1]

    def _part(self, number: int) -> Tensor:
        return self._states[number * self._batch : (number + 1) * self._batch]


class LayerRunner:
    """Runs decoder layers over hidden states with a fresh cache for every batch."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._config = config
        self._device = device

    def run(self, layer: DecoderLayer, hidden: HiddenStates, number: int, scheme: Scheme | None) -> Tensor:
        """The layer's output [T, hidden_size] for one batch; keys and values rounded as `scheme` says, if given."""
        kv = DenseKV.for_scheme(self._config, scheme, hidden.windows_in(number), self._device)
        out: Tensor = layer(hidden.get(number), layer.rope(kv.positions(hidden.length)), kv)
        return out
