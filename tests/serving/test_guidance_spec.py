import json

import pytest

from atom.serving.errors import InvalidRequestError
from atom.serving.guidance_spec import (
    MAX_LITERAL,
    MAX_SCHEMA,
    MAX_SCHEMA_DEPTH,
    GuidanceSpec,
    choice_spec,
    grammar_spec,
    object_spec,
    regex_spec,
    schema_spec,
)
from atom.serving.sampling_params import SamplingParams


def test_equal_specifications_are_one_value_whatever_field_they_came_from() -> None:
    a = schema_spec("response_format", {"type": "object"})
    b = schema_spec("guided_json", ' { "type" : "object" } ')
    assert a == b
    assert hash(a) == hash(b)
    assert a != schema_spec("guided_json", {"type": "array"})
    assert regex_spec("x", "a") != grammar_spec("x", "a")
    assert hash(SamplingParams(guidance=a)) == hash(SamplingParams(guidance=b))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schema_spec("f", "{"), "f must be a JSON schema, got .*; send valid JSON"),
        (lambda: schema_spec("f", "3"), "which is an object"),
        (lambda: schema_spec("f", {"const": float("nan")}), "valid JSON"),
        (lambda: schema_spec("f", {"const": object()}), "valid JSON"),
        (lambda: schema_spec("f", "[" * 100000), "nested|valid JSON"),
        (lambda: schema_spec("f", '{"items":' * 101 + "{}" + "}" * 101), f"nested at most {MAX_SCHEMA_DEPTH} deep"),
        (lambda: schema_spec("f", {"const": "x" * (MAX_LITERAL + 1)}), f"at most {MAX_LITERAL} characters"),
        (lambda: schema_spec("f", {"properties": {"x" * (MAX_LITERAL + 1): {}}}), f"at most {MAX_LITERAL} characters"),
        (lambda: schema_spec("f", {"enum": ["x" * 8000] * 20}), f"at most {MAX_SCHEMA} characters"),
        (lambda: regex_spec("f", ""), "not empty"),
        (lambda: regex_spec("f", "a" * (MAX_LITERAL + 1)), f"at most {MAX_LITERAL} characters"),
        (lambda: choice_spec("f", []), "1 to 4096 choices"),
        (lambda: choice_spec("f", ["a", ""]), "correct or drop"),
        (lambda: choice_spec("f", ["a\0b"]), "without NUL"),
        (lambda: choice_spec("f", ["a", 3]), "correct or drop"),  # type: ignore[list-item]
        (lambda: GuidanceSpec("xml", "a", "f"), "of kind json_schema, json_object"),  # type: ignore[arg-type]
    ],
)
def test_what_is_refused_names_the_field(make: object, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as error:
        make()  # type: ignore[operator]
    assert error.value.field == "f"


def test_values() -> None:
    assert json.loads(schema_spec("f", {"a": ["é", 1.5]}).value) == {"a": ["é", 1.5]}
    assert schema_spec("f", True).value == "true"
    assert object_spec("f").value == ""
    assert choice_spec("f", ["a", "b c"]).value.split("\0") == ["a", "b c"]
    with pytest.raises(InvalidRequestError, match="guidance"):
        SamplingParams(guidance={"type": "object"})  # type: ignore[arg-type]
