"""Generation of one sequence with a dense cache: for a first look at a model, not for serving."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from .kv import DenseKV
from .model import Model


@torch.inference_mode()
def generate(
    model: Model,
    token_ids: Sequence[int],
    max_new_tokens: int,
    eos: Collection[int] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yield the tokens that continue `token_ids`, one by one, up to `max_new_tokens` or an EOS token.

    eos          ids that end the text, and are not yielded; the model's own by default
    temperature  0 takes the most likely token; above, tokens are drawn, repeatably for a seed
    Raises ValueError for an empty prompt or a text beyond the model's positions.
    """
    ends = set(model.config.eos_token_ids if eos is None else eos)
    total, limit = len(token_ids) + max_new_tokens, model.config.max_position_embeddings
    if not token_ids:
        raise ValueError("the prompt has no tokens; at least one is needed; begin with the BOS token.")
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}; use 0 for the most likely token.")
    if total > limit:
        raise ValueError(
            f"{len(token_ids)} tokens of prompt and {max_new_tokens} new ones make {total}; the model has {limit} "
            "positions; shorten the prompt or ask for fewer."
        )
    kv = scheme_cache(model, max_len=total)
    generator = torch.Generator().manual_seed(seed)
    step = torch.tensor(list(token_ids), device=model.device)
    for _ in range(max_new_tokens):
        hidden = model(step, kv.positions(len(step)), kv)
        token = _choose(model.logits(hidden[-1:])[0], temperature, generator)
        if token in ends:
            return
        yield token
        step = torch.tensor([token], device=model.device)


def scheme_cache(model: Model, batch: int = 1, max_len: int | None = None) -> DenseKV:
    """A dense cache in the format that the model's scheme asks for."""
    return DenseKV.for_scheme(model.config, model.scheme, batch, model.device, model.dtype, max_len)


def _choose(scores: Tensor, temperature: float, generator: torch.Generator) -> int:
    """The next token from scores [vocab_size]; drawn on the CPU, so that a seed means the same on any device."""
    if temperature == 0:
        return int(scores.argmax())
    probabilities = (scores.float().cpu() / temperature).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
