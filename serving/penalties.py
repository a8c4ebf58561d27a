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

    @staticmethod
    def entries(prompt: list[int], output: list[int]) -> np.ndarray:
        """int64 [2, n], on the host: a sequence's different tokens so far, and what stands in its lane's row there."""
        tokens, places = np.unique(np.array([*prompt, *output], dtype=np.int64), return_inverse=True)
        values = np.minimum(np.bincount(places[len(prompt) :], minlength=len(tokens)), _COUNT)
        values[places[: len(prompt)]] |= _PROMPT
        return np.stack((tokens, values))

    def load(self, lane: int, entries: Tensor) -> None:
        """Give a lane these entries, and no others."""
        row = self.counts[lane]
        row.zero_()
        row[entries[0]] = entries[1].to(torch.int16)

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
