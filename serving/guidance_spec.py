"""What a text must look like, as a value: a JSON schema, any JSON object, a regular expression, a grammar, or a choice.

Only bounds that need no compiler are checked here: how large, how deep, how long a single string. They keep the time of
a token's mask within a few milliseconds on the engine's thread: it grows with the square of a literal's length, and was
measured at 90 ms for one of 60000 characters and 2 ms for one of 8000.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .errors import InvalidRequestError

Kind = Literal["json_schema", "json_object", "regex", "grammar", "choice"]

MAX_SCHEMA = 2**17  # characters
MAX_SCHEMA_DEPTH = 100  # the compiler's own limit is 128
MAX_GRAMMAR = 2**13
MAX_LITERAL = 2**13  # of a regular expression, a choice, or a string in a schema
MAX_CHOICES = 4096


@dataclass(frozen=True)
class GuidanceSpec:
    """How the output is constrained; make it with one of the functions below, which also read what clients send.

    value  the schema as JSON text, the regular expression, or the grammar; choices are separated by NUL
    field  of the request that said so, for errors

    Raises InvalidRequestError for `field` if it is too large.
    """

    kind: Kind
    value: str = ""
    field: str = field(default="guidance", compare=False)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise self.wrong(f"of kind {', '.join(get_args(Kind))}", self.kind, "choose one of them")
        if not isinstance(self.value, str) or bool(self.value) == (self.kind == "json_object"):
            raise self.wrong("a text that is not empty", self.value, "send the schema, expression, grammar or choices")
        limit = {"json_schema": MAX_SCHEMA, "choice": MAX_SCHEMA, "grammar": MAX_GRAMMAR}.get(self.kind, MAX_LITERAL)
        if len(self.value) > limit:
            raise self.wrong(f"at most {limit} characters", f"{len(self.value)} characters", "simplify it")

    def wrong(self, needed: str, got: object, advice: str) -> InvalidRequestError:
        """An error of this specification."""
        return InvalidRequestError(self.field, f"{self.field} must be {needed}, got {str(got)[:80]!r}; {advice}.")


def schema_spec(field: str, schema: Mapping[str, Any] | bool | str) -> GuidanceSpec:
    """Any text of JSON that fits a schema; the schema is an object, or JSON text of one."""
    probe = GuidanceSpec("json_object", field=field)
    try:
        if isinstance(schema, str):
            schema = json.loads(schema)
        if not isinstance(schema, dict | bool):
            raise probe.wrong("a JSON schema, which is an object", type(schema).__name__, "send an object")
        _check_parts(probe, schema)
        text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except InvalidRequestError:
        raise
    except (ValueError, TypeError) as error:
        raise probe.wrong("a JSON schema", error, "send valid JSON") from error
    except RecursionError as error:
        raise probe.wrong(f"nested at most {MAX_SCHEMA_DEPTH} deep", "more", "flatten the schema") from error
    return GuidanceSpec("json_schema", text, field)


def _check_parts(probe: GuidanceSpec, schema: object) -> None:
    """Its depth, the number of its values and the length of each string; before it is written as text."""
    level, depth, count = [schema], 0, 0
    while level:
        count += len(level)
        if depth > MAX_SCHEMA_DEPTH:
            raise probe.wrong(f"nested at most {MAX_SCHEMA_DEPTH} deep", "more", "flatten the schema")
        if count > MAX_SCHEMA:
            raise probe.wrong(f"at most {MAX_SCHEMA} characters", f"{count} values and more", "simplify it")
        keys = [key for each in level if isinstance(each, dict) for key in each]
        longest = max((len(each) for each in (*level, *keys) if isinstance(each, str)), default=0)
        if longest > MAX_LITERAL:
            raise probe.wrong(f"of strings of at most {MAX_LITERAL} characters", f"one of {longest}", "shorten it")
        level = [each for one in level for each in _children(one)]
        depth += 1


def object_spec(field: str) -> GuidanceSpec:
    """Any JSON object."""
    return GuidanceSpec("json_object", "", field)


def regex_spec(field: str, expression: str) -> GuidanceSpec:
    """A text that a regular expression matches from beginning to end."""
    return GuidanceSpec("regex", expression, field)


def grammar_spec(field: str, grammar: str) -> GuidanceSpec:
    """A text of a context-free grammar: Lark's notation as llguidance reads it, or llama.cpp's GBNF."""
    return GuidanceSpec("grammar", grammar, field)


def choice_spec(field: str, choices: Sequence[str]) -> GuidanceSpec:
    """One of some texts."""
    probe = GuidanceSpec("json_object", field=field)
    if not 0 < len(choices) <= MAX_CHOICES:
        raise probe.wrong(f"1 to {MAX_CHOICES} choices", f"{len(choices)} choices", "send fewer, and at least one")
    for choice in choices:
        if not isinstance(choice, str) or not 0 < len(choice) <= MAX_LITERAL or "\0" in choice:
            raise probe.wrong(
                f"choices of 1 to {MAX_LITERAL} characters without NUL", choice, "correct or drop this one"
            )
    return GuidanceSpec("choice", "\0".join(choices), field)


def _children(value: object) -> Sequence[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else ()
