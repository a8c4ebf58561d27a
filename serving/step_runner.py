"""What the engine needs of whatever executes its steps."""

from typing import Protocol

from .batch import Step
from .result import StepResult


class InFlight(Protocol):
    """A step that was launched."""

    def result(self) -> StepResult:
        """Wait for the step's results. Raises what went wrong in it."""
        ...


class StepRunner(Protocol):
    """What the engine needs of a runner; all of it is called on the engine's thread.

    depth  steps that may be under way at once
    """

    depth: int

    def launch(self, step: Step) -> InFlight:
        """Start a step; those before it may still run."""
        ...

    def reset(self) -> None:
        """After a failed step: wait until the device has nothing to do. Raises if the device is lost."""
        ...


class StepError(Exception):
    """A step failed on the device; its cause says how."""

    def __init__(self, step: Step) -> None:
        super().__init__(step.number)
        self.step = step
