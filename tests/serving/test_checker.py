import json
import os
import resource
import time
from collections.abc import Iterator

import pytest

from atom.serving.checker import Checker

pytest.importorskip("llguidance", reason="structured output needs llguidance: pip install 'atom-serving[serving]'")


def lark(text: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": text}]})


@pytest.fixture
def checker() -> Iterator[Checker]:
    made = Checker(5.0)
    yield made
    made.close()


def test_grammars_and_limits(checker: Checker) -> None:
    assert checker.check(lark('start: "a"'), {}) is None
    assert "unknown name" in str(checker.check(lark("start: b"), {}))
    assert checker.check(lark('start: "a"'), {"max_grammar_size": 1}) is not None
    assert "unexpected" in str(checker.check(lark('start: "a"'), {"no_such_limit": 1}))


def test_a_crash_is_an_answer_and_the_next_grammar_is_checked(checker: Checker) -> None:
    """Deep enough to exhaust the stack of the child, which dies of it."""
    deep = "\n".join(["start: r0", *(f"r{i}:r{i + 1}" for i in range(20000)), 'r20000: "a"'])
    assert "more than 5 s" in str(checker.check(lark(deep), {}))
    assert checker.check(lark('start: "a"'), {}) is None


def test_a_stall_is_ended(checker: Checker) -> None:
    checker.check(lark('start: "a"'), {})  # so that the child's start is not counted
    checker.timeout_s = 0.3
    start = time.monotonic()
    stalling = lark("start: " + "|".join(["start start"] * 2500) + '| "z" |')
    assert "more than 0.3 s" in str(checker.check(stalling, {}))
    assert time.monotonic() - start < 5


def test_no_process_is_left_behind(checker: Checker) -> None:
    checker.check(lark('start: "a"'), {})
    child = checker._child
    assert child is not None
    checker.close()
    assert child.poll() is not None
    assert checker.check(lark('start: "a"'), {}) is None, "a later check starts another"


def test_a_child_that_something_else_has_ended_is_no_fault_of_a_grammar(checker: Checker) -> None:
    checker.check(lark('start: "a"'), {})
    assert checker._child is not None
    checker._child.kill()
    checker._child.wait()
    assert checker.check(lark('start: "b"'), {}) is None


def test_a_server_with_a_thousand_connections_can_check(checker: Checker) -> None:
    """File descriptors above 1023 are beyond select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip(f"this system allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    files = []
    try:
        with open(os.devnull) as null:
            files = [os.dup(null.fileno()) for _ in range(1100)]
        assert checker.check(lark('start: "a"'), {}) is None
    finally:
        for each in files:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
