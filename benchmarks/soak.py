"""Minutes of everything at once against a server in this process: does it leak, hang, lose or double a token?

    python -m benchmarks.soak smollm2-w4a4 --seconds 120
    python -m benchmarks.soak llama-w4a8 --seconds 300 --device cuda --tolerant -o soak.json

Clients of random lengths stream, wait, leave at random moments, abort by id, and send what is wrong, while the cache is
too small for all of them and steps fail at random. Every answer is compared with the tokens that the engine made, and
with what the same request yielded alone; of an answer that was cut, what came must be its beginning. Afterwards every
block is free, no request or task is left, and memory has not grown, the host's nor the GPU's. Then some of the answers
are computed once more, alone, as prompts: their tokens must be as likely as they were.
--tolerant is for devices where a batch rounds differently: with what came alone, tokens are then counted only.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import logging
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import uvicorn

from atom.serving.engine_config import EngineConfig
from atom.serving.openai.service import Service
from atom.serving.process import make_service
from atom.serving.server import build_app
from atom.serving.server_config import ServerConfig
from atom.serving.startup import start_up

from .soak_clients import Soak, requests
from .soak_record import Recorder
from .soak_report import MOST_NATS, Report


class InjectedError(Exception):
    """A fault that the soak put into a step."""


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
    progress: Callable[[Report], None] = lambda report: None,
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
        growth_blocks=0,  # preemptions are wanted
    )
    ready = start_up(model, config)
    runner = FaultyRunner(ready.engine._runner, fault_rate, seed)
    ready.engine._runner = runner
    service = make_service(model, ready, config, ServerConfig(generation_config="none"))
    recorder = Recorder(service.frontend, seed)
    asked = requests(distinct, ready.limits.vocab_size, longest, random.Random(seed))

    def tell(report: Report) -> None:
        report.faults = runner.faults
        progress(report)

    with served(service) as url:
        run = Soak(url, service, asked, tolerant, recorder, tell, seed)
        asyncio.run(run.run(seconds, clients, warm_up_s=min(20.0, max(2.0, seconds / 5))))
    run.report.faults = runner.faults
    return run.report


def as_json(report: Report, **more: Any) -> str:
    return json.dumps({**more, **vars(report), "outcomes": dict(report.outcomes), "wrong": report.wrong[:5]})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache-tokens", type=int, default=1024)
    parser.add_argument("--tolerant", action="store_true")
    parser.add_argument(
        "--most-nats", type=float, default=MOST_NATS, help="with inputs of 4 bits rounding alone makes some tenths"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, help="what is known so far is written there, again and again")
    options = parser.parse_args()
    logging.disable(logging.ERROR)  # injected faults are reported with their traces
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"
    began = time.monotonic()

    def tell(report: Report, state: str = "runs") -> None:
        told = as_json(report, state=state, device=where, at_s=round(time.monotonic() - began))
        print(told, flush=True)
        if options.out is not None:
            options.out.write_text(told + "\n")

    report = soak(
        options.model,
        options.seconds,
        options.clients,
        options.device,
        options.cache_tokens,
        tolerant=options.tolerant,
        seed=options.seed,
        progress=tell,
    )
    try:
        report.check(max_growth_mib=32, most_nats=options.most_nats)
    except AssertionError as error:
        tell(report, f"failed: {error}")
        return 1
    tell(report, "passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
