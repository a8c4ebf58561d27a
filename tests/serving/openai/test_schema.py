"""Requests made of the server's own OpenAPI schema, right and wrong ones: never a 5xx, never a hang."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atom.serving.server import ROUTES

from ..scripted import Running, ScriptedRunner, running

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
EXAMPLES = 40  # of each operation


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    runner = ScriptedRunner(lambda request, index: "Hello there.")
    with running(runner, max_model_len=64, num_blocks=64, max_num_seqs=8) as made:
        yield made
        made.wait_idle()
        assert made.http.get("/health").status_code == 200


@pytest.fixture(scope="module")
def api(server: Running) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), [(method, path.replace(":path", "")) for method, path, *_ in ROUTES])
def test_no_server_error(api: Any, method: str, path: str) -> None:
    tried = 0

    # schemathesis's own pytest integration does not know pytest 9
    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def check(data: st.DataObject) -> None:
        nonlocal tried
        mode = data.draw(st.sampled_from(list(schemathesis.GenerationMode)))
        case = data.draw(api[path][method].as_strategy(generation_mode=mode))
        answer = case.call(timeout=20)
        tried += 1
        assert answer.status_code < 500, (case.body, answer.text)
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert error["message"] and error["type"], "errors are the API's own"

    check()
    assert tried >= 1


@pytest.mark.slow
def test_the_schema_lets_good_requests_be_made(api: Any, server: Running) -> None:
    """What the schema describes is what the server takes: some drawn bodies are answered."""
    answered = 0

    @settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(api["/detokenize"]["POST"].as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE))
    def check(case: schemathesis.Case) -> None:
        nonlocal answered
        answered += case.call(timeout=20).status_code == 200

    check()
    assert answered >= 1
