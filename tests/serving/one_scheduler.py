"""A small scheduler on the fake model, and requests for it."""

from typing import Any

from atom.serving.config import SchedulerConfig
from atom.serving.request import Request
from atom.serving.sampling_params import SamplingParams
from atom.serving.scheduler import Scheduler

from .fake_runner import VOCAB, FakeEngine


def engine(depth: int = 1, **limits: Any) -> FakeEngine:
    config = {"max_model_len": 64, "num_blocks": 32, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16}
    config["growth_blocks"] = 0
    return FakeEngine(Scheduler(SchedulerConfig(VOCAB, **{**config, **limits})), depth)


def request(name: str, length: int = 6, max_tokens: int = 5, priority: int = 0, **params: Any) -> Request:
    """A prompt of its own for every first letter of a name."""
    prompt = tuple((ord(name[0]) * 7 + i * i) % VOCAB for i in range(length))
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, **params), priority=priority)


def names(run: FakeEngine) -> list[str]:
    step = run.launch()
    return [] if step is None else [e.sequence.request.request_id for e in step.entries]
