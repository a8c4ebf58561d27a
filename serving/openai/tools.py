"""Tool calls in a model's text, found while it is written, in the forms that model families use.

    hermes       text <tool_call>{"name": ..., "arguments": {...}}</tool_call> ...        Qwen2.5, Qwen3, Hermes
    llama3_json  <|python_tag|>{"name": ..., "parameters": {...}}; {...}                  Llama 3.x; the tag is optional
    mistral      text [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]               or [TOOL_CALLS]name{...}
    list         [{"name": ..., "parameters": {...}}, ...]                                of tool_choice "required"

A reader is fed the text piece by piece. It never takes back what it has said: text that may be the beginning of a call
waits, and what turns out to be none is content again.
"""

import re
import secrets
from collections.abc import Callable
from typing import NamedTuple

from pydantic_core import from_json, to_json

from .json_value import ValueScanner


class Piece(NamedTuple):
    """Of an answer: content, or a part of call number `call`, whose first part has its name and id."""

    text: str
    call: int | None = None
    name: str | None = None
    id: str | None = None


_HEAD = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


class CallReader:
    """One call as a JSON object; its arguments are handed on while they come, if the name stands before them."""

    def __init__(self, index: int, call_id: str) -> None:
        self.index = index
        self.call_id = call_id
        self._object = ValueScanner()
        self._raw = ""
        self._arguments: ValueScanner | None = None
        self.is_done = False

    def feed(self, text: str) -> tuple[list[Piece], str]:
        """(what is new, what comes after the object)."""
        end = self._object.feed(text)
        text, rest = text[:end], text[end:]
        self.is_done = self._object.is_done
        self._raw += text
        pieces: list[Piece] = []
        if self._arguments is None and (head := _HEAD.match(self._raw)):
            self._arguments = ValueScanner()
            pieces.append(Piece("", self.index, from_json(head[1]), self.call_id))
            text = self._raw[head.end() :]
        if self._arguments is not None:
            if not self._arguments.is_done and (new := text[: self._arguments.feed(text)]):
                pieces.append(Piece(new, self.index))
        elif self.is_done:
            pieces += self._whole()
        return pieces, rest

    def finish(self) -> list[Piece]:
        """The text has ended within the object."""
        return [Piece(self._raw)] if self._arguments is None and self._raw else []

    def _whole(self) -> list[Piece]:
        """An object whose parts stood in another order; content if it is no call."""
        try:
            value = from_json(self._raw)
        except ValueError:
            return [Piece(self._raw)]
        name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
        if not isinstance(name, str) or not isinstance(arguments, dict | str):
            return [Piece(self._raw)]
        text = arguments if isinstance(arguments, str) else to_json(arguments).decode()
        return [Piece("", self.index, name, self.call_id), Piece(text, self.index)]


class ArgumentsReader:
    """A call whose name is known, and whose text is the arguments' object alone."""

    def __init__(self, index: int, call_id: str, name: str) -> None:
        self.index = index
        self._scanner = ValueScanner()
        self._start: Piece | None = Piece("", index, name, call_id)

    @property
    def is_done(self) -> bool:
        return self._scanner.is_done

    def feed(self, text: str) -> tuple[list[Piece], str]:
        pieces = [] if self._start is None else [self._start]
        self._start = None
        end = self._scanner.feed(text)
        return [*pieces, Piece(text[:end], self.index)], text[end:]

    def finish(self) -> list[Piece]:
        return []


class ToolReader:
    """What the readers share: a buffer, and a state that eats from it until it needs more."""

    id_bytes = 12

    def __init__(self) -> None:
        self.calls = 0  # begun so far
        self._buffer = ""
        self._pieces: list[Piece] = []
        self._call: CallReader | ArgumentsReader | None = None
        self._after: Callable[[], bool] = self._begin
        self._state: Callable[[], bool] = self._begin

    def feed(self, text: str) -> list[Piece]:
        """What is new."""
        self._buffer += text
        while self._buffer and self._state():
            pass
        return self._take()

    def finish(self) -> list[Piece]:
        """What was held back: the text has ended."""
        if self._call is not None:
            self._pieces += self._call.finish()
        elif self._buffer.strip() or not self.calls:
            self._say(self._buffer)
        self._buffer = ""
        return self._take()

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        self.calls += sum(piece.name is not None for piece in pieces)
        return pieces

    def _begin(self) -> bool:
        """The state at the start of the text: True if it may go on without more text."""
        raise NotImplementedError

    def _say(self, text: str) -> None:
        if text:
            self._pieces.append(Piece(text))

    def _text_until(self, tag: str, then: Callable[[], bool]) -> bool:
        """Content up to a tag; white space before it is dropped."""
        start = self._buffer.find(tag)
        if start >= 0:
            self._say(self._buffer[:start].rstrip())
            self._buffer, self._state = self._buffer[start + len(tag) :], then
            return True
        overlap = next((k for k in range(len(tag) - 1, 0, -1) if self._buffer.endswith(tag[:k])), 0)
        end = len(self._buffer[: len(self._buffer) - overlap].rstrip())
        self._say(self._buffer[:end])
        self._buffer = self._buffer[end:]
        return False

    def _read_call(self, then: Callable[[], bool], name: str | None = None) -> bool:
        """A call, or the arguments of one that is known by name, begins with the buffer's first character."""
        number = self.calls + sum(piece.name is not None for piece in self._pieces)
        if name is None:
            self._call = CallReader(number, self._new_id())
        else:
            self._call = ArgumentsReader(number, self._new_id(), name)
        self._after, self._state = then, self._in_call
        return True

    def _in_call(self) -> bool:
        assert self._call is not None
        pieces, self._buffer = self._call.feed(self._buffer)
        self._pieces += pieces
        if not self._call.is_done:
            return False
        self._call, self._state = None, self._after
        return True

    def _new_id(self) -> str:
        return f"call_{secrets.token_hex(self.id_bytes)}"


class HermesReader(ToolReader):
    def _begin(self) -> bool:
        return self._text_until("<tool_call>", self._open)

    def _open(self) -> bool:
        self._buffer = self._buffer.lstrip()
        if not self._buffer:
            return False
        if self._buffer[0] == "{":
            return self._read_call(self._close)
        self._buffer, self._state = "<tool_call>" + self._buffer, self._content  # no call: content as it stands
        return True

    def _close(self) -> bool:
        self._buffer = self._buffer.lstrip()
        tag = "</tool_call>"
        if tag.startswith(self._buffer) and self._buffer != tag:
            return False
        self._buffer, self._state = self._buffer.removeprefix(tag), self._begin
        return True

    def _content(self) -> bool:
        self._say(self._buffer)
        self._buffer = ""
        return False


class ListReader(ToolReader):
    """Objects one after the other, with any of `separators` between them; what is no object ends them."""

    separators = "[], \t\r\n"

    def _begin(self) -> bool:
        return self._objects()

    def _objects(self) -> bool:
        self._buffer = self._buffer.lstrip(self.separators)
        if self._buffer and self._buffer[0] == "{":
            return self._read_call(self._objects)
        if self._buffer:
            self._state = self._rest
        return bool(self._buffer)

    def _rest(self) -> bool:
        self._say(self._buffer)
        self._buffer = ""
        return False


class LlamaReader(ListReader):
    separators = ";, \t\r\n"
    tag = "<|python_tag|>"

    def _begin(self) -> bool:
        stripped = self._buffer.lstrip(self.separators)
        if self.tag.startswith(stripped) and stripped != self.tag:
            return False
        if stripped[0] != "{" and not stripped.startswith(self.tag):
            self._state = self._rest  # an answer in words: as it stands, white space included
            return True
        self._buffer, self._state = stripped.removeprefix(self.tag), self._objects
        return True


class MistralReader(ListReader):
    def _begin(self) -> bool:
        return self._text_until("[TOOL_CALLS]", self._open)

    def _open(self) -> bool:
        self._buffer = self._buffer.lstrip()
        if not self._buffer:
            return False
        if self._buffer[0] in "[{":
            self._state = self._objects
            return True
        name, brace, rest = self._buffer.partition("{")  # the newer form: name{...} or name[ARGS]{...}
        if not brace:
            return False
        self._buffer = brace + rest
        return self._read_call(self._begin, name.strip().removesuffix("[ARGS]").strip())

    def _new_id(self) -> str:
        return secrets.token_hex(5)[:9]  # Mistral's templates insist on nine letters and digits


class NamedReader(ToolReader):
    """The arguments of one function, which tool_choice named and guidance holds the model to."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _begin(self) -> bool:
        self._buffer = self._buffer.lstrip()
        return bool(self._buffer) and self._read_call(self._end, self.name)

    def _end(self) -> bool:
        self._buffer = ""
        return False


PARSERS: dict[str, type[ToolReader]] = {"hermes": HermesReader, "llama3_json": LlamaReader, "mistral": MistralReader}


def detect_parser(chat_template: str | None) -> str | None:
    """How a model writes tool calls, by what its chat template says of them; None if it says nothing known."""
    template = chat_template or ""
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<tool_call>" in template and "<function=" not in template:
        return "hermes"
    return "llama3_json" if "<|python_tag|>" in template else None
