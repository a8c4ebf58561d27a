"""What a stranger may put into 32 MiB: refused before all other streams have stood still for long."""

import asyncio
import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator

import httpx
import pytest

from atom.serving.openai.service import Limits

from ..scripted import Running, running

JSON = {"content-type": "application/json"}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MIB = 2**20


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as made:
        yield made


def refused(server: Running, path: str, data: bytes, status: int, param: str | None, match: str) -> None:
    answer = server.http.post(path, content=data, headers=JSON, timeout=60)
    assert answer.status_code == status, answer.text[:500]
    error = answer.json()["error"]
    assert error["param"] == param and match in error["message"] and len(answer.content) < 1000, error
    server.wait_idle()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b'{"prompt": [' + b"1," * (9 * MIB // 2) + b"1]}", "commas"),
        (b'{"prompt": [' + b'"",' * (2 * MIB) + b'""]}', "quotation marks"),
        (b'{"prompt": [' + b"[1]," * MIB + b"[1]]}", "brackets"),
        (b'{"messages": [' + b"{}," * MIB + b"{}]}", "braces"),
        (b'{"prompt": "' + b":" * (2 * MIB) + b'"}', "colons"),
    ],
    ids=["numbers", "texts", "lists", "objects", "keys"],
)
def test_values_are_counted_before_they_are_made(server: Running, data: bytes, match: str) -> None:
    refused(server, COMPLETIONS, data, 413, None, match)


def test_a_large_text_is_one_value(server: Running) -> None:
    refused(server, COMPLETIONS, b'{"prompt": "' + b"a [b], " * (2 * MIB // 7) + b'"}', 400, "prompt", "characters")


TEXTS = '["a"' + ', "a"' * 5000 + "]"
PAIRS = "{" + ",".join(f'"{i}": 1' for i in range(5000)) + "}"


@pytest.mark.parametrize(
    ("path", "field", "param", "match"),
    [
        (COMPLETIONS, ",".join(f'"f{i}": 1' for i in range(1000)), "body", "at most 256 fields, got 1001"),
        (COMPLETIONS, f'"logit_bias": {PAIRS}', "logit_bias", "at most 4096 items, got 5000"),
        (COMPLETIONS, f'"stop": {TEXTS}', "stop", "at most 4096 items, got 5001"),
        (COMPLETIONS, f'"structured_outputs": {{"choice": {TEXTS}}}', "structured_outputs.choice", "at most 4096"),
        (COMPLETIONS, f'"metadata": {PAIRS}', "metadata", "at most 4096 items"),
        (CHAT, f'"tools": {TEXTS}', "tools", "at most 4096 items, got 5001"),
        (CHAT, f'"chat_template_kwargs": {PAIRS}', "chat_template_kwargs", "at most 4096 items"),
        (COMPLETIONS, '"guided_json": {"enum": [' + "1," * 200_000 + "1]}", "guided_json", "at most 131072 characters"),
    ],
)
def test_fields_of_too_many_items(server: Running, path: str, field: str, param: str, match: str) -> None:
    text = '"prompt": "x"' if path == COMPLETIONS else '"messages": [{"role": "user", "content": "x"}]'
    refused(server, path, f"{{{text}, {field}}}".encode(), 400, param, match)


def test_conversations_of_too_many_messages(server: Running) -> None:
    data = b'{"messages": [' + b'{"role": "user", "content": ""},' * 2**16 + b'{"role": "user", "content": ""}]}'
    refused(server, CHAT, data, 400, "messages", "at most 65536 items")
    refused(server, "/tokenize", data, 400, "messages", "at most 65536 items")


def test_a_text_of_too_many_tokens_is_not_told(server: Running) -> None:
    refused(server, "/tokenize", b'{"prompt": "' + b"\\u0001" * (2**20 + 1) + b'"}', 400, "prompt", "at most 1048576")


def test_all_others_go_on_meanwhile(server: Running) -> None:
    """The worst that gets through: as many messages, and as many token ids, as are let in."""
    waits, done = [], threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=server.url) as http:
            while not done.is_set():
                start = time.perf_counter()
                assert http.get("/health", timeout=30).status_code == 200
                waits.append(time.perf_counter() - start)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        messages = b'{"messages": [' + b'{"role": "user", "content": ""},' * (2**16 - 1) + b'{"role": "x"}]}'
        refused(server, CHAT, messages, 400, "messages[65535].role", "role must be")
        ids = b'{"prompt": [' + b"1," * (4 * MIB - 9) + b"1]}"
        refused(server, COMPLETIONS, ids, 400, "prompt", "leave room")
    finally:
        done.set()
        thread.join()
    assert max(waits) < 5, "seconds; 1.3 on two busy cores"


def test_logprobs_of_long_prompts_are_bounded_and_told_beside_others() -> None:
    with running(limits_http=Limits(max_prompt_logprobs=1000)) as server:
        for field in ({"prompt_logprobs": 9}, {"logprobs": 9, "echo": True}, {"logprobs": 9, "echo": True, "n": 2}):
            body = json.dumps({"prompt": [5] * 101} | field).encode()
            name = "prompt_logprobs" if "prompt_logprobs" in field else "logprobs"
            refused(server, COMPLETIONS, body, 400, name, "asks for 1010 logprobs of the prompt, at most 1000")
        assert server.post(COMPLETIONS, prompt=[5] * 100, prompt_logprobs=9).status_code == 200
        chat = {"messages": [{"role": "user", "content": "x" * 200}], "prompt_logprobs": 9}
        assert server.post(CHAT, **chat).status_code == 400
        server.wait_idle()


def told(answer: str) -> tuple[str, dict[str, list[object]], list[str]]:
    """Text, logprobs and finish reasons of an answer, whole or streamed: chunks that nobody fetched yet are merged."""
    events = [line.removeprefix("data: ") for line in answer.splitlines() if line.startswith(("data: {", "{"))]
    text, logprobs, reasons = "", defaultdict[str, list[object]](list), []
    for choice in (choice for event in events for choice in json.loads(event)["choices"]):
        said = choice.get("message") or choice.get("delta") or choice
        text += said.get("content") or said.get("text") or ""
        for key, values in (choice.get("logprobs") or {}).items():
            logprobs[key] += values or []
        reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    return text, logprobs, reasons


@pytest.mark.parametrize("stream", [False, True])
def test_many_logprobs_are_those_of_few(server: Running, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"prompt": [5] * 300, "logprobs": 9, "echo": True, "stream": stream}
    chat = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 9, "stream": stream}
    found = []
    for large in (10_000, 1):
        monkeypatch.setattr("atom.serving.openai.answers.LARGE", large)
        found.append([told(server.post(COMPLETIONS, **asked).text), told(server.post(CHAT, **chat).text)])
    assert found[0] == found[1]
    for text, logprobs, reasons in found[0]:
        assert text and logprobs and reasons
    server.wait_idle()


def test_large_texts_wait_for_each_other_alone(server: Running) -> None:
    """Many of them fill no thread in which a conversation is rendered."""
    tokenizer = server.service.frontend.tokenizer
    gate = threading.Event()

    async def held() -> None:
        waiting = [asyncio.ensure_future(tokenizer._run(True, gate.wait)) for _ in range(8)]
        try:
            async with asyncio.timeout(10):
                assert await tokenizer.render([{"role": "user", "content": "x"}], None)
                assert await tokenizer.encode("prompt", "word " * 1000)
        finally:
            gate.set()
            await asyncio.gather(*waiting)

    asyncio.run(held())
