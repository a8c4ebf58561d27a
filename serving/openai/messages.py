"""Conversations as clients send them, made into what chat templates read.

Templates are written for transformers: content is a text, and a tool call's arguments are an object, where the API has
lists of parts and a string of JSON.
"""

from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json

from ..errors import InvalidRequestError
from .errors import invalid

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_TOOLS = 128


def template_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages for a template; ApiError names the one that is wrong."""
    if not messages:
        raise InvalidRequestError("messages", "messages must have at least one message, got none; add one.")
    return [_message(f"messages[{place}]", message) for place, message in enumerate(messages)]


def _message(where: str, message: dict[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    if role not in ROLES:
        raise invalid(f"{where}.role", f"role must be one of {', '.join(ROLES)}, got {str(role)[:80]!r}; correct it.")
    made: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls = message.get("tool_calls")
    made["content"] = _content(f"{where}.content", message.get("content"), may_lack=role == "assistant")
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise invalid(f"{where}.tool_calls", "tool_calls must be a list in an assistant's message; drop it.")
        made["tool_calls"] = [_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None:
            if not isinstance(message[key], str):
                raise invalid(f"{where}.{key}", f"{key} must be a text, got {str(message[key])[:80]!r}; correct it.")
            made[key] = message[key]
    return made


def _content(where: str, content: Any, may_lack: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and may_lack:
        return ""
    if not isinstance(content, list):
        raise invalid(where, f"content must be a text or a list of parts, got {str(content)[:80]!r}; send a text.")
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
            raise invalid(
                f"{where}[{place}]", f"this model reads text alone, got a part of type {str(kind)[:80]!r}; drop it."
            )
        texts.append(part[kind])
    return "\n".join(texts)


def _call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid(f"{where}.function", 'a tool call must be {"id", "type": "function", "function"}; correct it.')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = from_json(arguments, allow_inf_nan=False) if arguments.strip() else {}
        except ValueError as error:
            raise invalid(f"{where}.function.arguments", f"arguments must be JSON: {error}; correct them.") from None
    if not isinstance(arguments, dict):
        raise invalid(f"{where}.function.arguments", f"arguments must be an object, got {str(arguments)[:80]!r}.")
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return made | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})


def check_tools(tools: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The tools' functions by name; ApiError names what is wrong."""
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError("tools", f"tools must have at most {MAX_TOOLS} items, got {len(tools)}; send fewer.")
    found: dict[str, dict[str, Any]] = {}
    for place, tool in enumerate(tools):
        where = f"tools[{place}]"
        function = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, dict):
            raise invalid(f"{where}.type", 'a tool must be {"type": "function", "function": {...}}; correct it.')
        name = function.get("name")
        if not isinstance(name, str) or not 0 < len(name) <= 256:
            raise invalid(f"{where}.function.name", "a function's name must be a text of 1 to 256 characters; add it.")
        if not isinstance(function.get("parameters") or {}, dict):
            raise invalid(f"{where}.function.parameters", "parameters must be a JSON schema, an object; correct them.")
        found[name] = function
    return found
