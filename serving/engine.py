"""The engine: one thread that owns the scheduler and the device, and a door for everyone else.

The thread keeps up to `runner.depth` steps under way: while the device executes step n, the host schedules and launches
step n + 1, then waits for n's tokens. Requests are checked and counted when they are submitted, under a lock that is
never held for longer than that, so that a refusal comes at once even while a long step runs; what was let in is
queued for the thread as a command.

Every sequence that was let in gets exactly one last `Output`, whatever happens: it ends, is aborted, its step fails,
the engine dies, gets stuck or is shut down.
"""

import gc
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

from .admission import check_room
from .batch import Step
from .errors import EngineDeadError, EngineDrainingError, InvalidRequestError
from .news import ended
from .request import FinishReason, Request
from .scheduler import Scheduler
from .sequence import Output
from .stats import Stats
from .step_runner import InFlight, StepError, StepRunner
from .watchdog import Watchdog

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # failed steps in a row after which the engine gives up
GRACE_S = 10.0  # what aborting and joining may take


class Engine:
    """Requests in from any thread, outputs out on the engine's thread.

    watchdog_s  a step that takes longer kills the engine; None for no watchdog
    """

    def __init__(self, runner: StepRunner, scheduler: Scheduler, watchdog_s: float | None = 300.0) -> None:
        self.config = scheduler.config
        self._runner = runner
        self._scheduler = scheduler
        self._steps: deque[tuple[Step, InFlight]] = deque()
        self._failures = 0  # in a row
        self._num_failures = 0
        self._on_outputs: Callable[[Sequence[Output]], None] | None = None
        self._on_death: Callable[[str], None] | None = None
        self._thread = threading.Thread(target=self._run, name="atom-engine", daemon=True)
        self._watchdog = None if watchdog_s is None else Watchdog(watchdog_s, self._die)

        self._changed = threading.Condition()  # guards everything below
        self._commands: deque[Callable[[], list[Output]]] = deque()
        self._live: dict[str, set[int]] = {}  # samples that have not had their last output
        self._queued_seqs = 0  # submitted, not yet known to the scheduler
        self._queued_tokens = 0
        self._stats = scheduler.stats()
        self._is_draining = False
        self._is_stopping = False
        self._error: str | None = None

    def start(
        self, on_outputs: Callable[[Sequence[Output]], None], on_death: Callable[[str], None] | None = None
    ) -> None:
        """Start the thread.

        on_outputs  called on the engine's thread, once a step, with all news; it must be quick and not raise. (Only if
                    a step is stuck, the watchdog's thread calls it, with the last outputs of all requests.)
        on_death    called once if the engine gives up, with the reason, after the last outputs
        """
        self._on_outputs, self._on_death = on_outputs, on_death
        self._thread.start()
        if self._watchdog is not None:
            self._watchdog.start()

    @property
    def healthy(self) -> bool:
        """Whether the thread runs and takes requests, or finishes what it has."""
        return self._error is None and not self._is_stopping and self._thread.is_alive()

    @property
    def error(self) -> str | None:
        """Why the engine is dead; None while it is not."""
        return self._error

    def submit(self, request: Request) -> None:
        """Let a request in; its outputs follow.

        Raises, at once, InvalidRequestError if it can never be served, QueueFullError if too many wait already,
        EngineDrainingError or EngineDeadError if the engine takes nothing any more.
        """
        request.max_tokens(self.config)
        n = request.params.n
        tokens = n * len(request.prompt_token_ids)
        with self._changed:
            self._check_open()
            if request.request_id in self._live:
                raise InvalidRequestError(
                    "request_id", f"request_id {request.request_id!r} is in use; give every request an id of its own."
                )
            waiting, waiting_tokens = self._stats.waiting_new, self._stats.waiting_tokens
            check_room(self.config, waiting + self._queued_seqs, waiting_tokens + self._queued_tokens, n, tokens)
            self._queued_seqs += n
            self._queued_tokens += tokens
            self._live[request.request_id] = set(range(n))
            self._command(lambda: self._add(request))

    def abort(self, request_id: str) -> None:
        """End a request at whatever stage it is; nothing happens if it has ended or never was."""
        with self._changed:
            if request_id in self._live:
                self._command(lambda: self._scheduler.abort(request_id))

    def stop(self, request_id: str, index: int) -> None:
        """End one sample, because a stop string was found in its text; nothing happens if it has ended."""
        with self._changed:
            if index in self._live.get(request_id, ()):
                self._command(lambda: self._scheduler.stop(request_id, index))

    def stats(self) -> Stats:
        """The numbers as of the last step, and what was submitted since."""
        with self._changed:
            return self._stats._replace(
                waiting=self._stats.waiting + self._queued_seqs,
                waiting_new=self._stats.waiting_new + self._queued_seqs,
                waiting_tokens=self._stats.waiting_tokens + self._queued_tokens,
            )

    def drain(self, deadline_s: float) -> bool:
        """Take nothing new and wait for what is there; what has not ended after deadline_s is aborted.

        Returns whether everything ended by itself.
        """
        with self._changed:
            self._is_draining = True
            if self._changed.wait_for(lambda: not self._live, deadline_s):
                return self._error is None
            logger.warning("%d requests have not ended after %g s and are aborted", len(self._live), deadline_s)
            for request_id in self._live:
                self.abort(request_id)
            self._changed.wait_for(lambda: not self._live, GRACE_S)
        return False

    def shutdown(self) -> None:
        """Abort what is there and end the thread; may be called again, and on a dead engine."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(GRACE_S)
            if self._thread.is_alive():
                self._die(f"the engine's thread has not ended {GRACE_S:g} s after it was asked to")
        if self._watchdog is not None:
            self._watchdog.stop()
            if not self._thread.is_alive():
                self._watchdog = None  # it holds this engine, which else waited for the garbage collector
        gc.unfreeze()  # see start_up: what the engine held may go

    # --- under the lock ---

    def _check_open(self) -> None:
        if self._error is not None:
            raise EngineDeadError(f"the engine is dead: {self._error}; restart the server.")
        if self._is_draining or self._is_stopping:
            raise EngineDrainingError("the engine is shutting down and takes no requests; send it to another server.")
        if not self._thread.is_alive():
            raise EngineDeadError("the engine has not been started; call start() first.")

    def _command(self, command: Callable[[], list[Output]]) -> None:
        self._commands.append(command)
        self._changed.notify_all()

    # --- on the engine's thread ---

    def _run(self) -> None:
        try:
            while self._wait():
                self._turn()
            self._end()
        except BaseException as error:
            logger.critical("the engine's thread ends", exc_info=True)
            self._die(f"{type(error).__name__}: {error}")

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when the thread is to end."""
        is_busy = bool(self._steps) or self._scheduler.has_unfinished
        with self._changed:
            if not is_busy:
                self._changed.wait_for(lambda: self._commands or self._is_stopping or self._error)
            return not self._is_stopping and self._error is None

    def _turn(self) -> None:
        """Obey commands, launch a step if there is room for one under way, take the results of one that must end."""
        self._obey()
        if self._watchdog is not None:
            self._watchdog.begin(f"step {self._stats.num_steps}")
        try:
            is_launched = self._may_launch() and self._launch()
            if self._steps and (not is_launched or len(self._steps) >= self._runner.depth):
                self._collect()
            elif not is_launched and self._scheduler.has_unfinished:
                raise AssertionError("requests are left, no step is under way, and none can be scheduled")
        except StepError as failure:
            self._recover(failure)
        finally:
            if self._watchdog is not None:
                self._watchdog.end()
        if not self._scheduler.has_unfinished and not self._steps and self._scheduler.blocks.num_used:
            raise AssertionError(f"{self._scheduler.blocks.num_used} KV blocks are used by nobody")

    def _obey(self) -> None:
        with self._changed:
            commands = list(self._commands)
            self._commands.clear()
        if commands:
            self._emit([output for command in commands for output in command()])

    def _add(self, request: Request) -> list[Output]:
        self._scheduler.add(request)
        with self._changed:
            n = request.params.n
            self._queued_seqs -= n
            self._queued_tokens -= n * len(request.prompt_token_ids)
            self._publish()
        return []

    def _may_launch(self) -> bool:
        return len(self._steps) < self._runner.depth

    def _launch(self) -> bool:
        step = self._scheduler.schedule()
        if step is None:
            return False
        with self._changed:
            self._publish()  # what was admitted waits no more
        try:
            self._steps.append((step, self._runner.launch(step)))
        except Exception as error:
            raise StepError(step) from error
        return True

    def _collect(self) -> None:
        step, in_flight = self._steps.popleft()
        try:
            result = in_flight.result()
        except Exception as error:
            raise StepError(step) from error
        self._failures = 0
        self._emit(self._scheduler.update(step, result))

    def _recover(self, failure: StepError) -> None:
        """End the sequences that were under way, and go on with those that wait, unless this happens every time."""
        self._failures += 1
        self._num_failures += 1
        cause = failure.__cause__
        logger.error("step %d of %d sequences failed", failure.step.number, failure.step.batch.num_seqs, exc_info=cause)
        self._steps.clear()
        outputs = self._scheduler.fail()
        try:
            self._runner.reset()
        finally:  # whatever becomes of the device, these have ended
            self._emit(outputs)
        if self._failures >= MAX_FAILURES:
            raise EngineDeadError(f"{self._failures} steps in a row failed, the last with {cause!r}")

    def _end(self) -> None:
        """Asked to stop: nothing may run on, nobody may be left waiting."""
        if self._error is not None:
            return
        self._steps.clear()
        self._obey()
        with self._changed:
            live = list(self._live)
        self._emit([output for request_id in live for output in self._scheduler.abort(request_id)])
        self._runner.reset()

    def _publish(self) -> None:
        self._stats = self._scheduler.stats(self._num_failures)

    def _emit(self, outputs: Sequence[Output]) -> None:
        with self._changed:
            self._publish()
            if self._error is not None:  # the watchdog has ended all requests already
                return
            for output in ended(outputs):
                samples = self._live[output.request_id]
                samples.discard(output.index)
                if not samples:
                    del self._live[output.request_id]
            if not self._live:
                self._changed.notify_all()
        if outputs and self._on_outputs is not None:
            self._on_outputs(outputs)

    # --- on the engine's or the watchdog's thread ---

    def _die(self, reason: str) -> None:
        with self._changed:
            if self._error is not None:
                return
            self._error = reason
            lost = [
                Output(r, index, (), FinishReason.ERROR) for r, open_ in self._live.items() for index in sorted(open_)
            ]
            self._live.clear()
            self._commands.clear()
            self._changed.notify_all()
        logger.critical("the engine is dead: %s; %d sequences are lost", reason, len(lost))
        try:
            if lost and self._on_outputs is not None:
                self._on_outputs(lost)
        except Exception:  # it may be what killed the engine
            logger.exception("nobody could be told of %d lost sequences", len(lost))
        if self._on_death is not None:
            self._on_death(reason)
