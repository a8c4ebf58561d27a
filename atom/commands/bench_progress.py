"""The line that shows a load run while it lasts."""

import threading
from types import TracebackType

from atom.serving.bench.load import Progress

from .console import progress_console

PERIOD_S = 0.5


class LoadProgress:
    """A status line on stderr, drawn twice a second by a thread of its own from the state of the run."""

    def __init__(self) -> None:
        self._phase = "asking the server"
        self._state: Progress | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._draw, daemon=True)

    def watch(self, phase: str, state: Progress) -> None:
        """The run enters a phase; its state changes under way."""
        self._phase, self._state = phase, state

    def __enter__(self) -> "LoadProgress":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _draw(self) -> None:
        with progress_console.status(self._phase) as status:
            while not self._over.wait(PERIOD_S):
                status.update(self.line())

    def line(self) -> str:
        state = self._state
        if state is None:
            return self._phase
        tokens = sum(len(sample.token_s) for sample in list(state.samples))
        seconds = state.now_s() if state.start else 0.0
        rate = f", {tokens / seconds:,.0f} chunks/s" if seconds > 1 else ""
        errors = f", {state.errors} errors" if state.errors else ""
        return f"{self._phase}: {state.done} of {state.total} done, {state.running} under way{rate}{errors}"
