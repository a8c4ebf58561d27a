"""The log's lines: one a request, and nothing a client sends makes two."""

import json
import logging
import time
from collections.abc import Iterator

import pytest

from atom.serving.middleware import JsonFormat, TextFormat

from .scripted import Running, ScriptedRunner, running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ScriptedRunner(lambda request, index: "text")) as made:
        yield made


def requests_in(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.getMessage() == "request"]


@pytest.mark.parametrize("path", ["/nothing%0A2026-01-01 00:00:00 INFO forged", "/nothing%0D%1B[2J", "/%E2%80%A8"])
def test_a_path_cannot_forge_a_line(server: Running, caplog: pytest.LogCaptureFixture, path: str) -> None:
    with caplog.at_level(logging.INFO, "atom.serving.middleware"):
        server.http.get(path)
        deadline = time.monotonic() + 10  # the line is written after the answer is sent
        while not requests_in(caplog) and time.monotonic() < deadline:
            time.sleep(0.01)
    records = requests_in(caplog)
    assert len(records) == 1
    line = TextFormat().format(records[0])
    assert line.isprintable(), line
    assert "status=404" in line
    assert len(JsonFormat().format(records[0]).splitlines()) == 1
    assert json.loads(JsonFormat().format(records[0]))["status"] == 404
