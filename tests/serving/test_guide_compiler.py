"""What becomes a guide, what is refused, and that nobody waits for long on a stranger's grammar."""

import asyncio
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from atom.serving.errors import InvalidRequestError, QueueFullError
from atom.serving.guidance import GuideCompiler
from atom.serving.guidance_spec import GuidanceSpec, choice_spec, grammar_spec, object_spec, regex_spec, schema_spec
from atom.serving.guide import Guide

from .guided_tokens import Tokens, allowed
from .tiny_tokenizers import byte_level

pytest.importorskip("llguidance", reason="structured output needs llguidance: pip install 'atom-serving[serving]'")


@pytest.fixture(scope="module")
def small() -> Iterator[Tokens]:
    made = Tokens(byte_level())
    yield made
    made.compiler.close()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (schema_spec("f", {"type": "foo"}), "Invalid type: foo"),
        (schema_spec("f", {"$ref": "http://127.0.0.1:9/x"}), "does not fetch"),
        (schema_spec("f", {"not": {"type": "string"}}), "not"),
        (schema_spec("f", False), "Unsatisfiable"),
        (schema_spec("f", {"type": "integer", "minimum": 5, "maximum": 1}), "Unsatisfiable"),
        (schema_spec("f", {"type": "string", "pattern": "(a"}), "unclosed group"),
        (regex_spec("f", "(a"), "this regular expression cannot be followed: .*unclosed group"),
        (regex_spec("f", "a(?=b)"), "look-around"),
        (grammar_spec("f", "start: nothing"), "unknown name"),
        (grammar_spec("f", "root ::= ((("), "this grammar cannot be followed"),
    ],
)
def test_what_cannot_be_followed_is_refused(small: Tokens, spec: GuidanceSpec, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as error:
        small.compiler.compile(spec)
    assert error.value.field == "f"
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "grammar",
    [
        "\n".join(["start: r0", *(f"r{i}:r{i + 1}" for i in range(700)), 'r700: "a"']),  # deep
        "start: " + "|".join(["start start"] * 650) + '| "z" |',  # ambiguous: minutes of work
        "\n".join(["start: R0", *(f"R{i}: R{i + 1} R{i + 1}" for i in range(60)), 'R60: "a"']),  # 2**60 letters
    ],
    ids=["deep", "ambiguous", "doubling"],
)
def test_hostile_grammars_stall_nobody(small: Tokens, grammar: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small.compiler._checker, "timeout_s", 2.0)
    start = time.monotonic()
    try:
        guide = small.compiler.compile(grammar_spec("f", grammar))
    except InvalidRequestError as error:
        assert "cannot be followed" in str(error)
    else:
        allowed(guide, [])
    assert time.monotonic() - start < 30
    small.compiler.compile(regex_spec("f", f"after{len(grammar)}"))


def test_compiled_guides_are_kept_up_to_a_bound(small: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atom.serving.guidance.MAX_GUIDES", 2)
    a, b, c = (regex_spec("f", text) for text in ("xa", "xb", "xc"))
    first = small.compiler.compile(a)
    assert small.compiler.compile(regex_spec("another field", "xa")) is first
    small.compiler.compile(b)
    small.compiler.compile(a)
    small.compiler.compile(c)  # b was asked for the longest ago
    assert set(small.compiler._guides) == {a, c}
    assert asyncio.run(small.compiler.compile_async(a)) is first
    assert asyncio.run(small.compiler.compile_async(b)) is not first


def test_a_refusal_is_kept_and_names_the_field_of_who_asks(small: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequestError, match=r"^f: .*unclosed"):
        small.compiler.compile(regex_spec("f", "(kept"))
    monkeypatch.setattr(small.compiler._checker, "check", lambda *_: pytest.fail("it is known"))
    with pytest.raises(InvalidRequestError, match=r"^g: .*unclosed"):
        small.compiler.compile(regex_spec("g", "(kept"))
    monkeypatch.setattr("atom.serving.guidance.REFUSAL_S", 0.0)
    monkeypatch.setattr(small.compiler._checker, "check", lambda *_: "asked again")
    with pytest.raises(InvalidRequestError, match="asked again"):
        small.compiler.compile(regex_spec("f", "(kept"))


def test_compiling_has_a_queue_with_an_end(small: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atom.serving.guidance.MAX_WAITING", 2)
    release = threading.Event()
    monkeypatch.setattr(small.compiler._checker, "check", lambda *_: release.wait(20) and None)

    async def flood() -> list[Any]:
        asked = [asyncio.ensure_future(small.compiler.compile_async(regex_spec("f", f"queue{i}"))) for i in range(4)]
        await asyncio.sleep(0.05)
        release.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    found = asyncio.run(flood())
    assert [type(each) for each in found] == [Guide, Guide, QueueFullError, QueueFullError]
    assert isinstance(small.compiler.compile(regex_spec("f", "queue3")), Guide)


def test_a_model_without_eos_is_refused() -> None:
    compiler = GuideCompiler(byte_level(), 300, ())
    with pytest.raises(InvalidRequestError, match="without EOS"):
        compiler.compile(object_spec("f"))
    compiler.close()


def test_a_tokenizer_with_more_tokens_than_the_model() -> None:
    hf = byte_level()
    compiler = GuideCompiler(hf, 64, (0,))
    compiler.prepare()
    low, high = hf.convert_ids_to_tokens([40, 80])
    assert allowed(compiler.compile(choice_spec("f", [low, high])), []) == {40}
    compiler.close()


def test_a_server_without_llguidance_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    compiler = GuideCompiler(byte_level(), 300, (1,))
    with pytest.raises(InvalidRequestError, match=r"no llguidance \(pip install"):
        compiler.compile(object_spec("f"))
    compiler.close()
