"""What an answer must look like: `response_format`, vLLM's `structured_outputs`, and its older `guided_*` fields."""

from dataclasses import dataclass
from typing import Any

from ..errors import InvalidRequestError
from .protocol import Sampling


@dataclass(frozen=True)
class GuidanceSpec:
    kind: str
    value: Any = None


def schema_spec(field: str, schema: dict[str, Any] | str) -> GuidanceSpec:
    return GuidanceSpec("json_schema", schema)


def choice_spec(field: str, choices: list[str]) -> GuidanceSpec:
    return GuidanceSpec("choice", tuple(choices))


def guidance_spec(body: Sampling) -> GuidanceSpec | None:
    """What the body asks for; InvalidRequestError if that is several things, or none that is known."""
    found = [spec for spec in (*_response_format(body), *_structured(body), *_guided(body)) if spec[1] is not None]
    if len(found) > 1:
        fields = " and ".join(field for field, _ in found)
        raise InvalidRequestError(found[1][0], f"{fields} exclude each other; leave one of them out.")
    return found[0][1] if found else None


Found = list[tuple[str, GuidanceSpec | None]]


def _response_format(body: Sampling) -> Found:
    form = body.response_format
    if form is None:
        return []
    kind, field = form.get("type"), "response_format"
    if kind == "text":
        return []
    if kind == "json_object":
        return [(field, GuidanceSpec("json_object"))]
    if kind == "json_schema":
        schema = form.get("json_schema")
        if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
            raise InvalidRequestError(field, 'response_format.json_schema must be {"name", "schema"}; add the schema.')
        return [(field, schema_spec(field, schema["schema"]))]
    needed = "text, json_object or json_schema"
    raise InvalidRequestError(field, f"response_format.type must be {needed}, got {str(kind)[:80]!r}; correct it.")


def _structured(body: Sampling) -> Found:
    wanted, field = body.structured_outputs, "structured_outputs"
    if wanted is None:
        return []
    return [
        (f"{field}.json", None if wanted.json_ is None else schema_spec(f"{field}.json", wanted.json_)),
        (f"{field}.regex", None if wanted.regex is None else GuidanceSpec("regex", wanted.regex)),
        (f"{field}.choice", None if wanted.choice is None else choice_spec(f"{field}.choice", wanted.choice)),
        (f"{field}.grammar", None if wanted.grammar is None else GuidanceSpec("grammar", wanted.grammar)),
        (f"{field}.json_object", GuidanceSpec("json_object") if wanted.json_object else None),
    ]


def _guided(body: Sampling) -> Found:
    return [
        ("guided_json", None if body.guided_json is None else schema_spec("guided_json", body.guided_json)),
        ("guided_regex", None if body.guided_regex is None else GuidanceSpec("regex", body.guided_regex)),
        ("guided_choice", None if body.guided_choice is None else choice_spec("guided_choice", body.guided_choice)),
        ("guided_grammar", None if body.guided_grammar is None else GuidanceSpec("grammar", body.guided_grammar)),
    ]
