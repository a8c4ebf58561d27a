"""Load on an engine in process: submits planned requests, and notes when each step's tokens came out.

The same samples as a load over HTTP, without the HTTP. The engine calls back once a step on its own thread; the time is
read there, once, so that a batch of any size costs one clock reading.
"""

import threading
import time
from collections.abc import Callable, Sequence

from atom.errors import AtomError

from ..engine import Engine
from ..errors import QueueFullError
from ..request import FinishReason, Request
from ..sampling_params import SamplingParams
from ..sequence import Output
from .sample import Sample
from .under_way import MARK
from .window import FULL, StepTime
from .workload import WorkItem

PAUSE_S = 0.01  # after the engine's queue was full
LOOK_S = 0.05  # between two looks at whether enough was measured

Progress = Callable[[int, int, int], None]  # (requests done, in all, tokens so far, about)


class Driver:
    """Owns the outputs of one engine. `start` it, `run` plans one after the other, shut the engine down yourself."""

    def __init__(self, engine: Engine, draw: Callable[[WorkItem, int], list[int]], temperature: float = 0.0) -> None:
        self._engine = engine
        self._draw = draw
        self._temperature = temperature
        self._changed = threading.Condition()
        self._open: dict[str, Sample] = {}
        self._runs = 0
        self._is_windowed = False
        self._start = 0.0
        self._news: list[tuple[float, tuple[str, ...], tuple[int, ...]]] = []  # a step: when, who, how many tokens
        self._death: str | None = None
        self.steps: list[StepTime] = []

    def start(self) -> None:
        self._engine.start(self._listen, self._on_death)

    def run(
        self,
        items: Sequence[WorkItem],
        seed: int = 0,
        concurrency: int | None = None,
        due_s: Sequence[float] | None = None,
        progress: Progress = lambda done, total, tokens: None,
        window_s: float | None = None,
    ) -> list[Sample]:
        """Run the items and return a sample for each; `steps` has the engine's steps of this run.

        concurrency  requests handed to the engine at once; None: all, and the engine chooses
        due_s        when each arrives, ascending; None: as soon as concurrency allows
        window_s     seconds of a full batch (window.py) after which the run is cut; None: run all to their ends
        Raises InvalidRequestError for an item that the engine can never serve, and AtomError if it dies.
        """
        prompts = [tuple(self._draw(item, seed)) for item in items]
        self._runs += 1
        self._is_windowed = window_s is not None
        self._news = []
        samples: list[Sample] = []
        self._start = time.perf_counter()
        try:
            for index, (item, prompt) in enumerate(zip(items, prompts, strict=True)):
                due = self._wait_for_turn(concurrency, None if due_s is None else due_s[index], window_s)
                if due is None:
                    break
                sample = Sample(index, item.prompt_tokens, item.output_tokens, due, free_s=due)
                sample.is_under_way = item.is_under_way
                if not self._submit(sample, prompt, window_s):
                    break
                samples.append(sample)
                progress(index + 1 - len(self._open), len(items), self._tokens())
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: not self._open or self._death, timeout=LOOK_S if window_s else 0.2)
                    self._check_alive()
                    if not self._open or self._is_measured(window_s):
                        break
                progress(len(items) - len(self._open), len(items), self._tokens())
        finally:  # enough was measured; or an error, or the user's Ctrl-C
            for request_id in list(self._open):
                self._engine.abort(request_id)
        with self._changed:
            self._changed.wait_for(lambda: not self._open or self._death)
            self._check_alive()
        self.steps = self._count(samples)
        return samples

    def _tokens(self) -> int:
        """About how many came so far: this is asked for every request, so the last step stands for all."""
        return len(self._news) * len(self._news[-1][1]) if self._news else 0

    def _name(self, sample: Sample) -> str:
        return f"{MARK if sample.is_under_way else ''}bench-{self._runs}-{sample.index}"

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def _wait_for_turn(self, concurrency: int | None, due: float | None, window_s: float | None) -> float | None:
        """Wait until a request may go; returns when it was due, None if enough was measured meanwhile."""
        if due is not None:
            time.sleep(max(0.0, due - self._now()))
        with self._changed:
            while not (concurrency is None or len(self._open) < concurrency or self._death):
                self._changed.wait(None if window_s is None else LOOK_S)
                if self._is_measured(window_s):
                    return None
            self._check_alive()
        if due is not None:
            return due
        return 0.0 if concurrency is None else self._now()  # all at once are due at once

    def _submit(self, sample: Sample, prompt: tuple[int, ...], window_s: float | None) -> bool:
        """Hand a request to the engine; False if enough was measured before its queue had room."""
        name = self._name(sample)
        params = SamplingParams(max_tokens=sample.asked_output, temperature=self._temperature, ignore_eos=True)
        with self._changed:
            self._open[name] = sample
        while True:
            sample.sent_s = self._now()
            try:
                self._engine.submit(Request(name, prompt, params))
                return True
            except QueueFullError:
                with self._changed:
                    self._changed.wait(PAUSE_S)
                    self._check_alive()
                    if self._is_measured(window_s):
                        del self._open[name]
                        return False
            except AtomError:
                with self._changed:
                    del self._open[name]
                raise

    def _is_measured(self, window_s: float | None) -> bool:
        """Whether steps of a full batch span window_s by now."""
        news = self._news
        if window_s is None or not news:
            return False
        batch = max(len(names) for _, names, _ in news)
        first = next(now for now, names, _ in news if len(names) >= FULL * batch)
        return news[-1][0] - first >= window_s

    def _check_alive(self) -> None:
        if self._death is not None:
            raise AtomError(f"the engine died during the run: {self._death}; its log says more")

    def _on_death(self, reason: str) -> None:
        with self._changed:
            self._death = reason
            self._changed.notify()

    def _listen(self, outputs: Sequence[Output]) -> None:
        """On the engine's thread, which has better things to do: who got how many tokens is written down, no more."""
        now = self._now()
        names = tuple([output.request_id for output in outputs])
        self._news.append((now, names, tuple([len(output.token_ids) for output in outputs])))
        finished = [output for output in outputs if output.finish_reason is not None]
        if finished:
            with self._changed:
                for output in finished:
                    self._finish(output, now)
                self._changed.notify()

    def _finish(self, output: Output, now: float) -> None:
        sample = self._open.pop(output.request_id, None)
        if sample is None or output.finish_reason is None:  # of a run that was left
            return
        sample.end_s, sample.finish_reason = now, output.finish_reason.value
        sample.cached_tokens = output.cached_tokens
        failures = (FinishReason.ERROR,) if self._is_windowed else (FinishReason.ERROR, FinishReason.ABORT)
        if output.finish_reason in failures:
            sample.error = f"engine {output.finish_reason.value}"

    def _count(self, samples: Sequence[Sample]) -> list[StepTime]:
        """Enter what was written down into the samples; returns the steps."""
        by_name = {self._name(sample): sample for sample in samples}
        steps = []
        for now, names, counts in self._news:
            sequences = 0
            for name, count in zip(names, counts, strict=True):
                sample = by_name.get(name)
                if count and sample is not None:
                    sample.token_s.append(now)
                    sample.output_tokens = (sample.output_tokens or 0) + count
                    sequences += 1
            if sequences:
                steps.append(StepTime(now, sequences, sum(counts)))
        return steps
