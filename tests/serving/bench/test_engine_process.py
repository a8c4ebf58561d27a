"""A sweep's processes run whole commands, one of them ready ahead, and none is left behind."""

import subprocess
import sys

import pytest

from atom.serving.bench import engine_process
from atom.serving.bench.engine_process import EngineProcesses

ECHO = (
    "import json, sys; said = json.loads(sys.stdin.readline()); print(said[0], file=sys.stderr); sys.exit(int(said[1]))"
)


def test_commands_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        started.append(subprocess.Popen([sys.executable, "-c", ECHO], stdin=pipe, stderr=pipe, text=True))
        return started[-1]

    monkeypatch.setattr(engine_process, "_start", start)
    with EngineProcesses() as processes:
        assert processes.run(["first", "0"]) == (0, "first\n") and len(started) == 2
        assert processes.run(["second", "3"]) == (3, "second\n") and len(started) == 3
        assert started[2].poll() is None, "the third waits for a command"
    assert [process.poll() for process in started] == [0, 3, -9]


def test_a_command_really_runs() -> None:
    with EngineProcesses() as processes:
        assert processes.run(["bench", "throughput", "tiny", "--concurrency", "-1"])[0] == 2
