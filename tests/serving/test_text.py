import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atom.serving.text import TextStream, vocabulary_of

from .tiny_tokenizers import ALL, byte_level, metaspace, sentencepiece

ROOT = os.environ.get("ATOM_TEST_MODELS", "")
MODELS = sorted(path.parent for path in Path(ROOT).glob("*/tokenizer.json")) if ROOT else []
NO_MODELS = pytest.mark.skip(reason="ATOM_TEST_MODELS names no directory with models")
NAMES = [*ALL, *(map(str, MODELS) if MODELS else [pytest.param("", marks=NO_MODELS)])]
TEXTS = (
    "he hello  the naïve 😀😃🎉 family 👩‍👩‍👧‍👦 a .b , c",
    "日本語 のテキスト，中文。 한국어 עברית\n\n\tمرحبا 0.25 <think> it 's",
)
_made: dict[str, Any] = {}


def tokenizer(name: str) -> Any:
    if name not in _made:
        from transformers import AutoTokenizer

        _made[name] = ALL[name]() if name in ALL else AutoTokenizer.from_pretrained(name)
    return _made[name]


def decode(hf: Any, tokens: list[int], skip: bool = False) -> str:
    text: str = hf.backend_tokenizer.decode(tokens, skip_special_tokens=skip)
    return text


def pieces(stream: TextStream, tokens: list[int], step: int = 1) -> list[str]:
    """Each step's text, and that of the end."""
    out = [stream.feed(tokens[i : i + step])[0] for i in range(0, len(tokens), step)]
    return [*out, stream.feed([], True)[0]]


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)  # the first example makes the tokenizer
@given(data=st.data())
def test_pieces_join_to_what_the_tokenizer_decodes(name: str, data: st.DataObject) -> None:
    hf = tokenizer(name)
    beyond = len(hf) + 3  # a model's vocabulary is often longer than its tokenizer's
    tokens = data.draw(st.lists(st.integers(0, beyond), max_size=60))
    skip, step = data.draw(st.booleans()), data.draw(st.integers(1, 3))
    assert "".join(pieces(TextStream(hf, skip_special_tokens=skip), tokens, step)) == decode(hf, tokens, skip)


@pytest.mark.parametrize("name", ["byte_level", "byte_level_chain", "sentencepiece"])
@settings(deadline=None)  # the first example makes the tokenizer
@given(data=st.data())
def test_pieces_join_whatever_the_bytes(name: str, data: st.DataObject) -> None:
    """Bytes that mostly are halves of characters, and long runs of them."""
    hf = tokenizer(name)
    if name == "sentencepiece":
        ids = [hf.convert_tokens_to_ids(f"<0x{b:02X}>") for b in b"A\xc3\xa9\xf0\x9f\x98\x80\xff"] + hf.encode("a")
    else:
        ids = [hf.convert_tokens_to_ids(c) for c in "AÃ©ðŁĺĢÿ"]
    assert None not in ids
    tokens = data.draw(st.lists(st.sampled_from(ids), max_size=40))
    assert "".join(pieces(TextStream(hf), tokens)) == decode(hf, tokens)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_at_once_and_whole(name: str, text: str) -> None:
    hf = tokenizer(name)
    tokens = hf.encode(text, add_special_tokens=False)
    shown, stream = "", TextStream(hf)
    for place, token in enumerate(tokens):
        shown += stream.feed([token])[0]
        if "\N{REPLACEMENT CHARACTER}" not in decode(hf, tokens[: place + 1]):
            behind = len(decode(hf, tokens[: place + 1])) - len(shown)
            assert behind == 0 or vocabulary_of(hf).is_byte(token), "a whole character was held back"
        assert decode(hf, tokens).startswith(shown), "half a character was shown"
    assert shown + stream.feed([], True)[0] == decode(hf, tokens)


@pytest.mark.parametrize("make", [sentencepiece, metaspace])
def test_a_first_space_depends_on_the_prompt(make: Any) -> None:
    hf = make()
    output = hf.convert_tokens_to_ids(["▁", "a", "▁", "b"])
    prompt = hf.convert_tokens_to_ids(["x"])
    assert "".join(pieces(TextStream(hf), output)) == "a b"
    assert "".join(pieces(TextStream(hf, prompt), output)) == " a b"
    bos = [hf.bos_token_id, *hf.convert_tokens_to_ids(["<|tool|>"])]
    assert "".join(pieces(TextStream(hf, bos), output)) == "a b"


def test_a_prompt_that_ends_within_a_character() -> None:
    hf = sentencepiece()
    smile = [hf.convert_tokens_to_ids(f"<0x{b:02X}>") for b in "😀".encode()]
    (a,) = hf.convert_tokens_to_ids(["a"])
    assert "".join(pieces(TextStream(hf, [a, *smile]), [*smile, a])) == "😀a"
    assert "".join(pieces(TextStream(hf, [a, *smile[:2]]), [a])) == "a"


def test_ids_beyond_the_vocabulary_do_not_part_a_run_of_bytes() -> None:
    hf = sentencepiece()
    zero, broken = hf.convert_tokens_to_ids(["<0x00>", "<0x80>"])
    assert "".join(pieces(TextStream(hf), [zero, len(hf), broken])) == decode(hf, [zero, len(hf), broken])


def test_special_tokens_are_shown_on_request() -> None:
    for make in ALL.values():
        hf = make()
        tokens = [*hf.convert_tokens_to_ids(["a", "</s>", "b", "<think>"])]
        assert "".join(pieces(TextStream(hf, skip_special_tokens=False), tokens)) == decode(hf, tokens)
        assert "</s>" in decode(hf, tokens)
        shown = "".join(pieces(TextStream(hf), tokens))
        assert "</s>" not in shown
        assert "<think>" in shown


def test_stop_string_over_token_borders() -> None:
    hf = byte_level()
    tokens = hf.encode("so he said STOP and went")
    stream, shown = TextStream(hf, stop=("STOP",)), []
    for token in tokens:
        text, found = stream.feed([token])
        shown.append(text)
        if found:
            break
    assert found == "STOP"
    assert "".join(shown) == "so he said "
    assert stream.feed(tokens, True) == ("", "STOP"), "no text after a stop string"
    stream = TextStream(hf, stop=("STOP",), include_stop=True)
    assert stream.feed(tokens) == ("so he said STOP", "STOP")


def test_what_could_become_a_stop_string_waits_until_it_cannot() -> None:
    hf = byte_level()
    stream = TextStream(hf, stop=("ab!",))
    told = [stream.feed(hf.encode(c))[0] for c in "xabay"]
    assert told == ["x", "", "", "ab", "ay"]
    assert stream.feed(hf.encode("a"), True) == ("a", None), "the end frees what waits"


def test_stop_strings_of_the_first_tokens_do_not_count() -> None:
    hf = byte_level()
    for step in (1, 2, 9):
        stream, shown, found = TextStream(hf, stop=("ab",), min_tokens=4), "", None
        tokens = hf.encode("xabcxaby")
        for start in range(0, len(tokens), step):
            text, found = stream.feed(tokens[start : start + step], start + step >= len(tokens))
            shown += text
            if found:
                break
        assert (shown, found) == ("xabcx", "ab")


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_long_runs_of_broken_bytes_cost_linear_time(make: Any) -> None:
    hf = make()
    token = hf.convert_tokens_to_ids("<0x80>" if make is sentencepiece else "Ģ")

    def cost(number: int) -> float:
        stream = TextStream(hf)
        start = time.process_time()
        text = "".join(pieces(stream, [token] * number))
        assert len(text) == number
        return time.process_time() - start

    cost(100)
    assert min(cost(8000) for _ in range(3)) < 40 * min(cost(1000) for _ in range(3)) + 0.05


def test_a_token_costs_the_same_late_as_early() -> None:
    hf = sentencepiece()
    stream = TextStream(hf)
    for _ in range(2000):
        stream.feed(hf.encode("a"))
    assert len(stream._decoder._tokens) < 40  # type: ignore[union-attr]
