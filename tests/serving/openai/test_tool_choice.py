"""What a demanded tool call may be, tried byte by byte."""

from typing import Any

import pytest

from atom.serving.guidance import grammar_of
from atom.serving.openai.protocol import ChatRequest
from atom.serving.openai.tool_choice import choose_tools

llguidance = pytest.importorskip("llguidance", reason="needs llguidance: pip install 'atom-serving[serving]'")


def tool(name: str, item: dict[str, Any]) -> dict[str, Any]:
    """A function of one argument, whose type is a definition that every tool calls Item."""
    parameters = {
        "type": "object",
        "properties": {"x": {"$ref": "#/$defs/Item"}},
        "required": ["x"],
        "additionalProperties": False,
        "$defs": {"Item": item},
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def is_allowed(choice: Any, text: str, tools: list[dict[str, Any]], **fields: Any) -> bool:
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": tools, "tool_choice": choice, **fields}
    spec = choose_tools(ChatRequest.model_validate(body), None).guidance
    assert spec is not None
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, grammar_of(spec), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.tokenize_str(text)
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


TOOLS = [tool("count", {"type": "integer"}), tool("say", {"type": "string"})]


def test_definitions_of_one_name_belong_to_their_own_tool() -> None:
    assert is_allowed("required", '[{"name":"count","parameters":{"x":1}}]', TOOLS)
    assert is_allowed("required", '[{"name":"say","parameters":{"x":"a"}}]', TOOLS)
    assert not is_allowed("required", '[{"name":"say","parameters":{"x":1}}]', TOOLS)
    assert not is_allowed("required", '[{"name":"count","parameters":{"x":"a"}}]', TOOLS)


def test_number_of_calls() -> None:
    one = '{"name":"count","parameters":{"x":1}}'
    assert is_allowed("required", f"[{one},{one}]", TOOLS)
    assert not is_allowed("required", f"[{one},{one}]", TOOLS, parallel_tool_calls=False)
    assert not is_allowed("required", "[]", TOOLS)


def test_a_named_function_has_its_arguments_alone() -> None:
    choice = {"type": "function", "function": {"name": "say"}}
    assert is_allowed(choice, '{"x":"a"}', TOOLS)
    assert not is_allowed(choice, '{"x":1}', TOOLS)


def test_a_function_without_parameters_takes_any_object() -> None:
    tools = [{"type": "function", "function": {"name": "go"}}]
    assert is_allowed("required", '[{"name":"go","parameters":{"any":[1]}}]', tools)
