"""The loaded model as evaluation calls it: token batches in, hidden states out, logits only where they are read.

This is the model's own quantized execution path: what is scored here is what is served.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from atom.models.generate import scheme_cache
from atom.models.kv import DenseKV
from atom.models.model import Model

LOGITS_BYTES = 128 * 2**20  # of one chunk of float32 logits: 128 rows of a vocabulary of 262,144
TOKENS_PER_FORWARD = {"cpu": 2048, "cuda": 16384}


def execution_path(model: Model, kernels: str) -> Literal["kernels", "reference"]:
    """Which implementation of the quantized ops runs: there is no silent fallback, so the request says it."""
    is_kernels = model.scheme is not None and model.device.type == "cuda" and kernels != "reference"
    return "kernels" if is_kernels else "reference"


def hidden_states(model: Model, tokens: Tensor, cache: DenseKV | None = None) -> Tensor:
    """Final hidden states [batch, seq, hidden_size] of tokens [batch, seq], added to `cache` (default: new)."""
    batch, seq = tokens.shape
    cache = scheme_cache(model, batch, seq) if cache is None else cache
    hidden: Tensor = model(tokens.to(model.device).flatten(), cache.positions(seq), cache)
    return hidden.view(batch, seq, -1)


def logit_chunks(model: Model, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Float32 logits of hidden [T, hidden_size], LOGITS_BYTES at a time: pairs of (rows, [rows, vocab_size])."""
    rows = max(1, LOGITS_BYTES // (4 * model.config.vocab_size))
    for start in range(0, hidden.shape[0], rows):
        yield slice(start, start + rows), model.logits(hidden[start : start + rows]).float()


def default_batch(model: Model, seq: int) -> int:
    """How many sequences of `seq` tokens go through the model at once."""
    budget = TOKENS_PER_FORWARD.get(model.device.type, TOKENS_PER_FORWARD["cpu"])
    return max(1, budget // max(1, seq))


def check_fits(model: Model, tokens: int, what: str) -> None:
    """Raise ValueError if `tokens` positions exceed the model's context."""
    limit = model.config.max_position_embeddings
    if tokens > limit:
        raise ValueError(
            f"{what} of {tokens:,} tokens exceeds the model's context of {limit:,}; ask for at most {limit:,}"
        )


def right_pad(sequences: list[list[int]], fill: int = 0) -> Tensor:
    """int64 [batch, longest]: shorter sequences filled on the right, where causal attention never looks."""
    longest = max(map(len, sequences))
    return torch.tensor([sequence + [fill] * (longest - len(sequence)) for sequence in sequences], dtype=torch.int64)
