"""`atom chat URL` against a server whose model recites."""

import builtins
import json
from collections.abc import Iterator
from typing import Any

import pytest

from atom.cli import main
from atom.serving.server import AppOptions

from .scripted import HF, Running, ScriptedRunner, running


@pytest.fixture
def server() -> Iterator[Running]:
    with running(ScriptedRunner(lambda request, index: "It is é 😀.")) as made:
        yield made


def prompts(server: Running) -> list[str]:
    return [HF.decode(request.prompt_token_ids) for request in server.runner.seen]


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    typed = iter(lines)

    def read(*arguments: Any) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", read)


def test_one_prompt(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", server.url, "--prompt", "hello", "--json"]) == 0
    text, summary = capsys.readouterr().out.strip().splitlines()
    assert text == "It is é 😀."
    (answer,) = json.loads(summary)["answers"]
    assert answer["text"] == text and answer["tokens"] > 4 and answer["ttft_s"] > 0
    assert prompts(server) == ["<user>hello</s><assistant>"]


def test_raw_text_goes_on(server: Running) -> None:
    assert main(["chat", f"{server.url}/v1/", "--prompt", "hello", "--raw"]) == 0
    assert prompts(server) == ["hello"]


def test_history_and_reset(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    type_in(monkeypatch, "one", "two", "/reset", "three")
    assert main(["chat", server.url]) == 0
    assert prompts(server) == [
        "<user>one</s><assistant>",
        "<user>one</s><assistant>It is é 😀.</s><user>two</s><assistant>",
        "<user>three</s><assistant>",
    ]


def test_interrupt_ends_the_answer_and_not_the_conversation(
    server: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.runner.answer = lambda request, index: "word " * 100
    server.runner.pause_s = 0.01
    type_in(monkeypatch, "go", "on")
    written = 0

    class Impatient:
        def write(self, text: str) -> None:
            nonlocal written
            written += 1
            if written == 5:
                raise KeyboardInterrupt

        def flush(self) -> None:
            pass

    monkeypatch.setattr("atom.commands.chat.sys", type("Sys", (), {"stdout": Impatient()}))
    assert main(["chat", server.url, "--max-new-tokens", "20"]) == 0
    assert len(server.runner.seen) == 2 and "go</s><assistant>w" in prompts(server)[1]
    server.wait_idle()
    assert server.engine.stats().num_output_tokens < 300


def test_errors_say_what_to_do(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["chat", "http://127.0.0.1:9", "--prompt", "x"]) == 1
    assert "start it with atom serve" in capsys.readouterr().err
    with running(options=AppOptions(api_keys=("secret",))) as server:
        assert main(["chat", server.url, "--prompt", "x"]) == 1
        assert "set ATOM_API_KEY" in capsys.readouterr().err
        monkeypatch.setenv("ATOM_API_KEY", "secret")
        assert main(["chat", server.url, "--prompt", "x"]) == 0
        assert main(["chat", server.url, "--prompt", "x", "--max-new-tokens", "5000"]) == 1
        assert "max_tokens must be at most" in capsys.readouterr().err
        server.runner.faults.append("injected")
        assert main(["chat", server.url, "--prompt", "x"]) == 1
        assert "the server failed" in capsys.readouterr().err
