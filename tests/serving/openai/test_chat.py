"""/v1/chat/completions through the official client, on a model that recites."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from atom.serving.request import Request

from ..scripted import HF, Running, ScriptedRunner, ids_of, running

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
USER: Any = {"role": "user", "content": "hello"}


def prompt_of(request: Request) -> str:
    text: str = HF.decode(request.prompt_token_ids)
    return text


def recite(request: Request, index: int) -> str:
    text = prompt_of(request)
    return CALL if "weather" in text and "tool" not in text.split("<tool_call>")[-1] else "It is é 😀."


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ScriptedRunner(recite)) as made:
        yield made


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as made:
        yield made
    server.wait_idle()


def last_prompt(server: Running) -> str:
    return prompt_of(server.runner.seen[-1])


def test_answer(client: openai.OpenAI, server: Running) -> None:
    got = client.chat.completions.create(model="tiny", messages=[{"role": "system", "content": "Be brief."}, USER])
    assert got.choices[0].message.content == "It is é 😀." and got.choices[0].message.role == "assistant"
    assert got.choices[0].finish_reason == "stop" and got.object == "chat.completion"
    assert last_prompt(server) == "<system>Be brief.</s><user>hello</s><assistant>"
    assert got.usage is not None and got.usage.prompt_tokens == len(server.runner.seen[-1].prompt_token_ids)
    assert got.usage.completion_tokens == len(ids_of("It is é 😀.")) + 1
    assert got.usage.prompt_tokens_details is not None


def test_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model="tiny", messages=[USER], stream=True, stream_options={"include_usage": True}
    ) as stream:
        got = list(stream)
    assert got[0].choices[0].delta.role == "assistant"
    assert "".join(e.choices[0].delta.content or "" for e in got[:-1]) == "It is é 😀."
    assert [e.choices[0].finish_reason for e in got[:-1]][-1] == "stop"
    assert got[-1].choices == [] and got[-1].usage is not None and got[-1].usage.completion_tokens > 4


def test_max_completion_tokens(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(model="tiny", messages=[USER], max_completion_tokens=2)
    assert got.choices[0].finish_reason == "length" and got.choices[0].message.content == "It"


def test_content_parts_developer_and_names(client: openai.OpenAI, server: Running) -> None:
    parts: Any = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages: Any = [{"role": "developer", "content": "D"}, {"role": "user", "content": parts, "name": "me"}]
    client.chat.completions.create(model="tiny", messages=messages)
    assert last_prompt(server) == "<system>D</s><user>one\ntwo</s><assistant>"


def test_continue_final_message_and_template_variables(client: openai.OpenAI, server: Running) -> None:
    messages: Any = [USER, {"role": "assistant", "content": "It is"}]
    body = {"continue_final_message": True, "add_generation_prompt": False}
    client.chat.completions.create(model="tiny", messages=messages, extra_body=body)
    assert last_prompt(server) == "<user>hello</s><assistant>It is"
    body = {"chat_template_kwargs": {"mood": "merry "}}
    client.chat.completions.create(model="tiny", messages=[USER], extra_body=body)
    assert last_prompt(server).endswith("<assistant>merry ")


def test_logprobs(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(model="tiny", messages=[USER], logprobs=True, top_logprobs=2)
    found = got.choices[0].logprobs
    assert found is not None and found.content is not None
    ids = [*ids_of("It is é 😀."), HF.eos_token_id]
    assert [t.logprob for t in found.content] == [-i / 100 for i in ids]
    data = b"".join(bytes(t.bytes or []) for t in found.content)
    assert data.decode() == "It is é 😀.</s>", "bytes make whole characters of what single tokens cannot show"
    assert all(len(t.top_logprobs) == 2 and t.top_logprobs[0].token == t.token for t in found.content)


def test_logprobs_in_a_stream_are_told_once(client: openai.OpenAI) -> None:
    with client.chat.completions.create(model="tiny", messages=[USER], logprobs=True, stream=True) as stream:
        told = [t for e in stream for t in ((e.choices[0].logprobs and e.choices[0].logprobs.content) or [])]
    assert [t.logprob for t in told] == [-i / 100 for i in [*ids_of("It is é 😀."), HF.eos_token_id]]


def test_tool_call_and_its_answer(client: openai.OpenAI, server: Running) -> None:
    messages: Any = [USER]
    got = client.chat.completions.create(model="tiny", messages=messages, tools=[TOOL])
    assert '"name": "weather"' in last_prompt(server)
    choice = got.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see."
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Oslo"} and call.id.startswith("call_")
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    after = client.chat.completions.create(model="tiny", messages=messages, tools=[TOOL])
    assert "weather(Oslo)" in last_prompt(server) and "<tool>rain" in last_prompt(server)
    assert after.choices[0].message.tool_calls is None and after.choices[0].finish_reason == "stop"


def test_tool_call_in_a_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.create(model="tiny", messages=[USER], tools=[TOOL], stream=True) as stream:
        choices = [e.choices[0] for e in stream]
    calls = [c for choice in choices for c in choice.delta.tool_calls or []]
    assert "".join(c.delta.content or "" for c in choices) == "Let me see."
    assert {c.index for c in calls} == {0} and calls[0].function is not None and calls[0].id
    assert calls[0].function.name == "weather" and all(not c.id for c in calls[1:])
    arguments = "".join((c.function and c.function.arguments) or "" for c in calls)
    assert json.loads(arguments) == {"city": "Oslo"} and len(calls) > 4, "arguments come in pieces"
    assert choices[-1].finish_reason == "tool_calls"


def test_tool_choice_none_shows_no_tools(client: openai.OpenAI, server: Running) -> None:
    got = client.chat.completions.create(model="tiny", messages=[USER], tools=[TOOL], tool_choice="none")
    assert "weather" not in last_prompt(server) and got.choices[0].message.content == "It is é 😀."


@pytest.mark.parametrize(
    ("body", "param", "match"),
    [
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role", "must be one of"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "must be a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "image_url"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages", "an empty tool"),
        ({"messages": "hello"}, "messages", "valid list"),
        ({"messages": [USER], "tools": [{"type": "code"}]}, "tools[0].type", "must be"),
        ({"messages": [USER], "tool_choice": "required"}, "tools", "needs tools"),
        ({"messages": [USER], "tools": [TOOL], "tool_choice": "maybe"}, "tool_choice", "must be none, auto"),
        (
            {"messages": [USER], "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            "the tools are weather",
        ),
        ({"messages": [USER], "top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"messages": [USER], "logprobs": True, "top_logprobs": 65}, "logprobs", "within 0 and 64"),
        ({"messages": [USER], "chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", "no variable"),
        ({"messages": [USER], "functions": []}, "functions", "unknown field"),
        ({"messages": [USER], "response_format": {"type": "yaml"}}, "response_format", "json_schema"),
        ({"messages": [USER], "modalities": ["audio"]}, "modalities[0]", "text"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
         "messages[1].tool_calls[0].function.arguments", "must be JSON"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(server: Running, body: dict[str, Any], param: str, match: str) -> None:
    answer = server.post("/v1/chat/completions", **body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error") and match in error["message"]


def test_tools_need_a_template_that_knows_them() -> None:
    with running(tool_parser=None) as server:
        answer = server.post("/v1/chat/completions", messages=[USER], tools=[TOOL])
        assert answer.status_code == 400 and "--tool-call-parser" in answer.json()["error"]["message"]
