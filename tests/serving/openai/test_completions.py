"""/v1/completions, on a model that recites."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from atom.serving.openai.completions import _prompts
from atom.serving.openai.protocol import CompletionRequest
from atom.serving.request import Request

from ..scripted import EOS, Running, ScriptedRunner, ids_of, running


def recite(request: Request, index: int) -> str:
    return f"{'No' if index else 'Yes'}, é 😀."


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ScriptedRunner(recite)) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left(server: Running) -> Iterator[None]:
    yield
    server.wait_idle()


def complete(server: Running, **body: Any) -> dict[str, Any]:
    answer = server.post("/v1/completions", **({"max_tokens": 64} | body))
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def events(server: Running, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    answer = server.post(path, stream=True, **({"max_tokens": 64} | body))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_text_and_usage(server: Running) -> None:
    got = complete(server, prompt="hello")
    text = recite(server.runner.seen[-1], 0)
    assert got["object"] == "text_completion" and got["id"].startswith("cmpl-") and got["model"] == "tiny"
    assert got["choices"] == [
        {"index": 0, "text": text, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    made = len(ids_of(text)) + 1  # and EOS
    assert got["usage"]["prompt_tokens"] == len(ids_of("hello")) and got["usage"]["completion_tokens"] == made
    assert got["usage"]["total_tokens"] == len(ids_of("hello")) + made


@pytest.mark.parametrize(
    "prompt",
    ["hello", ids_of("hello"), ["hello", "he"], [ids_of("hello"), ids_of("he")]],
    ids=["text", "ids", "texts", "lists"],
)
def test_every_form_of_prompt(server: Running, prompt: Any) -> None:
    count = len(server.runner.seen)
    got = complete(server, prompt=prompt)
    came = [list(r.prompt_token_ids) for r in server.runner.seen[count:]]
    assert sorted(came) == sorted([ids_of("hello")] if len(came) == 1 else [ids_of("hello"), ids_of("he")])
    assert [c["index"] for c in got["choices"]] == list(range(len(came)))


def test_samples_of_prompts_are_numbered_prompt_by_prompt(server: Running) -> None:
    got = complete(server, prompt=["a", "b"], n=2)
    assert [c["text"].split(",")[0] for c in got["choices"]] == ["Yes", "No", "Yes", "No"]
    assert got["usage"]["prompt_tokens"] == 2


def test_stream_is_the_same_text_in_pieces(server: Running) -> None:
    whole = complete(server, prompt="hello", n=2)
    got = events(server, prompt="hello", n=2, stream_options={"include_usage": True})
    texts = ["", ""]
    for event in got[:-1]:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
        assert event["usage"] is None and "\N{REPLACEMENT CHARACTER}" not in choice["text"]
    assert texts == [c["text"] for c in whole["choices"]]
    assert [e["choices"][0]["finish_reason"] for e in got[:-1]].count("stop") == 2
    assert got[-1]["choices"] == [] and got[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert len({e["id"] for e in got}) == 1


def test_stream_without_usage_has_none(server: Running) -> None:
    got = events(server, prompt="hello")
    assert all("usage" not in event and event["choices"] for event in got)


def test_max_tokens(server: Running) -> None:
    got = complete(server, prompt="hello", max_tokens=3)
    assert got["choices"][0]["text"] == "Yes" and got["choices"][0]["finish_reason"] == "length"
    answer = server.post("/v1/completions", prompt="hello")
    assert answer.json()["usage"]["completion_tokens"] <= 16, "the API's default is 16"


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(server: Running, stream: bool, keeps: bool) -> None:
    body: dict[str, Any] = {"prompt": "hello", "stop": ["s, é", "never"], "include_stop_str_in_output": keeps}
    if stream:
        choices = [e["choices"][0] for e in events(server, **body)]
        text, last = "".join(c["text"] for c in choices), choices[-1]
    else:
        last = complete(server, **body)["choices"][0]
        text = last["text"]
    assert text == ("Yes, é" if keeps else "Ye")
    assert last["finish_reason"] == "stop" and last["stop_reason"] == "s, é"


def test_stop_token_ids(server: Running) -> None:
    (comma,) = ids_of(",")
    choice = complete(server, prompt="hello", stop_token_ids=[comma])["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("Yes", "stop", comma)


def test_logprobs(server: Running) -> None:
    choice = complete(server, prompt="hello", max_tokens=3, logprobs=2)["choices"][0]
    tokens = ids_of("Yes")
    assert choice["logprobs"]["tokens"] == ["Y", "e", "s"]
    assert choice["logprobs"]["token_logprobs"] == [-t / 100 for t in tokens]
    assert all(len(top) == 2 for top in choice["logprobs"]["top_logprobs"])
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]


@pytest.mark.parametrize("prompt", ["hello", ids_of("hello")], ids=["text", "ids"])
def test_echo_with_logprobs(server: Running, prompt: Any) -> None:
    choice = complete(server, prompt=prompt, max_tokens=1, logprobs=1, echo=True)["choices"][0]
    ids = ids_of("hello") + ids_of("Y")
    found = choice["logprobs"]
    assert choice["text"] == "helloY"
    assert found["token_logprobs"] == [None, *(-t / 100 for t in ids[1:])]
    assert "".join(found["tokens"]) == "helloY" and found["top_logprobs"][0] is None
    assert [("helloY" + " ")[at] for at in found["text_offset"]] == [token[0] for token in found["tokens"]]


def test_echo_alone_makes_no_tokens(server: Running) -> None:
    got = complete(server, prompt="hello", max_tokens=0, logprobs=0, echo=True)
    assert got["choices"][0]["text"] == "hello" and got["usage"]["completion_tokens"] == 0
    assert len(got["choices"][0]["logprobs"]["tokens"]) == len(ids_of("hello"))
    assert got["choices"][0]["finish_reason"] == "length"


def test_echo_in_a_stream_comes_first(server: Running) -> None:
    got = events(server, prompt="hello", echo=True, logprobs=0)
    assert got[0]["choices"][0]["text"].startswith("hello")
    tokens = [t for e in got for t in e["choices"][0]["logprobs"]["tokens"]]
    assert tokens[: len(ids_of("hello"))] == ["he", "ll", "o"]
    offsets = [o for e in got for o in e["choices"][0]["logprobs"]["text_offset"]]
    assert offsets[:5] == [0, 2, 4, 5, 6]


def test_prompt_logprobs(server: Running) -> None:
    choice = complete(server, prompt="hello", prompt_logprobs=2)["choices"][0]
    ids = ids_of("hello")
    assert choice["prompt_logprobs"][0] is None and len(choice["prompt_logprobs"]) == len(ids)
    second = choice["prompt_logprobs"][1]
    assert second[str(ids[1])] == {"logprob": -ids[1] / 100, "rank": 1, "decoded_token": "ll"} and len(second) == 2


def test_parameters_reach_the_engine(server: Running) -> None:
    complete(
        server,
        prompt="hello",
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        seed=7,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        logit_bias={"5": -1.5},
        min_tokens=2,
        ignore_eos=True,
        priority=-3,
        cache_salt="me",
        user="somebody",
        max_tokens=4,
    )
    request = server.runner.seen[-1]
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (0.5, 0.9, 0, 0.1, 7)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.1, 0.2, 1.1)
    assert params.logit_bias == ((5, -1.5),) and params.min_tokens == 2 and params.ignore_eos and params.max_tokens == 4
    assert (request.priority, request.cache_salt, request.eos_token_ids) == (-3, "me", (EOS,))


def test_null_is_the_same_as_nothing(server: Running) -> None:
    complete(server, prompt="hello", temperature=None, stop=None, suffix=None, seed=None, logit_bias=None, model=None)
    assert server.runner.seen[-1].params.temperature == 1.0


def test_cached_tokens_are_told(server: Running) -> None:
    prompt = "once upon a time " * 8
    complete(server, prompt=prompt, cache_salt="x")
    again = complete(server, prompt=prompt, cache_salt="x")["usage"]["prompt_tokens_details"]
    other = complete(server, prompt=prompt, cache_salt="y")["usage"]["prompt_tokens_details"]
    assert again["cached_tokens"] >= 16 and other["cached_tokens"] == 0


def test_many_prompts_leave_the_event_loop_to_others(server: Running) -> None:
    body = CompletionRequest.model_validate({"prompt": ["a short text"] * 50})

    async def turns_of_others() -> int:
        encoding = asyncio.ensure_future(_prompts(server.service, body))
        turns = 0
        while not encoding.done():
            await asyncio.sleep(0)
            turns += 1
        assert len(encoding.result()) == 50
        return turns

    assert asyncio.run(turns_of_others()) >= 50
