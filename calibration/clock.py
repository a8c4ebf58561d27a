"""Where the time and the memory of a run go: seconds by phase, and peaks."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("stats", "hessian", "gptq", "propagate", "io")


class Clock:
    """Adds up seconds by phase; a GPU is waited for at both ends of a phase."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self.seconds[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        taken = {name: round(seconds, 4) for name, seconds in self.seconds.items()}
        self.seconds = dict.fromkeys(PHASES, 0.0)
        return taken

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def peak_host_bytes() -> int:
    """The largest resident size that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_bytes(device: torch.device) -> int:
    """The most memory that tensors took on the GPU since the last reset; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
