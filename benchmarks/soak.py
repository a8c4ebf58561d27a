"""Minutes of everything at once against a server in this process: does it leak, hang, lose or double a token?

    python benchmarks/soak.py smollm2-w4a4 --seconds 120
    python benchmarks/soak.py llama-w4a8 --seconds 300 --device cuda --tolerant

Clients of random lengths stream, wait, leave at random moments, abort by id, and send what is wrong, while the cache is
too small for all of them and steps fail at random. Every answer is compared with what the same request yielded alone;
of an answer that was cut, what came must be its beginning. Afterwards every block is free, no request or task is left,
and memory has not grown, the host's nor the GPU's. --tolerant is for devices where a batch rounds differently: tokens
are then counted only.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn

from atom.serving.engine_config import EngineConfig
from atom.serving.openai.service import Service
from atom.serving.process import make_service
from atom.serving.server import build_app
from atom.serving.server_config import ServerConfig
from atom.serving.startup import start_up

BAD = (
    {"prompt": "x", "temperature": -1},
    {"prompt": []},
    {"prompt": [10**9]},
    {"prompt": "x", "max_tokens": 10**7},
    {"prompt": "x", "nonsense": True},
    {"prompt": "x", "n": 1000},
)
ABORTED, FAILED = ("abort",), ("error",)


class InjectedError(Exception):
    """A fault that the soak put into a step."""


@dataclass(frozen=True)
class Token:
    text: str
    logprob: float


@dataclass
class Report:
    """What happened; `check` says whether it may."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    faults: int = 0
    preemptions: int = 0
    memory_mib: tuple[float, float] = (0.0, 0.0)
    device_mib: tuple[float, float] = (0.0, 0.0)
    left: dict[str, int] = field(default_factory=dict)

    def check(self, max_growth_mib: float) -> None:
        """AssertionError for anything lost, doubled, left or leaked, and if the soak never got hard."""
        assert not self.wrong, f"{len(self.wrong)} answers are wrong; the first: {self.wrong[0]}"
        assert not any(self.left.values()), f"left behind: {self.left}"
        for where, (before, after) in (("memory", self.memory_mib), ("the GPU's memory", self.device_mib)):
            grown = after - before
            assert grown < max_growth_mib, f"{where} grew by {grown:.1f} MiB, at most {max_growth_mib} are allowed"
        missing = [kind for kind in ("whole", "left", "aborted", "refused", "failed") if not self.outcomes[kind]]
        assert not missing and self.preemptions, f"the soak was too easy: no {missing}, {self.preemptions} preemptions"


class FaultyRunner:
    """A runner some of whose steps fail, never two in a row: the engine gives up after three."""

    def __init__(self, runner: Any, rate: float, seed: int) -> None:
        self.runner = runner
        self.rate = rate
        self.faults = 0
        self._draw = random.Random(seed)
        self._ok = 0

    @property
    def depth(self) -> int:
        return int(self.runner.depth)

    def reset(self) -> None:
        self.runner.reset()

    def launch(self, step: Any) -> Any:
        fails = self._ok > 2 * self.depth and self._draw.random() < self.rate
        self._ok = 0 if fails else self._ok + 1
        self.faults += fails
        if fails and self._draw.random() < 0.5:
            raise InjectedError("in launch")
        launched = self.runner.launch(step)
        return FaultyResult() if fails else launched


class FaultyResult:
    def result(self) -> Any:
        raise InjectedError("in result")


def requests(count: int, vocab_size: int, longest: int, draw: random.Random) -> list[dict[str, Any]]:
    """Different requests: greedy, seeded, filtered, penalised, guided; with a common beginning, of several samples."""
    common = [draw.randrange(vocab_size) for _ in range(longest // 4)]
    made = []
    for number in range(count):
        prompt = [draw.randrange(vocab_size) for _ in range(draw.randint(1, longest // 3))]
        made.append(
            {
                "prompt": common + prompt if number % 3 == 0 else prompt,
                "max_tokens": draw.randint(1, longest // 3),
                "temperature": draw.choice([0, 0, 0.8, 1.2]),
                "seed": number,
                "n": draw.choice([1, 1, 1, 2]),
                "ignore_eos": True,
                "logprobs": 0,
                **draw.choice([{}, {}, {"top_p": 0.8}, {"top_k": 9, "presence_penalty": 1.0}]),
                **({"guided_regex": f"[ab]{{{number + 1},{longest}}}"} if number % 4 == 1 else {}),
            }
        )
    return made


class Soak:
    def __init__(self, url: str, service: Service, asked: list[dict[str, Any]], tolerant: bool, seed: int) -> None:
        self.url = url
        self.service = service
        self.asked = asked
        self.tolerant = tolerant
        self.draw = random.Random(seed)
        self.report = Report()
        self.wanted: list[list[list[Token]]] = []
        self.serial = 0

    async def run(self, seconds: float, clients: int, warm_up_s: float) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits) as http:
            for body in self.asked:  # alone, one after the other
                self.wanted.append(await self._alone(http, body))
            await self._clients(http, warm_up_s, clients)
            before, on_device = memory_mib(), device_mib()
            await self._clients(http, seconds, clients)
        await self._wait_idle()
        self.report.memory_mib = (before, memory_mib())
        self.report.device_mib = (on_device, device_mib())

    async def _alone(self, http: httpx.AsyncClient, body: dict[str, Any]) -> list[list[Token]]:
        while True:
            answer = await http.post("/v1/completions", json=body)
            if answer.status_code == 200:  # a fault may hit this one too
                return [tokens_of(c["logprobs"]) for c in answer.json()["choices"]]
            assert answer.json()["error"]["code"] == "step_failed", answer.text

    async def _clients(self, http: httpx.AsyncClient, seconds: float, count: int) -> None:
        until = time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < until:
                kind = self.draw.choices(
                    (self._whole, self._stream, self._leave, self._abort, self._bad), (4, 6, 3, 2, 1)
                )[0]
                await kind(http)

        await asyncio.gather(*(client() for _ in range(count)))

    async def _whole(self, http: httpx.AsyncClient) -> None:
        place = self.draw.randrange(len(self.asked))
        answer = await http.post("/v1/completions", json=self.asked[place])
        if answer.status_code != 200:
            self._refused(answer)
            return
        for index, choice in enumerate(answer.json()["choices"]):
            self._compare(place, index, tokens_of(choice["logprobs"]), is_whole=True)
        self.report.outcomes["whole"] += 1

    async def _stream(self, http: httpx.AsyncClient, chunks: int | None = None, name: str = "") -> None:
        """All of a stream, or its first chunks."""
        place = self.draw.randrange(len(self.asked))
        got: dict[int, list[Token]] = {}
        ended: dict[int, str] = {}
        body = self.asked[place] | {"stream": True}
        async with http.stream("POST", "/v1/completions", json=body, headers={"x-request-id": name}) as answer:
            if answer.status_code != 200:
                await answer.aread()
                self._refused(answer)
                return
            async for event in events_of(answer):
                if "error" in event:
                    ended[-1] = "error"
                    break
                choice = event["choices"][0]
                got.setdefault(choice["index"], []).extend(tokens_of(choice["logprobs"]))
                if choice["finish_reason"]:
                    ended[choice["index"]] = choice["finish_reason"]
                if chunks is not None and (chunks := chunks - 1) < 0:
                    if not name:
                        break  # and leave
                    await http.post("/v1/abort", json={"request_id": name})
                    chunks = None
        for index, tokens in got.items():
            self._compare(place, index, tokens, is_whole=ended.get(index) == "length")
        kinds = set(ended.values())
        kind = "failed" if "error" in kinds else "aborted" if "abort" in kinds else "streamed"
        self.report.outcomes[kind if len(ended) == body["n"] or -1 in ended else "left"] += 1

    async def _leave(self, http: httpx.AsyncClient) -> None:
        """In the middle of a stream, or of the wait for a whole answer."""
        if self.draw.random() < 0.5:
            await self._stream(http, chunks=self.draw.randint(0, 20))
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.draw.random() * 0.3):
                await self._whole(http)
        self.report.outcomes["left"] += 1

    async def _abort(self, http: httpx.AsyncClient) -> None:
        self.serial += 1
        await self._stream(http, chunks=self.draw.randint(0, 10), name=f"soak-{self.serial}")

    async def _bad(self, http: httpx.AsyncClient) -> None:
        answer = await http.post("/v1/completions", json=self.draw.choice(BAD))
        if answer.status_code != 400:
            self.report.wrong.append(f"a bad request was answered with {answer.status_code}: {answer.text}")
        self.report.outcomes["refused"] += 1

    def _refused(self, answer: httpx.Response) -> None:
        code = answer.json()["error"]["code"]
        if code not in ("step_failed", "queue_full"):
            self.report.wrong.append(f"{answer.status_code}: {answer.text}")
        self.report.outcomes["failed" if code == "step_failed" else "turned away"] += 1

    def _compare(self, place: int, index: int, got: list[Token], is_whole: bool) -> None:
        wanted = self.wanted[place][index]
        self.report.tokens += len(got)
        is_right = len(got) <= len(wanted) and (len(got) == len(wanted) or not is_whole)
        if not self.tolerant:
            is_right &= all(
                a.text == b.text and abs(a.logprob - b.logprob) < 1e-3 for a, b in zip(got, wanted, strict=False)
            )
        if not is_right:
            self.report.wrong.append(f"request {place}, sample {index}: {len(got)} tokens {got[:40]} for {wanted[:40]}")

    async def _wait_idle(self) -> None:
        """Note what is left after everybody has gone; the server may take a moment to see that."""
        frontend, deadline = self.service.frontend, time.monotonic() + 10
        while True:
            stats = frontend.engine.stats()
            self.report.left = {
                "running": stats.running,
                "waiting": stats.waiting,
                "used blocks": stats.used_blocks,
                "streams": frontend.num_open,
                "tasks": max(0, len(asyncio.all_tasks(frontend.loop)) - 2),  # the server's own, and its lifespan's
            }
            if not any(self.report.left.values()) or time.monotonic() > deadline:
                self.report.preemptions = stats.num_preemptions
                return
            await asyncio.sleep(0.05)


async def events_of(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def tokens_of(logprobs: dict[str, Any]) -> list[Token]:
    return [Token(t, p) for t, p in zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)]


def memory_mib() -> float:
    """What this process holds, after everything that nobody uses is gone."""
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status does not say how much memory is used; run the soak on Linux.")


def device_mib() -> float:
    """What torch holds of a GPU, cached for itself or not; 0 without one."""
    return torch.cuda.memory_reserved() / 2**20 if torch.cuda.is_available() else 0.0


@contextlib.contextmanager
def served(service: Service) -> Iterator[str]:
    """The service behind uvicorn, in a thread."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(build_app(service), log_level="critical", access_log=False))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not end"


def soak(
    model: str,
    seconds: float,
    clients: int = 16,
    device: str = "cpu",
    cache_tokens: int = 1024,
    longest: int = 192,
    fault_rate: float = 0.004,
    tolerant: bool = False,
    distinct: int = 24,
    seed: int = 0,
) -> Report:
    """Run one; the caller checks the report."""
    probe = start_up(model, EngineConfig(device=device, kv_cache_bytes="16MiB", enforce_eager=True))
    token_bytes = probe.facts["kv_cache_bytes"] / probe.facts["kv_cache_tokens"]
    del probe
    gc.collect()
    config = EngineConfig(
        device=device,
        kv_cache_bytes=int(cache_tokens * token_bytes),
        max_num_seqs=clients,
        max_num_batched_tokens=max(64, clients),
        max_waiting_requests=max(2, clients // 2),
    )
    ready = start_up(model, config)
    runner = FaultyRunner(ready.engine._runner, fault_rate, seed)
    ready.engine._runner = runner
    service = make_service(model, ready, config, ServerConfig(generation_config="none"))
    asked = requests(distinct, ready.limits.vocab_size, longest, random.Random(seed))
    with served(service) as url:
        run = Soak(url, service, asked, tolerant, seed)
        asyncio.run(run.run(seconds, clients, warm_up_s=min(20.0, max(2.0, seconds / 5))))
    run.report.faults = runner.faults
    return run.report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache-tokens", type=int, default=1024)
    parser.add_argument("--tolerant", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    report = soak(
        options.model,
        options.seconds,
        options.clients,
        options.device,
        options.cache_tokens,
        tolerant=options.tolerant,
        seed=options.seed,
    )
    summary = {**vars(report), "outcomes": dict(report.outcomes), "wrong": report.wrong[:5]}
    print(json.dumps(summary, default=str))
    report.check(max_growth_mib=32)
    return 0


if __name__ == "__main__":
    sys.exit(main())
