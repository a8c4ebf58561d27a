"""What an answer must look like: `response_format`, vLLM's `structured_outputs`, and its older `guided_*` fields."""

from collections.abc import Callable
from typing import Any

from ..errors import InvalidRequestError
from ..guidance_spec import GuidanceSpec, choice_spec, grammar_spec, object_spec, regex_spec, schema_spec
from .protocol import Sampling, StructuredOutputs


def guidance_spec(body: Sampling) -> GuidanceSpec | None:
    """What the body asks for; InvalidRequestError if that is several things, or none that is known."""
    given = body.structured_outputs or StructuredOutputs.model_validate({})
    asked: tuple[tuple[str, Any, Callable[[str, Any], GuidanceSpec | None]], ...] = (
        ("response_format", body.response_format, _of_format),
        ("structured_outputs.json", given.json_, schema_spec),
        ("structured_outputs.regex", given.regex, regex_spec),
        ("structured_outputs.choice", given.choice, choice_spec),
        ("structured_outputs.grammar", given.grammar, grammar_spec),
        ("structured_outputs.json_object", given.json_object or None, lambda field, _: object_spec(field)),
        ("guided_json", body.guided_json, schema_spec),
        ("guided_regex", body.guided_regex, regex_spec),
        ("guided_choice", body.guided_choice, choice_spec),
        ("guided_grammar", body.guided_grammar, grammar_spec),
    )
    specs = [(field, make(field, value)) for field, value, make in asked if value is not None]
    found = [(field, spec) for field, spec in specs if spec is not None]
    if len(found) > 1:
        fields = " and ".join(field for field, _ in found)
        raise InvalidRequestError(found[1][0], f"{fields} exclude each other; leave one of them out.")
    return found[0][1] if found else None


def _of_format(field: str, form: dict[str, Any]) -> GuidanceSpec | None:
    """The API's own way; None for plain text."""
    kind = form.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return object_spec(field)
    if kind == "json_schema":
        schema = form.get("json_schema")
        if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
            raise InvalidRequestError(field, 'response_format.json_schema must be {"name", "schema"}; add the schema.')
        return schema_spec(field, schema["schema"])
    needed = "text, json_object or json_schema"
    raise InvalidRequestError(field, f"response_format.type must be {needed}, got {str(kind)[:80]!r}; correct it.")
