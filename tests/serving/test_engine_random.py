"""The engine under clients that come, leave and change their minds at random, from several threads, with faults.

Afterwards every sequence has had its last output, its tokens are a beginning of those it has alone (all of them, if it
ended by itself), and nothing is left behind.
"""

import random
import threading
import time
from collections.abc import Sequence

import pytest

from atom.serving.batch import Step
from atom.serving.engine import MAX_FAILURES, Engine
from atom.serving.errors import EngineDeadError, InvalidRequestError, QueueFullError
from atom.serving.request import FinishReason, Request
from atom.serving.sampling_params import SamplingParams
from atom.serving.scheduler import Scheduler
from atom.serving.sequence import Output

from .fake_runner import VOCAB, expected_output
from .fake_step_runner import FakeStepRunner, small_config

CLIENTS = 4
REQUESTS = 60  # of each client
Key = tuple[str, int]


class Soak:
    def __init__(self, seed: int, depth: int, fault_share: float) -> None:
        self.seed = seed
        self.config = small_config(
            num_blocks=20,
            max_waiting_requests=24,
            prefix_cache=bool(seed % 2),
            num_speculative_tokens=3 * (depth - 1),
            prompt_lookup_min=1,
        )
        self.runner = FakeStepRunner(self.config, depth)
        self.scheduler = Scheduler(self.config)
        self.engine = Engine(self.runner, self.scheduler, watchdog_s=60.0)
        self.faults = random.Random(seed)
        self.failed_last = 0
        self.fault_share = fault_share
        self.runner.fails_in_launch = self.runner.fails_in_result = self.fails
        self.lock = threading.Lock()
        self.requests: dict[str, Request] = {}
        self.tokens: dict[Key, list[int]] = {}
        self.ends: dict[Key, Output] = {}
        self.refused = 0

    def fails(self, step: Step) -> bool:
        """Now and then, but never as often in a row as kills the engine."""
        fault = self.failed_last < MAX_FAILURES - 1 and self.faults.random() < self.fault_share
        self.failed_last = self.failed_last + 1 if fault else 0
        return fault

    def take(self, outputs: Sequence[Output]) -> None:
        with self.lock:
            for output in outputs:
                key = output.request_id, output.index
                assert key not in self.ends, "an output after the last"
                self.tokens.setdefault(key, []).extend(output.token_ids)
                if output.finish_reason is not None:
                    self.ends[key] = output

    def client(self, number: int) -> None:
        draw = random.Random(self.seed * 100 + number)
        mine: list[str] = []
        for count in range(REQUESTS):
            prompt = (1,) * draw.randint(1, 20) + (2,) * draw.randint(0, 9)
            params = SamplingParams(
                draw.choice([None, 1, 3, 20]), temperature=draw.choice([0.0, 1.0]), n=draw.choice([1, 1, 1, 2, 4])
            )
            eos = tuple(draw.sample(range(VOCAB), draw.randint(0, 2)))
            request = Request(f"{number}-{count}", prompt, params, eos, draw.randint(-2, 2))
            try:
                with self.lock:
                    self.requests[request.request_id] = request
                self.engine.submit(request)
                mine.append(request.request_id)
            except (InvalidRequestError, QueueFullError):
                with self.lock:
                    del self.requests[request.request_id]
                    self.refused += 1
            for _ in range(draw.randint(0, 2)):
                if mine and draw.random() < 0.3:
                    self.engine.abort(draw.choice(mine))
                if mine and draw.random() < 0.3:
                    self.engine.stop(draw.choice(mine), draw.randint(0, 1))
                self.engine.stats()
            time.sleep(draw.choice([0, 0.002, 0.01]))

    def run(self) -> None:
        self.engine.start(self.take)
        clients = [threading.Thread(target=self.client, args=(number,)) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(60)
            assert not client.is_alive()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("fault_share", [0.0, 0.02])
def test_soak(depth: int, fault_share: float) -> None:
    soak = Soak(depth, depth, fault_share)
    soak.run()
    assert soak.engine.drain(60.0)
    soak.engine.shutdown()
    keys = {(r.request_id, index) for r in soak.requests.values() for index in range(r.params.n)}
    assert soak.ends.keys() == keys
    assert soak.refused < CLIENTS * REQUESTS * 0.7  # most, on a slow machine; there is enough left
    for key, last in soak.ends.items():
        request = soak.requests[key[0]]
        expected = expected_output(request, key[1], request.max_tokens(soak.config))
        assert soak.tokens[key] == expected[: len(soak.tokens[key])]
        if last.finish_reason is FinishReason.LENGTH or last.stop_token is not None:
            assert soak.tokens[key] == expected
    reasons = {last.finish_reason for last in soak.ends.values()}
    assert reasons >= {FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT}
    assert (FinishReason.ERROR in reasons) == (soak.engine.stats().num_failures > 0) == (fault_share > 0)
    soak.scheduler.check()
    stats = soak.engine.stats()
    assert (stats.num_accepted_tokens > 0) == (depth > 1)
    assert (stats.used_blocks, stats.waiting, stats.running, stats.in_flight) == (0, 0, 0, 0)
    assert not soak.engine._live and not soak.engine._commands and not soak.engine._steps
    assert soak.engine._queued_seqs == soak.engine._queued_tokens == 0


def test_everyone_is_answered_when_the_engine_is_shut_down_under_load() -> None:
    soak = Soak(7, 2, 0.0)
    soak.engine.start(soak.take)
    stop = threading.Timer(0.15, soak.engine.shutdown)
    stop.start()
    answered = 0
    for count in range(100_000):
        request = Request(f"{count}", (1, 2, 3), SamplingParams(max_tokens=30))
        try:
            soak.engine.submit(request)
        except QueueFullError:
            time.sleep(0.001)
        except EngineDeadError:
            break
        else:
            answered += 1
    stop.join(30)
    soak.engine.shutdown()
    assert len(soak.ends) == answered > 24
    soak.scheduler.check()
    assert soak.scheduler.blocks.num_used == 0
