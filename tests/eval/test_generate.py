"""Generation in ragged batches against one prompt at a time, and the sampler against its definition."""

from collections import Counter

import pytest
import torch

from atom.eval.generate import Sampling, generate
from atom.eval.load import Loaded

from .conftest import CONTEXT, SENTENCES


def never(_: list[int]) -> bool:
    return False


def test_a_batch_gives_what_each_prompt_gives_alone(loaded: Loaded) -> None:
    lengths = (1, 9, 4, 9)
    prompts = [loaded.tokenizer.encode(text)[:length] for text, length in zip(SENTENCES, lengths, strict=True)]
    alone = [generate(loaded.model, [prompt], 7, never)[0] for prompt in prompts]
    assert generate(loaded.model, prompts, 7, never) == alone
    assert {len(tokens) for tokens in alone} == {7}


def test_each_sequence_stops_for_itself(loaded: Loaded) -> None:
    prompts = [loaded.tokenizer.encode(sentence)[:6] for sentence in SENTENCES]
    free = generate(loaded.model, prompts, 8, never)
    ends = generate(loaded.model, prompts, 8, lambda tokens: tokens[-1] == free[1][2])
    assert ends[1] == free[1][: free[1].index(free[1][2]) + 1]
    for mine, other in zip(ends, free, strict=True):
        assert mine == other[: len(mine)] and (len(mine) == 8 or mine[-1] == free[1][2])


def test_sampling_draws_from_the_kept_tokens() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)

    def shares(sampling: Sampling) -> dict[int, float]:
        counts = Counter(sampling.choose(logits.clone(), generator).tolist())
        return {token: counts[token] / 4000 for token in sorted(counts)}

    assert shares(Sampling(1.0)) == pytest.approx({0: 0.5, 1: 0.3, 2: 0.15, 3: 0.05}, abs=0.03)
    assert shares(Sampling(1.0, top_k=2)) == pytest.approx({0: 0.625, 1: 0.375}, abs=0.03)
    assert shares(Sampling(1.0, top_p=0.7)) == pytest.approx({0: 0.625, 1: 0.375}, abs=0.03)
    assert shares(Sampling(1.0, top_p=0.01)) == {0: 1.0}
    assert shares(Sampling(0.0)) == {0: 1.0}


def test_refusals(loaded: Loaded) -> None:
    with pytest.raises(ValueError, match="every prompt needs at least one token; begin an empty one with BOS"):
        generate(loaded.model, [[3], []], 4, never)
    with pytest.raises(ValueError, match=f"of {CONTEXT + 1} tokens exceeds the model's context of {CONTEXT}"):
        generate(loaded.model, [[3]], CONTEXT, never)
    with pytest.raises(ValueError, match="top_p lies in"):
        Sampling(top_p=0.0)
