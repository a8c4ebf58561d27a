"""Whether and how an answer may call tools: `tools`, `tool_choice` and `parallel_tool_calls` of a request."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidRequestError
from ..guidance_spec import GuidanceSpec, schema_spec
from .messages import check_tools
from .protocol import ChatRequest
from .tools import PARSERS, ListReader, NamedReader, ToolReader


@dataclass(frozen=True)
class ToolUse:
    """What becomes of an answer's text.

    reader                makes a sample's reader of tool calls, or None if it has none to read
    guidance              what the text is held to, if a call is demanded
    reads_special_tokens  calls are marked by special tokens, which must then stay in the text
    is_named              one function was demanded by name
    """

    reader: Callable[[], ToolReader | None] = lambda: None
    guidance: GuidanceSpec | None = None
    reads_special_tokens: bool = False
    is_named: bool = False


def choose_tools(body: ChatRequest, parser: str | None) -> ToolUse:
    """What the request wants; InvalidRequestError (`field`: tools, tool_choice) if that cannot be."""
    functions = check_tools(body.tools)
    choice = body.tool_choice if body.tool_choice is not None else "auto" if functions else "none"
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            raise _wrong(choice)
        if choice == "none":
            return ToolUse()
    if not functions:
        raise InvalidRequestError("tools", f"tool_choice {str(choice)[:80]!r} needs tools; send some.")
    if choice == "auto":
        return _auto(parser)
    if body.response_format not in (None, {"type": "text"}):
        raise InvalidRequestError(
            "response_format", "response_format and a demanded tool call exclude each other; leave one of them out."
        )
    if choice == "required":
        return ToolUse(ListReader, schema_spec("tools", _calls_schema(functions, body.parallel_tool_calls)))
    name = _name(choice)
    if name not in functions:
        known = ", ".join(functions)[:200]
        raise InvalidRequestError("tool_choice", f"tool_choice names {name[:80]!r}, the tools are {known}; use one.")
    schema = functions[name].get("parameters") or {"type": "object"}
    return ToolUse(lambda: NamedReader(name), schema_spec("tools", schema), is_named=True)


def _auto(parser: str | None) -> ToolUse:
    if parser is None:
        raise InvalidRequestError(
            "tools",
            "the model's chat template knows no tools; leave them out, demand a call with tool_choice, or serve with "
            "--tool-call-parser.",
        )
    return ToolUse(PARSERS[parser], reads_special_tokens=True)


def _name(choice: Any) -> str:
    function = choice.get("function") if isinstance(choice, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _wrong(choice)
    name: str = function["name"]
    return name


def _wrong(choice: Any) -> InvalidRequestError:
    needed = 'none, auto, required or {"type": "function", "function": {"name": ...}}'
    return InvalidRequestError("tool_choice", f"tool_choice must be {needed}, got {str(choice)[:80]!r}; correct it.")


def _calls_schema(functions: dict[str, dict[str, Any]], is_parallel: bool) -> dict[str, Any]:
    """A list of one or more calls, each with its own function's parameters."""
    calls = [
        {
            "type": "object",
            # with an id, "#/$defs/..." within a function's schema is meant from that schema's root
            "properties": {
                "name": {"const": name},
                "parameters": {"$id": f"tool:{place}", **(function.get("parameters") or {"type": "object"})},
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for place, (name, function) in enumerate(functions.items())
    ]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    return schema if is_parallel else schema | {"maxItems": 1}
