"""Tool calls in text: the same result however the text is cut."""

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atom.serving.openai.tools import (
    HermesReader,
    ListReader,
    LlamaReader,
    MistralReader,
    NamedReader,
    ToolReader,
    detect_parser,
)

Calls = list[tuple[str, str]]
TWO = '{"name": "w", "arguments": {"a": "}\\"{", "b": [1, {}]}}'
LIST = '[{"name": "w", "parameters": {"a": 1}}, {"name": "v", "parameters": {}}]'
TWO_CALLS = [("w", '{"a": 1}'), ("v", "{}")]
CASES: list[tuple[Callable[[], ToolReader], str, str, Calls]] = [
    (
        HermesReader,
        f'Sure.\n<tool_call>\n{TWO}\n</tool_call>\n<tool_call>{{"arguments": {{"x":1}}, "name":"z"}}</tool_call>',
        "Sure.",
        [("w", '{"a": "}\\"{", "b": [1, {}]}'), ("z", '{"x":1}')],
    ),
    (HermesReader, "no call <tool no", "no call <tool no", []),
    (HermesReader, "a <b> c  \n d ", "a <b> c  \n d ", []),
    (HermesReader, "<tool_call>junk</tool_call>", "<tool_call>junk</tool_call>", []),
    (HermesReader, '<tool_call>{"name": 3}</tool_call>', '{"name": 3}', []),
    (HermesReader, '<tool_call>{"name": "w", "arguments": {"a": 1', "", [("w", '{"a": 1')]),
    (HermesReader, '<tool_call>{"na', '{"na', []),
    (HermesReader, '<tool_call>{"name": "w", "arguments": "{}"}</tool_call>', "", [("w", "{}")]),
    (LlamaReader, '{"name": "w", "parameters": {"a": 1}}; {"name": "v", "parameters": {}}', "", TWO_CALLS),
    (LlamaReader, '<|python_tag|>{"type": "function", "name": "w", "parameters": {"a": 1}}', "", [("w", '{"a": 1}')]),
    (LlamaReader, ' Hello {"a"}', ' Hello {"a"}', []),
    (LlamaReader, '{"a": 1}', '{"a": 1}', []),
    (MistralReader, f"[TOOL_CALLS] {LIST.replace('parameters', 'arguments')}", "", TWO_CALLS),
    (MistralReader, 'hm [TOOL_CALLS]w{"a": 1}[TOOL_CALLS]v[ARGS]{"b":2}', "hm", [("w", '{"a": 1}'), ("v", '{"b":2}')]),
    (MistralReader, "no [TOOL", "no [TOOL", []),
    (ListReader, LIST, "", TWO_CALLS),
    (lambda: NamedReader("f"), ' {"a": {"b": 1}}\n', "", [("f", '{"a": {"b": 1}}')]),
]  # fmt: skip


def read(reader: ToolReader, text: str, size: int) -> tuple[str, Calls, list[str]]:
    pieces = [piece for at in range(0, len(text), size) for piece in reader.feed(text[at : at + size])]
    pieces += reader.finish()
    content, calls, ids = "", [], []
    for piece in pieces:
        if piece.call is None:
            content += piece.text
            continue
        if piece.name is not None:
            assert piece.call == len(calls), "calls are numbered in order"
            calls.append([piece.name, ""])
            assert piece.id is not None
            ids.append(piece.id)
        calls[piece.call][1] += piece.text
    return content, [(name, arguments) for name, arguments in calls], ids


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(("make", "text", "content", "calls"), CASES)
def test_calls_and_content(make: Callable[[], ToolReader], text: str, content: str, calls: Calls, size: int) -> None:
    got_content, got_calls, ids = read(make(), text, size)
    assert (got_content, got_calls) == (content, calls)
    assert len(set(ids)) == len(calls)


def test_arguments_come_while_they_are_written() -> None:
    reader = HermesReader()
    before = reader.feed('<tool_call>{"name": "w", "arguments": {"city": "Par')
    assert [piece.text for piece in before] == ["", '{"city": "Par']
    assert [piece.text for piece in reader.feed('is"}}</tool_call>')] == ['is"}']


def test_mistral_ids_are_nine_letters_and_digits() -> None:
    _, _, ids = read(MistralReader(), '[TOOL_CALLS] [{"name": "w", "arguments": {}}]', 1000)
    assert len(ids[0]) == 9 and ids[0].isalnum()


def test_the_template_tells_the_form() -> None:
    assert detect_parser("... <tool_call> ...") == "hermes"
    assert detect_parser("[AVAILABLE_TOOLS] ... [TOOL_CALLS]") == "mistral"
    assert detect_parser("<|python_tag|>") == "llama3_json"
    assert detect_parser("<tool_call><function=") is None
    assert detect_parser(None) is None


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<tool", "[TOOL_CALLS]", "[TOOL", "[ARGS]", "<|python_tag|>", "<|py",
    "{", "}", "[", "]",
    '"', "\\", ",", ";", ":", " ", "\n", "text", "name", "é😀", "null", "1",
    '{"name": "w", "arguments": {"a": 1}}', '{"name": "w", "parameters": {}}', '"name": "v"', '"arguments": {',
    '{"name": 3}',
]  # fmt: skip
READERS = [HermesReader, LlamaReader, MistralReader, ListReader, lambda: NamedReader("f")]


@pytest.mark.parametrize("make", READERS)
@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(st.sampled_from(FRAGMENTS), max_size=14), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=9)
)
def test_any_text_reads_the_same_in_any_pieces(
    make: Callable[[], ToolReader], parts: list[str], sizes: list[int]
) -> None:
    text = "".join(parts)
    whole_content, whole_calls, _ = read(make(), text, max(1, len(text)))
    reader, at, pieces = make(), 0, []
    for size in itertools.cycle(sizes):
        if at >= len(text):
            break
        pieces += reader.feed(text[at : at + size])
        at += size
    pieces += reader.finish()
    assert "".join(p.text for p in pieces if p.call is None) == whole_content
    numbers = sorted({p.call for p in pieces if p.call is not None})
    assert numbers == list(range(len(whole_calls))) == list(range(reader.calls))
    for number, (name, arguments) in enumerate(whole_calls):
        own = [p for p in pieces if p.call == number]
        assert [p.name for p in own if p.name is not None] == [name]
        assert "".join(p.text for p in own) == arguments
