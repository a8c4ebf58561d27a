"""The commands that a shell sends."""

import json
import shutil
import subprocess

import pytest

from ..scripted import running

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def curl(*arguments: str) -> str:
    found = subprocess.run(["curl", "--silent", "--show-error", "--max-time", "20", *arguments], capture_output=True)
    assert found.returncode == 0, found.stderr
    return found.stdout.decode()


def test_answer_stream_and_error() -> None:
    header, said = ("-H", "Content-Type: application/json"), [{"role": "user", "content": "Hi"}]
    with running() as server:
        url = f"{server.url}/v1/chat/completions"
        answer = json.loads(curl(url, *header, "-d", json.dumps({"model": "tiny", "messages": said})))
        assert answer["choices"][0]["message"]["content"] == "Hello there."
        lines = curl("-N", url, *header, "-d", json.dumps({"messages": said, "stream": True})).split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: ") for line in lines[:-1])
        pieces = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines[:-2]]
        assert "".join(piece.get("content") or "" for piece in pieces) == "Hello there."
        status = curl(url, *header, "-d", "{", "-o", "/dev/null", "-w", "%{http_code} %{content_type}")
        assert status == "400 application/json"
        assert "atom:" in curl(f"{server.url}/metrics")
        server.wait_idle()
