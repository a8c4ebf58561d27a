"""The fake model behind the engine's interface: steps take a while, come back in order, and fail when told to."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from atom.serving.batch import Step
from atom.serving.config import SchedulerConfig
from atom.serving.result import StepResult

from .fake_runner import VOCAB, FakeRunner, prompt_logprobs


class DeviceError(Exception):
    """Injected."""


@dataclass
class FakeInFlight:
    runner: "FakeStepRunner"
    step: Step
    outcome: StepResult

    def result(self) -> StepResult:
        self.runner.under_way -= 1
        self.runner.gate.wait()
        if self.runner.fails_in_result(self.step):
            raise DeviceError("in result")
        return self.outcome


def _never(step: Step) -> bool:
    return False


class FakeStepRunner:
    """`gate` is open unless a test closes it: then steps do not come back."""

    def __init__(self, config: SchedulerConfig, depth: int = 2) -> None:
        self.depth = depth
        self.fake = FakeRunner(config.num_blocks, config.block_size, config.max_num_seqs)
        self.gate = threading.Event()
        self.gate.set()
        self.fails_in_launch: Callable[[Step], bool] = _never
        self.fails_in_result: Callable[[Step], bool] = _never
        self.fails_in_reset = False
        self.under_way = 0
        self.deepest = 0
        self.launched = threading.Semaphore(0)  # released by every launch
        self.resets = 0

    def launch(self, step: Step) -> FakeInFlight:
        if self.fails_in_launch(step):
            raise DeviceError("in launch")
        self.under_way += 1
        self.deepest = max(self.deepest, self.under_way)
        in_flight = FakeInFlight(self, step, StepResult(self.fake.run(step), None, prompt_logprobs(step)))
        self.launched.release()
        return in_flight

    def reset(self) -> None:
        self.resets += 1
        self.under_way = 0
        if self.fails_in_reset:
            raise DeviceError("the device is lost")


def small_config(**limits: int | bool) -> SchedulerConfig:
    defaults = {"max_model_len": 64, "num_blocks": 32, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16}
    return SchedulerConfig(VOCAB, **{**defaults, **limits})  # type: ignore[arg-type]
