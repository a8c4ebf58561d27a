"""Batched generation for tasks: prompts of unlike length share a cache without padding.

The shortest prompt's length is prefilled for all; then all sequences step together, a longer prompt feeding its own
tokens until it is used up. Every token stands at its true position, so no mask is needed and a sequence's logits do
not depend on its neighbours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atom.models.generate import scheme_cache
from atom.models.model import Model

from .forward import check_fits, hidden_states


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the most likely one at temperature 0, else drawn.

    top_k (0: all) and top_p (1.0: all) keep the most likely tokens; `seed` makes a run repeatable.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"{self}: temperature and top_k are at least 0, top_p lies in (0, 1]")

    def choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """logits [batch, vocab] float32 -> tokens [batch] int64."""
        if self.temperature == 0.0:
            return logits.argmax(-1)
        scores, order = (logits / self.temperature).sort(-1, descending=True)
        if self.top_k:
            scores[:, self.top_k :] = float("-inf")
        probabilities = scores.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # mass of the likelier tokens: the likeliest always stays
        probabilities = probabilities.masked_fill(before >= self.top_p, 0.0).cpu()
        drawn = torch.multinomial(probabilities, 1, generator=generator).to(order.device)
        return order.gather(-1, drawn).squeeze(-1)


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    is_finished: Callable[[list[int]], bool],
    sampling: Sampling | None = None,
) -> list[list[int]]:
    """Continue each prompt by at most `max_new_tokens`; returns only the new tokens.

    is_finished  called with a sequence's new tokens after each of them; True ends that sequence, the last token kept
    Raises ValueError for an empty prompt, or if the longest prompt and its continuation exceed the model's context.
    """
    if not prompts or min(map(len, prompts)) == 0:
        raise ValueError("every prompt needs at least one token; begin an empty one with BOS")
    sampling = Sampling() if sampling is None else sampling
    longest = max(map(len, prompts))
    check_fits(model, longest + max_new_tokens, "a prompt with its continuation")
    generator = torch.Generator().manual_seed(sampling.seed)
    new: list[list[int]] = [[] for _ in prompts]
    open_ = [max_new_tokens > 0] * len(prompts)
    cache = scheme_cache(model, len(prompts), longest + max_new_tokens)
    length = min(map(len, prompts))
    tokens = torch.tensor([list(prompt[:length]) for prompt in prompts], dtype=torch.int64)
    with torch.inference_mode():
        while any(open_):
            hidden = hidden_states(model, tokens, cache)[:, -1]
            chosen = sampling.choose(model.logits(hidden).float(), generator).tolist()
            step = []
            for index, prompt in enumerate(prompts):
                if length < len(prompt):
                    step.append(prompt[length])
                    continue
                step.append(chosen[index])  # a finished sequence goes on unread: its row of the cache stays full
                if open_[index]:
                    new[index].append(chosen[index])
                    open_[index] = len(new[index]) < max_new_tokens and not is_finished(new[index])
            tokens = torch.tensor(step, dtype=torch.int64)[:, None]
            length += 1
    return new
