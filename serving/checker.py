"""Asks a process of its own whether a grammar compiles, and kills it when it takes too long."""

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).with_name("guidance_check.py")
START_S = 30.0  # to start Python and import the compiler


class Checker:
    """One child process, started at its first use and again after it was killed. Questions are answered one at a time.

    timeout_s  for one grammar
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def check(self, grammar: str, limits: Mapping[str, Any]) -> str | None:
        """Why a grammar does not compile; None if it does."""
        with self._lock:
            if self._child is not None and self._child.poll() is not None:  # something else has ended it
                self._kill()
            if self._child is None:
                self._start()
            asked = json.dumps({"grammar": grammar, "limits": dict(limits)}).encode() + b"\n"
            answer = self._ask(asked, self.timeout_s)
            if answer is None:
                return f"it takes more than {self.timeout_s:g} s to compile, or more memory or stack than it may"
            error: str | None = json.loads(answer)["error"]
            return error

    def close(self) -> None:
        """End the process; a later check starts another."""
        with self._lock:
            self._kill()

    def _start(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-s", "-P", str(PROGRAM)],  # not -I: what is installed may be on PYTHONPATH alone
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if self._ask(b'{"grammar": "{\\"grammars\\": []}", "limits": {}}\n', START_S) is None:
            raise RuntimeError(
                f"{PROGRAM.name} does not answer; is llguidance installed? pip install 'atom-serving[serving]'"
            )

    def _ask(self, line: bytes, timeout_s: float) -> bytes | None:
        """The answer; None, and no child, if there is none in time."""
        child = self._child
        assert child is not None and child.stdin is not None and child.stdout is not None
        deadline, answer = time.monotonic() + timeout_s, b""
        try:
            child.stdin.write(line)
            child.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(child.stdout, selectors.EVENT_READ)
                while not answer.endswith(b"\n"):
                    ready = selector.select(max(0.0, deadline - time.monotonic()))
                    part = os.read(child.stdout.fileno(), 65536) if ready else b""
                    if not part:
                        break
                    answer += part
        except OSError:
            answer = b""
        if not answer.endswith(b"\n"):
            self._kill()
            return None
        return answer

    def _kill(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    stream.close()
