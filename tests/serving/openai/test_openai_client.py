"""The official client and lm-eval's against real engines: a tiny random model, and real ones where there are any."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from atom.models.kv import DenseKV
from atom.models.loader import load_model, load_tokenizer
from atom.serving.engine_config import EngineConfig
from atom.serving.frontend import Frontend
from atom.serving.process import make_service
from atom.serving.server import build_app
from atom.serving.server_config import ServerConfig
from atom.serving.startup import start_up

from ..scripted import TEMPLATE, serve_app, wait_idle

openai = pytest.importorskip("openai", reason="the openai client is not installed")
ROOT = os.environ.get("ATOM_TEST_MODELS", "")
REAL = sorted(path.parent for path in Path(ROOT).glob("*/chat_template.jinja")) if ROOT else []
PARAMS = [
    pytest.param((None, "cpu"), id="tiny"),
    *(pytest.param((path, "cpu"), id=path.name, marks=pytest.mark.slow) for path in REAL),
    *(pytest.param((p, "cuda"), id=f"{p.name}-gpu", marks=[pytest.mark.slow, pytest.mark.gpu]) for p in REAL),
]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
USER: Any = {"role": "user", "content": "What is the capital of France?"}


class Served:
    def __init__(self, url: str, path: Path, frontend: Frontend, knows_paris: bool, device: str) -> None:
        self.url = url
        self.device = device
        self.path = path
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=600)
        self.frontend = frontend
        self.knows_paris = knows_paris

    def chat(self, **more: Any) -> Any:
        asked = {"model": "m", "messages": [USER], "temperature": 0, "max_tokens": 40} | more
        return self.client.chat.completions.create(**asked)


def longer(model: Path, copy: Path) -> Path:
    """The model with a context that has room for tools, written byte by byte."""
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return copy


@pytest.fixture(scope="module", params=PARAMS)
def served(request: pytest.FixtureRequest, tiny: Callable[[str], Path], tmp_path_factory: Any) -> Iterator[Served]:
    (path, device), template = request.param, None
    if path is None:
        path = longer(tiny("llama"), tmp_path_factory.mktemp("longer") / "model")
        template = path / "template.jinja"
        template.write_text(TEMPLATE)
    engine = EngineConfig(
        device=device,
        kv_cache_bytes="64MiB",
        max_num_seqs=8,
        max_num_batched_tokens=256,
        attention_split_tokens=1024 if device == "cuda" else None,  # a batch is not to change what one says
    )
    server = ServerConfig(served_model_name=("m",), chat_template=template, generation_config="none")
    service = make_service(str(path), start_up(str(path), engine), engine, server)
    with serve_app(build_app(service)) as url:
        is_whole = request.param[0] is not None and "quantization_config" not in (path / "config.json").read_text()
        knows = is_whole and device == "cpu"  # float32: SmolLM2's "The" leads "L" by less than a step of bfloat16
        made = Served(url, Path(path), service.frontend, knows, device)
        yield made
        made.client.close()
        wait_idle(service.frontend)


def test_large_bodies_are_read(served: Served) -> None:
    """The limits are those of the options, each in its place."""
    with pytest.raises(openai.BadRequestError, match="shorten it"):
        served.chat(messages=[{"role": "user", "content": "word " * 500_000}])


def test_chat_and_its_stream_are_the_same(served: Served) -> None:
    whole = served.chat()
    with served.chat(stream=True, stream_options={"include_usage": True}) as stream:
        events = list(stream)
    text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert text == whole.choices[0].message.content and len(text) > 5
    assert events[-1].usage.total_tokens == whole.usage.total_tokens
    if served.knows_paris:
        assert "Paris" in text and whole.choices[0].finish_reason == "stop"


def test_completion_alone_and_beside_others_is_the_same(served: Served) -> None:
    texts = ["Once upon a time", "The first thing", "Once upon a time"]
    ask: dict[str, Any] = {"model": "m", "temperature": 0, "max_tokens": 12}
    alone = [served.client.completions.create(prompt=text, **ask).choices[0].text for text in texts]
    together = served.client.completions.create(prompt=texts, **ask)
    assert [c.text for c in together.choices] == alone and alone[0] == alone[2]


def test_a_seed_repeats(served: Served) -> None:
    first, again, other = (served.chat(temperature=1, seed=seed, n=2) for seed in (7, 7, 8))
    texts = [[c.message.content for c in each.choices] for each in (first, again, other)]
    assert texts[0] == texts[1] != texts[2] and texts[0][0] != texts[0][1]


def test_logprobs_add_up(served: Served) -> None:
    choice = served.chat(logprobs=True, top_logprobs=3, max_tokens=6).choices[0]
    assert len(choice.logprobs.content) == 6
    for token in choice.logprobs.content:
        best = [t.logprob for t in token.top_logprobs]
        assert token.logprob == best[0] == max(best), "greedy takes the likeliest"
        assert sum(map(math.exp, best)) <= 1 + 1e-5
    joined = b"".join(bytes(t.bytes) for t in choice.logprobs.content)
    assert joined.decode(errors="replace") == choice.message.content


def test_prompt_logprobs_do_not_depend_on_how_they_are_asked_for(served: Served) -> None:
    ask: dict[str, Any] = {"model": "m", "temperature": 0, "max_tokens": 1}
    text = "The quick brown fox"
    echoed = served.client.completions.create(prompt=text, echo=True, logprobs=2, **ask).choices[0]
    other = served.client.completions.create(prompt=text, extra_body={"prompt_logprobs": 2}, **ask).choices[0]
    found = [max(each.values(), key=lambda v: v["logprob"])["logprob"] for each in other.prompt_logprobs[1:]]
    best = [max(each.values()) for each in echoed.logprobs.top_logprobs[1 : len(found) + 1]]
    assert found == pytest.approx(best) and echoed.text.startswith(text)


def test_json_schema(served: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"capital": {"enum": ["Paris", "Rome"]}, "population": {"type": "integer", "maximum": 99}},
        "required": ["capital", "population"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}}
    choice = served.chat(response_format=form, max_tokens=200, temperature=1, seed=1).choices[0]
    assert choice.finish_reason == "stop"
    value = json.loads(choice.message.content)
    assert set(value) == {"capital", "population"} and value["capital"] in ("Paris", "Rome")


def test_json_object_choice_regex_and_grammar(served: Served) -> None:
    choice = served.chat(response_format={"type": "json_object"}, max_tokens=100).choices[0]
    assert choice.message.content.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    picked = served.chat(extra_body={"guided_choice": ["yes", "no"]}).choices[0].message.content
    assert picked in ("yes", "no")
    number = served.chat(extra_body={"structured_outputs": {"regex": "[0-9]{3}"}}).choices[0].message.content
    assert len(number) == 3 and number.isdigit()
    grammar = 'root ::= "<" digit digit? ">"\ndigit ::= [0-9]'
    for asked in ({"structured_outputs": {"grammar": grammar}}, {"guided_grammar": grammar}):
        assert re.fullmatch("<[0-9]{1,2}>", served.chat(extra_body=asked).choices[0].message.content)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=["required", "named"]
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_demanded_tool_call_fits_its_schema(served: Served, choice: Any, stream: bool) -> None:
    ask: dict[str, Any] = {
        "tools": [TOOL],
        "tool_choice": choice,
        "max_tokens": 1000,
        "parallel_tool_calls": False,
        "temperature": 1,
        "seed": 3,
    }
    if stream:
        with served.chat(**ask, stream=True) as events:
            choices = [e.choices[0] for e in events]
        calls = [c for each in choices for c in each.delta.tool_calls or []]
        name, reason = calls[0].function.name, choices[-1].finish_reason
        arguments = "".join(c.function.arguments or "" for c in calls)
    else:
        got = served.chat(**ask).choices[0]
        (call,) = got.message.tool_calls
        name, arguments, reason = call.function.name, call.function.arguments, got.finish_reason
    value = json.loads(arguments)
    assert name == "weather" and value["city"] in ("Oslo", "Rome") and 1 <= value["days"] <= 9
    assert reason == ("tool_calls" if choice == "required" else "stop")


def test_a_bad_schema_is_the_clients_error(served: Served) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError) as error:
        served.chat(response_format=form)
    assert error.value.param == "response_format"


def test_errors_have_their_classes(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="does not exist") as unknown:
        served.chat(model="other")
    assert unknown.value.param == "model" and unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as error:
        served.chat(max_tokens=10**6)
    assert error.value.param == "max_tokens" and error.value.code == "invalid_value"


def test_lm_evals_api_model_scores_as_the_model_does(served: Served) -> None:
    if served.device != "cpu":
        pytest.skip("the scores are compared with those of the model on a CPU, in float32")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    pairs = [("The capital of France", " is Paris"), ("Once upon a time", " there was a king"), ("One", " two three")]
    api = LocalCompletionsAPI(model="m", base_url=f"{served.url}/v1/completions", batch_size=2, max_length=256)
    got = api.loglikelihood([Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)])
    model, tokenizer = load_model(served.path), load_tokenizer(served.path)
    for (context, continuation), (logprob, is_greedy) in zip(pairs, got, strict=True):
        ids, start = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
        kv = DenseKV(model.config)
        with torch.inference_mode():
            logits = model.logits(model(torch.tensor(ids), kv.positions(len(ids)), kv)).float()
        rows = logits[start - 1 : -1]
        chosen = rows.log_softmax(-1).gather(1, torch.tensor(ids[start:])[:, None])
        assert logprob == pytest.approx(float(chosen.sum()), abs=0.02)
        assert is_greedy == (rows.argmax(-1).tolist() == ids[start:])
    until = [Instance("generate_until", {}, ("The capital of France is", {"until": ["."], "max_gen_toks": 12}), 0)]
    (text,) = api.generate_until(until)
    direct = served.client.completions.create(
        model="m", prompt=until[0].args[0], temperature=0, max_tokens=12, stop="."
    )
    assert text == direct.choices[0].text


def test_lm_evals_api_models_get_the_texts_that_the_client_gets(served: Served) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.api_models import JsonChatStr
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    limits = {"until": ["\n\n"], "max_gen_toks": 12, "temperature": 0}
    ask: dict[str, Any] = {"model": "m", "temperature": 0, "max_tokens": 12, "stop": ["\n\n"]}
    api = LocalCompletionsAPI(model="m", base_url=f"{served.url}/v1/completions", batch_size=2, max_length=256)
    prompts = ["The capital of France is", "Once upon a time"]
    found = api.generate_until([Instance("generate_until", {}, (text, limits), i) for i, text in enumerate(prompts)])
    assert found == [served.client.completions.create(prompt=text, **ask).choices[0].text for text in prompts]
    chat = LocalChatCompletion(model="m", base_url=f"{served.url}/v1/chat/completions", max_length=256)
    asked = JsonChatStr(json.dumps([USER]))
    (text,) = chat.generate_until([Instance("generate_until", {}, (asked, limits), 0)])
    assert text == served.chat(max_tokens=12, stop=["\n\n"]).choices[0].message.content
