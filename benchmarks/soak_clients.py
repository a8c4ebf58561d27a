"""The clients of a soak (soak.py): they stream, wait, leave, abort, send what is wrong, and compare what they get."""

import asyncio
import contextlib
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx

from atom.serving.openai.service import Service

from .soak_record import Recorder
from .soak_report import Report, Token, device_mib, memory_mib

EVERY_S = 15.0  # between two words about how it goes

BAD = (
    {"prompt": "x", "temperature": -1},
    {"prompt": []},
    {"prompt": [10**9]},
    {"prompt": "x", "max_tokens": 10**7},
    {"prompt": "x", "nonsense": True},
    {"prompt": "x", "n": 1000},
)


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
    """Clients of one service, which is at `url` too.

    asked     what they ask for, again and again
    tolerant  a batch rounds differently from a request alone: tokens are counted, not compared with that one's
    recorder  what the engine made of it
    progress  called with what is known so far, every EVERY_S
    """

    def __init__(
        self,
        url: str,
        service: Service,
        asked: list[dict[str, Any]],
        tolerant: bool,
        recorder: Recorder,
        progress: Callable[[Report], None],
        seed: int,
    ) -> None:
        self.url = url
        self.service = service
        self.asked = asked
        self.tolerant = tolerant
        self.recorder = recorder
        self.progress = progress
        self.draw = random.Random(seed)
        self.report = Report()
        self.wanted: list[list[list[Token]]] = []
        self.serial = 0

    async def run(self, seconds: float, clients: int, warm_up_s: float) -> None:
        """Everything; fills `report`."""
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits) as http:
            for body in self.asked:  # alone, one after the other
                self.wanted.append(await self._alone(http, body))
            await self._clients(http, warm_up_s, clients)
            self.report.memory_mib, self.report.device_mib = (memory_mib(),) * 2, (device_mib(),) * 2
            await self._clients(http, seconds, clients)
        await self._wait_idle()
        self._weigh()
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as http:
            await self._recompute(http)
        await self._wait_idle()

    def _weigh(self) -> None:
        self.report.memory_mib = self.report.memory_mib[0], memory_mib()
        self.report.device_mib = self.report.device_mib[0], device_mib()

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

        telling = asyncio.create_task(self._tell())
        await asyncio.gather(*(client() for _ in range(count)))
        telling.cancel()

    async def _tell(self) -> None:
        """Say every EVERY_S how it goes."""
        while True:
            await asyncio.sleep(EVERY_S)
            self._look()
            self._weigh()
            self.progress(self.report)

    async def _recompute(self, http: httpx.AsyncClient) -> None:
        """Ask for whole answers once more, as prompts, alone: behind a lost or doubled token the others are worth less.

        This holds however batches round, which only moves log-probabilities a little.
        """
        off = []
        for answer in self.recorder.answers:
            body = {"prompt": [*answer.prompt, *answer.token_ids], "max_tokens": 0, "echo": True, "logprobs": 0}
            (found,) = await self._alone(http, body)
            alone = [token.logprob for token in found[-len(answer.token_ids) :]]
            off.append(statistics.mean(abs(a - b) for a, b in zip(alone, answer.logprobs, strict=True)))
        self.report.recomputed = len(off)
        if off:
            self.report.recomputed_nats, self.report.worst_nats = statistics.mean(off), max(off)

    async def _whole(self, http: httpx.AsyncClient) -> None:
        place = self.draw.randrange(len(self.asked))
        answer = await http.post("/v1/completions", json=self.asked[place])
        if answer.status_code != 200:
            self._refused(answer)
            return
        body = answer.json()
        for index, choice in enumerate(body["choices"]):
            self._compare(place, body["id"], index, tokens_of(choice["logprobs"]), is_whole=True)
        self.report.outcomes["whole"] += 1

    async def _stream(self, http: httpx.AsyncClient, chunks: int | None = None, name: str = "") -> None:
        """All of a stream, or its first chunks."""
        place = self.draw.randrange(len(self.asked))
        got: dict[int, list[Token]] = {}
        ended: dict[int, str] = {}
        body, request_id = self.asked[place] | {"stream": True}, ""
        async with http.stream("POST", "/v1/completions", json=body, headers={"x-request-id": name}) as answer:
            if answer.status_code != 200:
                await answer.aread()
                self._refused(answer)
                return
            async for event in events_of(answer):
                if "error" in event:
                    ended[-1] = "error"
                    break
                choice, request_id = event["choices"][0], event["id"]
                got.setdefault(choice["index"], []).extend(tokens_of(choice["logprobs"]))
                if choice["finish_reason"]:
                    ended[choice["index"]] = choice["finish_reason"]
                if chunks is not None and (chunks := chunks - 1) < 0:
                    if not name:
                        break  # and leave
                    await http.post("/v1/abort", json={"request_id": name})
                    chunks = None
        for index, tokens in got.items():
            self._compare(place, request_id, index, tokens, is_whole=ended.get(index) == "length")
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

    def _compare(self, place: int, request_id: str, index: int, got: list[Token], is_whole: bool) -> None:
        """With what the engine made, and with what the same request yielded alone."""
        wanted = self.wanted[place][index]
        self.report.tokens += len(got)
        is_right = len(got) <= len(wanted) and (len(got) == len(wanted) or not is_whole)
        if self.tolerant:  # other tokens fill a guided text sooner or later
            is_right |= "guided_regex" in self.asked[place]
        else:
            is_right &= all(
                a.text == b.text and abs(a.logprob - b.logprob) < 1e-3 for a, b in zip(got, wanted, strict=False)
            )
        if not is_right:
            self.report.wrong.append(f"request {place}, sample {index}: {len(got)} tokens {got[:40]} for {wanted[:40]}")
        if (wrong := self.recorder.compare(request_id, index, got, is_whole)) is not None:
            self.report.wrong.append(f"request {place}, sample {index}: {wrong}")
        elif is_whole:
            self.recorder.keep(request_id, index, self.asked[place]["prompt"], got)

    async def _wait_idle(self) -> None:
        """Note what is left after everybody has gone; the server may take a moment to see that."""
        deadline = time.monotonic() + 10
        while True:
            self._look()
            if not any(self.report.left.values()) or time.monotonic() > deadline:
                return
            await asyncio.sleep(0.05)

    def _look(self) -> None:
        """Note what is there now."""
        frontend = self.service.frontend
        stats = frontend.engine.stats()
        self.report.preemptions = stats.num_preemptions
        self.report.left = {
            "running": stats.running,
            "waiting": stats.waiting,
            "used blocks": stats.used_blocks,
            "streams": frontend.num_open,
            "tasks": max(0, len(asyncio.all_tasks(frontend.loop)) - 2),  # the server's own, and its lifespan's
        }


async def events_of(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def tokens_of(logprobs: dict[str, Any]) -> list[Token]:
    return [Token(t, p) for t, p in zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)]
