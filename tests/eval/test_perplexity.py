"""Perplexity against a loop over transformers' logits, and what must not change it."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from atom.eval import forward
from atom.eval.load import Loaded
from atom.eval.perplexity import Reference, make_windows, measure_perplexity
from atom.eval.texts import Text, load_text

WINDOW = 24


def by_hand(hf_model: Any, tokens: list[list[int]]) -> float:
    """Mean NLL over all predicted tokens, one window at a time."""
    losses = []
    for row in tokens:
        ids = torch.tensor([row])
        with torch.no_grad():
            logits = hf_model(ids).logits[0, :-1]
        losses += F.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
    return math.fsum(losses) / len(losses)


def test_equals_a_loop_over_transformers(loaded: Loaded, hf_model: Any, text_file: Path) -> None:
    text = load_text(str(text_file))
    ids = loaded.tokenizer.encode(text.text)
    rows = [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]
    result = measure_perplexity(loaded.model, loaded.tokenizer, text, window=WINDOW)
    assert result.nll == pytest.approx(by_hand(hf_model, rows), abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nll))
    assert (result.windows, result.tokens, result.bos) == (len(rows), len(rows) * (WINDOW - 1), "none")
    assert result.left_out == len(ids) - len(rows) * WINDOW
    assert result.nll_stderr is not None and 0 < result.nll_stderr < 1


def test_bos_in_every_window(bos_loaded: Loaded, hf_model: Any, text_file: Path) -> None:
    text = load_text(str(text_file))
    ids = bos_loaded.tokenizer.encode(text.text, add_special_tokens=False)
    body = WINDOW - 1
    rows = [[0, *ids[i : i + body]] for i in range(0, len(ids) - body + 1, body)]
    result = measure_perplexity(bos_loaded.model, bos_loaded.tokenizer, text, window=WINDOW)
    assert result.bos == "window"
    assert result.nll == pytest.approx(by_hand(hf_model, rows), abs=1e-5)


def test_bos_policies(bos_loaded: Loaded) -> None:
    text = Text("t", "t.txt", "The quick brown fox jumps over the lazy dog. " * 9)
    ids = bos_loaded.tokenizer.encode(text.text, add_special_tokens=False)
    make = {bos: make_windows(bos_loaded.tokenizer, text, 8, bos).tokens for bos in ("window", "text", "none")}  # type: ignore[arg-type]
    assert make["window"][:, 0].tolist() == [0] * len(make["window"])
    assert make["window"][:, 1:].flatten().tolist() == ids[: make["window"][:, 1:].numel()]
    assert make["text"].flatten().tolist() == [0, *ids][: make["text"].numel()]
    assert make["none"].flatten().tolist() == ids[: make["none"].numel()]


@pytest.mark.parametrize("batch_size", [2, 5, 64])
def test_batch_size_changes_nothing(loaded: Loaded, text_file: Path, batch_size: int) -> None:
    text = load_text(str(text_file))
    one = measure_perplexity(loaded.model, loaded.tokenizer, text, window=WINDOW, batch_size=1)
    many = measure_perplexity(loaded.model, loaded.tokenizer, text, window=WINDOW, batch_size=batch_size)
    assert many.perplexity == pytest.approx(one.perplexity, rel=1e-5)
    assert many.window_nll == pytest.approx(one.window_nll, rel=1e-5)


def test_logits_in_chunks(loaded: Loaded, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = load_text(str(text_file))
    whole = measure_perplexity(loaded.model, loaded.tokenizer, text, window=WINDOW, limit=3)
    monkeypatch.setattr(forward, "LOGITS_BYTES", 4 * loaded.model.config.vocab_size * 7)  # 7 rows, no divisor of 23
    chunked = measure_perplexity(loaded.model, loaded.tokenizer, text, window=WINDOW, limit=3)
    assert chunked.nll == pytest.approx(whole.nll, rel=1e-6)


def test_limit_takes_the_first_windows(loaded: Loaded, text_file: Path) -> None:
    text = load_text(str(text_file))
    seen: list[tuple[int, int]] = []
    all_ = measure_perplexity(loaded.model, loaded.tokenizer, text, window=WINDOW)
    some = measure_perplexity(
        loaded.model,
        loaded.tokenizer,
        text,
        window=WINDOW,
        limit=4,
        batch_size=3,
        progress=lambda done, count, _: seen.append((done, count)),
    )
    assert some.window_nll == pytest.approx(all_.window_nll[:4], rel=1e-5)
    assert seen == [(3, 4), (4, 4)]


def test_a_reference_runs_once_for_the_same_windows(loaded: Loaded, text_file: Path) -> None:
    text, runs = load_text(str(text_file)), []
    handle = loaded.model.register_forward_hook(lambda *args: runs.append(1))
    known = Reference(loaded.model)
    try:
        found = [
            measure_perplexity(loaded.model, loaded.tokenizer, text, window=WINDOW, limit=2, reference=known)
            for _ in range(2)
        ]
    finally:
        handle.remove()
    assert len(runs) == 3  # twice as the model, once as the reference
    assert found[0].kl == found[1].kl == pytest.approx(0.0, abs=1e-6)


def test_default_window_is_the_context_and_a_short_text_one_window(loaded: Loaded) -> None:
    text = Text("t", "t.txt", "The quick brown fox.")
    result = measure_perplexity(loaded.model, loaded.tokenizer, text)
    assert result.windows == 1 and result.left_out == 0
    assert result.window == len(loaded.tokenizer.encode(text.text)) < loaded.model.config.max_position_embeddings
    assert result.nll_stderr is None


def test_kl_to_itself_and_to_another(loaded: Loaded, bos_loaded: Loaded, hf_model: Any, text_file: Path) -> None:
    text = load_text(str(text_file))
    same = measure_perplexity(loaded.model, loaded.tokenizer, text, window=WINDOW, limit=2, reference=loaded.model)
    assert same.kl == pytest.approx(0.0, abs=1e-6) and same.top1 == 1.0
    blurred = type(hf_model)(hf_model.config)
    state = {name: value.clone() for name, value in hf_model.state_dict().items()}
    state["model.layers.1.mlp.down_proj.weight"] *= 0.5
    blurred.load_state_dict(state)
    loaded_state = {name: state[name] for name in bos_loaded.model.state_dict()}
    original = {name: value.clone() for name, value in bos_loaded.model.state_dict().items()}
    bos_loaded.model.load_state_dict(loaded_state)
    try:
        other = measure_perplexity(
            bos_loaded.model, loaded.tokenizer, text, window=WINDOW, limit=2, reference=loaded.model
        )
    finally:
        bos_loaded.model.load_state_dict(original)
    ids = make_windows(loaded.tokenizer, text, WINDOW, limit=2).tokens
    with torch.no_grad():
        p, q = (m(ids).logits[:, :-1].log_softmax(-1) for m in (hf_model, blurred.eval()))
    assert other.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert other.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))


def test_refusals(loaded: Loaded, text_file: Path) -> None:
    text = load_text(str(text_file))
    tokenizer = loaded.tokenizer
    with pytest.raises(ValueError, match="a window of 65 tokens exceeds the model's context of 64; ask for at most 64"):
        measure_perplexity(loaded.model, tokenizer, text, window=65)
    with pytest.raises(ValueError, match="a window takes at least 2 tokens, a limit at least 1"):
        measure_perplexity(loaded.model, tokenizer, text, window=1)
    with pytest.raises(ValueError, match="has 1 tokens; perplexity predicts from a context"):
        make_windows(tokenizer, Text("t", "t.txt", "x"))
    small = dataclasses.replace(loaded.model.config, vocab_size=7)
    other = type(loaded.model).__new__(type(loaded.model))
    object.__setattr__(other, "__dict__", {**loaded.model.__dict__, "config": small})
    with pytest.raises(ValueError, match=r"vocabulary has 7 tokens.*name the model it was made from"):
        measure_perplexity(loaded.model, tokenizer, text, reference=other)


def test_a_broken_model_is_said_to_be_broken(loaded: Loaded, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        type(loaded.model), "logits", lambda self, hidden: hidden.new_full((len(hidden), 320), math.nan)
    )
    with pytest.raises(ValueError, match="the model is broken: check its weights"):
        measure_perplexity(loaded.model, loaded.tokenizer, load_text(str(text_file)), window=WINDOW)
