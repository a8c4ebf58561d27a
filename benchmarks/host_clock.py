"""Time of the engine's thread, by part of a step."""

import statistics
import time
from collections.abc import Callable
from typing import Any

from atom.serving.batch import Step
from atom.serving.engine import Engine


class Clock:
    """Time inside the engine's functions, in turns that launch a decode step of `batch` sequences.

    Make it before the engine is started. Parts: schedule, launch, update (tokens to their sequences), emit (to the
    front end), and step: all of a turn but the waiting, of which `waited` tells the seconds so far.
    It is the clock on the wall, which is read without a call of the system: in a sandbox one of the thread's own clock
    took 138 us (gVisor), eleven a step.
    """

    def __init__(self, engine: Engine, batch: int, waited: Callable[[], float] = lambda: 0.0) -> None:
        self.batch = batch
        self.parts: dict[str, list[float]] = {}
        self._waited = waited
        self._is_full = False
        scheduler, runner = engine._scheduler, engine._runner
        self._measure(scheduler, "schedule", "schedule_us")
        self._measure(runner, "launch", "launch_us")
        self._measure(scheduler, "update", "update_us")
        self._measure(engine, "_emit", "emit_us")
        self._measure(engine, "_turn", "step_us")
        self._watch(runner)

    def medians(self, count: int) -> dict[str, float]:
        """Microseconds, of the last `count` steps."""
        return {part: round(statistics.median(times[-count:]) * 1e6, 1) for part, times in self.parts.items() if times}

    def _watch(self, runner: Any) -> None:
        launch = runner.launch

        def run(step: Step) -> Any:
            self._is_full = step.batch.num_decodes == step.batch.num_tokens == self.batch
            return launch(step)

        runner.launch = run

    def _measure(self, owner: Any, name: str, part: str) -> None:
        inner = getattr(owner, name)
        times = self.parts.setdefault(part, [])

        def run(*args: Any, **kwargs: Any) -> Any:
            waited, started = self._waited(), time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                if self._is_full:
                    times.append(time.perf_counter() - started - (self._waited() - waited))

        setattr(owner, name, run)
