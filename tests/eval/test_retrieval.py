"""Retrieval from long contexts: what the contexts hold, and that numbers are found where the model knows them."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from atom.eval import retrieval
from atom.eval.load import Loaded
from atom.eval.retrieval import KEYS, NAMES, make_haystack, measure_retrieval


def test_a_context_holds_each_number_once_and_asks_for_it_once(loaded: Loaded) -> None:
    for length, seed in ((4000, 0), (2600, 1)):
        haystack = make_haystack(loaded.tokenizer, length, seed)
        assert length - len(loaded.tokenizer.encode(retrieval.NOISE)) < len(haystack.tokens) <= length
        text = loaded.tokenizer.decode(haystack.tokens)
        said = dict(line.removesuffix(".").split(" is ") for line in text.splitlines() if line.startswith("The secret"))
        assert {key.removeprefix("The secret number of ") for key in said} == set(NAMES)
        for first, last in haystack.answers:
            before = loaded.tokenizer.decode(haystack.tokens[:first]).splitlines()
            name = before[-2].removeprefix("Question: what is the secret number of ").removesuffix("?")
            assert before[-1] == "Answer:"
            answer = loaded.tokenizer.decode(haystack.tokens[first:last])
            assert answer == f" {said[f'The secret number of {name}']}" and text.count(answer) == 2
    assert not torch.equal(
        make_haystack(loaded.tokenizer, 4000, 1).tokens, make_haystack(loaded.tokenizer, 4000, 2).tokens
    )


def test_keys_lie_at_even_depths(loaded: Loaded) -> None:
    haystack = make_haystack(loaded.tokenizer, 6000, 0)
    lines = loaded.tokenizer.decode(haystack.tokens).split("\n\nQuestion")[0].splitlines()
    places = [number for number, line in enumerate(lines) if line.startswith("The secret")]
    gaps = [b - a for a, b in itertools.pairwise(places)]
    assert places[0] == 0 and places[-1] == len(lines) - 1 and max(gaps) - min(gaps) <= 1


def test_a_number_is_found_where_all_of_its_tokens_are(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a model that knows the text but for every other question's last digit, over pieces of the context."""
    length = 2600
    haystack = make_haystack(loaded.tokenizer, length, 0)
    known = torch.cat([haystack.tokens[1:], torch.zeros(1, dtype=torch.int64)])
    for _, last in haystack.answers[::2]:
        known[last - 2] += 1
    seen = 0

    def hidden(model: object, tokens: Tensor, cache: object) -> Tensor:
        nonlocal seen
        seen += tokens.shape[1]
        one_hot: Tensor = torch.nn.functional.one_hot(known[seen - tokens.shape[1] : seen], 1000).float()
        return one_hot[None]

    monkeypatch.setattr(retrieval, "hidden_states", hidden)
    monkeypatch.setattr(retrieval, "logit_chunks", lambda model, hidden: [(slice(None), hidden)])
    monkeypatch.setattr(retrieval, "PIECE", 100)
    monkeypatch.setattr(
        loaded.model, "config", dataclasses.replace(loaded.model.config, max_position_embeddings=length)
    )
    found = measure_retrieval(loaded.model, loaded.tokenizer, length, contexts=1)
    metric = found.metrics["found"]
    assert metric.per_sample == (0.0, 1.0) * (KEYS // 2) and metric.value == 0.5
    assert found.primary[0] == "found" and found.task == "retrieval-2600" and found.samples == KEYS


def test_refusals(loaded: Loaded) -> None:
    with pytest.raises(ValueError, match="exceeds the model's context"):
        measure_retrieval(loaded.model, loaded.tokenizer, 4096)
    with pytest.raises(ValueError, match="a retrieval context of 100 tokens is too short"):
        make_haystack(loaded.tokenizer, 100, 0)
