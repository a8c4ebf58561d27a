"""A server whose model is a script: the real front end, engine and scheduler, over a runner that recites."""

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn

from atom.serving.batch import Entry, Step
from atom.serving.config import SchedulerConfig
from atom.serving.connection import connection_class
from atom.serving.engine import Engine
from atom.serving.frontend import Frontend
from atom.serving.metrics import Metrics
from atom.serving.openai.service import Limits, Service
from atom.serving.request import Request
from atom.serving.result import StepResult, TokenLogprobs
from atom.serving.scheduler import Scheduler
from atom.serving.server import AppOptions, build_app
from atom.serving.tokenizer import Tokenizer

from .tiny_tokenizers import byte_level

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' and not m.content %}{{ raise_exception('an empty tool') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.city }}){% endfor %}"
    "{% if not (loop.last and not add_generation_prompt) %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{{ mood }}{% endif %}"
)
HF = byte_level()
EOS = HF.eos_token_id


def ids_of(text: str) -> list[int]:
    found: list[int] = HF.encode(text, add_special_tokens=False)
    return found


class InjectedError(Exception):
    """Injected."""


@dataclass
class ScriptedRunner:
    """Says `answer(request, index)` token by token, then EOS.

    pause_s  a step takes as long
    gate     closed by a test, no step comes back
    faults   steps that fail, one for each item taken from it
    """

    answer: Callable[[Request, int], str] = lambda request, index: "Hello there."
    depth: int = 1
    pause_s: float = 0.0
    gate: threading.Event = field(default_factory=threading.Event)
    faults: list[str] = field(default_factory=list)
    seen: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate.set()

    def launch(self, step: Step) -> "ScriptedRunner._InFlight":
        self.seen += [s.request for s in step.admitted if s.epoch == 1 and s.index == 0]
        return self._InFlight(self, step)

    def reset(self) -> None:
        pass

    @dataclass
    class _InFlight:
        runner: "ScriptedRunner"
        step: Step

        def result(self) -> StepResult:
            runner, step = self.runner, self.step
            time.sleep(runner.pause_s)
            runner.gate.wait()
            if runner.faults:
                raise InjectedError(runner.faults.pop())
            entries = [e for e in step.entries if e.samples]
            tokens = [runner.token(e) for e in entries]
            prompts = {i: prompt_logprobs(e) for i, e in enumerate(step.entries) if e.sequence.computes_prompt}
            logprobs = [logprob(t, e.sequence.params.logprobs) for t, e in zip(tokens, entries, strict=True)]
            return StepResult(tokens, logprobs, prompts)

    def token(self, entry: Entry) -> int:
        sequence = entry.sequence
        script = [*ids_of(self.answer(sequence.request, sequence.index)), EOS]
        place = entry.end - sequence.num_prompt
        return script[place] if place < len(script) else EOS


def logprob(token: int, k: int | None) -> TokenLogprobs | None:
    """Minus a hundredth of the token id; alternatives are the ids after it."""
    if k is None:
        return None
    return TokenLogprobs(token, -token / 100, tuple((token + i, -(token + i) / 100) for i in range(k)))


def prompt_logprobs(entry: Entry) -> list[TokenLogprobs]:
    sequence = entry.sequence
    tokens = sequence.token_ids[entry.start + 1 : min(entry.end, sequence.num_prompt - 1) + 1]
    found = [logprob(token, sequence.params.prompt_logprobs) for token in tokens]
    return [each for each in found if each is not None]


@dataclass(frozen=True)
class Running:
    """A server that runs; `http` calls it."""

    url: str
    runner: ScriptedRunner
    engine: Engine
    service: Service
    http: httpx.Client

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def wait_idle(self) -> None:
        """Until no request is left; then every block must be free."""
        wait_idle(self.service.frontend)


def wait_idle(frontend: Frontend, seconds: float = 20) -> None:
    """The engine learns of a stop string, or of a client that left, a moment after the answer."""
    deadline = time.monotonic() + seconds
    while True:
        stats = frontend.engine.stats()
        if not (stats.running or stats.waiting or stats.used_blocks or frontend.num_open):
            return
        assert time.monotonic() < deadline, f"requests or blocks are left: {stats}"
        time.sleep(0.005)


def scripted_service(
    runner: ScriptedRunner,
    tool_parser: str | None = "hermes",
    limits_http: Limits | None = None,
    watchdog_s: float | None = None,
    **limits: Any,
) -> Service:
    defaults = {"max_model_len": 1024, "num_blocks": 256, "block_size": 16, "max_num_seqs": 16}
    config = SchedulerConfig(len(HF), **(defaults | limits))
    engine = Engine(runner, Scheduler(config), watchdog_s)
    frontend = Frontend(engine, Tokenizer(HF, TEMPLATE), Metrics(engine.stats, "tiny"))
    return Service(
        frontend,
        ("tiny", "alias"),
        "somewhere/tiny",
        (EOS,),
        limits=limits_http or Limits(),
        tool_parser=tool_parser,
    )


def read_answer(raw: socket.socket) -> bytes:
    """One HTTP answer with a content-length, whole; it may come in pieces."""
    data = b""
    while True:
        head, end, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head) if end else None
        if length and len(body) >= int(length[1]):
            return data
        more = raw.recv(4096)
        assert more, f"the connection ended after {data!r}"
        data += more


@contextlib.contextmanager
def serve_app(app: Any, timeout_s: float = 60) -> Iterator[str]:
    """The app behind uvicorn on a port of its own, in a thread; yields the URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        http = connection_class(timeout_s)
        config = uvicorn.Config(app, http=http, ws="none", log_level="critical", access_log=False, lifespan="on")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        deadline = time.monotonic() + 10
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive(), "the server did not stop"


@contextlib.contextmanager
def running(
    runner: ScriptedRunner | None = None, options: AppOptions | None = None, **service: Any
) -> Iterator[Running]:
    runner = runner or ScriptedRunner()
    made = scripted_service(runner, **service)
    with serve_app(build_app(made, options)) as url, httpx.Client(base_url=url, timeout=20) as http:
        try:
            yield Running(url, runner, made.frontend.engine, made, http)
        finally:
            runner.gate.set()
