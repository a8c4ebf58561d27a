"""Presence, frequency and repetition penalties, from counts of tokens that live on the device by lane.

The counts are raised on the device with the tokens that were sampled there, so a step that runs ahead of the host is
penalised for them too. One int16 a lane and token: how often it was generated (up to 8191, where every penalty has long
had its effect), and one bit for "the prompt has it".
"""

import numpy as np
import torch
from torch import Tensor

_PROMPT = 0x4000
_COUNT = 0x1FFF


class TokenCounts:
    """int16 [num_lanes, vocab_size]; 66 MB for 256 lanes of a vocabulary of 128256."""

    def __init__(self, num_lanes: int, vocab_size: int, device: torch.device) -> None:
        self.counts = torch.zeros(num_lanes, vocab_size, dtype=torch.int16, device=device)

    def row(self, prompt: list[int], output: list[int]) -> np.ndarray:
        """A lane's row for a sequence's tokens so far, on the host."""
        row = np.zeros(self.counts.shape[1], dtype=np.int16)
        tokens, number = np.unique(np.array(output, dtype=np.int64), return_counts=True)
        row[tokens] = np.minimum(number, _COUNT)
        row[np.array(prompt, dtype=np.int64)] |= _PROMPT
        return row

    def load(self, lane: int, row: Tensor) -> None:
        self.counts[lane] = row

    def apply(self, logits: Tensor, lanes: Tensor, presence: Tensor, frequency: Tensor, repetition: Tensor) -> Tensor:
        """Penalised logits [S, V] float32; lanes int64 [S], the penalties [S].

        Repetition divides positive logits and multiplies negative ones, of tokens of prompt or output; then
        frequency * count and presence are taken from tokens of the output, as in OpenAI's definition and vLLM's order.
        """
        rows = self.counts[lanes]
        count = rows & _COUNT
        factor = torch.where(rows != 0, repetition[:, None], 1.0)
        logits = torch.where(logits > 0, logits / factor, logits * factor)
        logits -= frequency[:, None] * count
        return logits.sub_(presence[:, None] * (count > 0))

    def add(self, lanes: Tensor, tokens: Tensor) -> None:
        """Count one sampled token of each of these lanes; a lane comes once at most."""
        old = self.counts[lanes, tokens]
        self.counts[lanes, tokens] = old + ((old & _COUNT) < _COUNT)
