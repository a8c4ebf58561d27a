"""Log-probabilities of tokens and of their most likely alternatives, for outputs and for prompts.

They are of the model's own distribution: before masks, bias, penalties, temperature and filters, as the OpenAI API's
(vLLM calls them raw logprobs). They are made on the device and come to the host with the tokens, in one copy.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .result import TokenLogprobs

CHUNK_BYTES = 2**27  # of float32 logits that are held at once for a prompt
FIRST_ROWS = 64  # positions of the first chunk, which shows how wide the logits are


@dataclass(frozen=True)
class Logprobs:
    """Of R tokens, on the device.

    packed  int32 [R, 3 + 2K]: token id, its rank, its logprob's bits, K token ids, the bits of their K logprobs
    """

    packed: Tensor

    @property
    def num_top(self) -> int:
        return int(self.packed.shape[1] - 3) // 2


def logprobs_of(logits: Tensor, tokens: Tensor, num_top: int) -> Logprobs:
    """Logprobs of tokens int64 [R] and of each row's num_top best, from logits [R, V] of any float dtype."""
    logits = logits.float()
    norm = logits.logsumexp(-1, keepdim=True)  # [R, 1]
    chosen = logits.gather(1, tokens[:, None])
    rank = 1 + (logits > chosen).sum(-1, keepdim=True)
    chosen = chosen - norm
    top, ids = logits.topk(min(num_top, logits.shape[1]), dim=-1)
    parts = [tokens[:, None].int(), rank.int(), chosen.view(torch.int32), ids.int(), (top - norm).view(torch.int32)]
    return Logprobs(torch.cat(parts, dim=1))


def prompt_logprobs(logits: Callable[[Tensor], Tensor], hidden: Tensor, tokens: Tensor, num_top: int) -> Logprobs:
    """Logprobs of tokens int64 [T], each given the hidden state [T, hidden_size] of the position before it.

    logits  the model's head: hidden [T, hidden_size] -> [T, V]. It is called for so many positions at a time that
            their float32 logits take CHUNK_BYTES at most (and for one at least; for FIRST_ROWS at first).
    """
    assert len(tokens), "no position has logprobs"
    start, rows, parts = 0, FIRST_ROWS, []
    while start < len(tokens):
        found = logits(hidden[start : start + rows])
        parts.append(logprobs_of(found, tokens[start : start + rows], num_top).packed)
        start, rows = start + rows, max(1, CHUNK_BYTES // (4 * found.shape[1]))
    return Logprobs(torch.cat(parts))


def unpack(packed: Tensor, num_top: Iterable[int]) -> list[TokenLogprobs]:
    """`Logprobs.packed` [R, 3 + 2K] on the host -> one value a row, row r with the first num_top[r] alternatives."""
    width = (packed.shape[1] - 3) // 2
    ids = packed[:, [0, 1, *range(3, 3 + width)]].tolist()
    values = packed[:, [2, *range(3 + width, 3 + 2 * width)]].contiguous().view(torch.float32).tolist()
    return [
        TokenLogprobs(token, logprobs[0], tuple(zip(best[:n], logprobs[1 : 1 + n], strict=True)), rank)
        for (token, rank, *best), logprobs, n in zip(ids, values, num_top, strict=True)
    ]
