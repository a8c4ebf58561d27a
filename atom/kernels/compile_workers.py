"""Processes that run compile jobs: each takes pickled functions from standard input and answers what became of them.

They are plain subprocesses, not multiprocessing's: a user's script that loads a model needs no `if __name__ ==
"__main__"`, which spawned processes would ask for.
"""

import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import AtomError

Job = Callable[[], Any]


class CompileError(AtomError):
    """A kernel did not compile in a process of its own; the message is that process's last words."""


def run_jobs(jobs: Sequence[Job], workers: int, done: Callable[[int], Any]) -> None:
    """Run picklable jobs in `workers` processes; `done` is told after each how many are finished.

    Raises CompileError at the first job that fails; jobs under way are finished, the others dropped.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    finished: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # an error, or None
    for job in jobs:
        waiting.put(job)
    threads = [threading.Thread(target=_feed, args=(waiting, finished), daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        for count in range(1, len(jobs) + 1):
            if (error := finished.get()) is not None:
                raise CompileError(f"compiling a kernel failed: {error}")
            done(count)
    finally:
        while not waiting.empty():
            waiting.get()
        for thread in threads:
            thread.join()


def _feed(waiting: "queue.SimpleQueue[Job]", finished: "queue.SimpleQueue[str | None]") -> None:
    """One process, as long as there is work; one answer for each job that is taken."""
    command = [sys.executable, "-c", "from atom.kernels.compile_workers import serve; serve()"]
    path = os.pathsep.join([entry or os.getcwd() for entry in sys.path])
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )
    assert process.stdin is not None and process.stdout is not None
    with process, process.stdin, process.stdout:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                pickle.dump(job, process.stdin)
                process.stdin.flush()
                finished.put(pickle.load(process.stdout))
            except (pickle.PickleError, AttributeError, TypeError) as error:
                finished.put(f"{type(error).__name__}: {error}")
            except (EOFError, BrokenPipeError):
                finished.put(f"its process ended with code {process.wait()}; is memory short? Use fewer workers")
                return


def serve() -> None:
    """What a worker runs: jobs from standard input until it ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a compiler prints is no answer
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            job()
            answer = None
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()
