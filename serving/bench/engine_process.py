"""Processes in which a sweep's engines run, one after the other; each has done its imports before it is wanted.

Imports are half of the time from a command to a model's first token. So the process of the next engine starts while the
present one measures: it imports, touches no GPU, and waits for its arguments on standard input.
"""

import json
import runpy
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from types import TracebackType

_CHILD = "from atom.serving.bench.engine_process import stand_by; stand_by()"


class EngineProcesses:
    """Runs `atom ARGUMENTS` in processes of their own; close it (or leave its `with`) to end the one that waits."""

    def __init__(self) -> None:
        self._next: subprocess.Popen[str] | None = None

    def run(self, arguments: Sequence[str]) -> tuple[int, str]:
        """Run a command to its end; returns its exit code and what it wrote to standard error."""
        process, self._next = self._next or _start(), _start()
        try:
            _, said = process.communicate(json.dumps(list(arguments)) + "\n")
        except BaseException:  # the user's Ctrl-C
            _end(process)
            raise
        return process.returncode, said

    def close(self) -> None:
        if self._next is not None:
            _end(self._next)
            self._next = None

    def __enter__(self) -> "EngineProcesses":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def stand_by() -> None:
    """What such a process runs: imports, then the command that it is told."""
    import_module("torch")
    for name in ("latency", "throughput"):
        import_module(f"{__package__}.{name}")
    line = sys.stdin.readline()
    sys.argv = ["atom", *json.loads(line or "[]")]
    if line:
        runpy.run_module("atom", run_name="__main__")
