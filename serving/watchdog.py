"""Notices that a thread has been at one thing for too long, says where it is, and calls for help once."""

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable

logger = logging.getLogger(__name__)

JOIN_S = 5.0  # it wakes at once, unless it is telling of a stuck thread


class Watchdog:
    """Watches the thread that calls `begin` and `end` around work that must not take longer than `timeout_s`.

    on_stuck  called once, on the watchdog's thread, with a description; the stuck thread itself cannot be helped
    """

    def __init__(self, timeout_s: float, on_stuck: Callable[[str], None]) -> None:
        self.timeout_s = timeout_s
        self._on_stuck = on_stuck
        self._since: float | None = None
        self._what = ""
        self._watched = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="atom-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it: it may hold the last name for a model, and must not free one at exit.

        (A daemon thread that frees a tensor while the interpreter ends takes the process down with it.)
        """
        self._stopped.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(JOIN_S)

    def begin(self, what: str) -> None:
        self._what, self._watched = what, threading.get_ident()
        self._since = time.monotonic()

    def end(self) -> None:
        self._since = None

    def _run(self) -> None:
        while not self._stopped.wait(min(1.0, self.timeout_s / 4)):
            since = self._since
            if since is None or time.monotonic() - since < self.timeout_s:
                continue
            frame = sys._current_frames().get(self._watched)
            where = "".join(traceback.format_stack(frame)) if frame is not None else "the thread is gone"
            message = f"{self._what} has not ended after {self.timeout_s:g} s"
            logger.critical("%s; its thread is here:\n%s", message, where)
            self._on_stuck(message)
            return
