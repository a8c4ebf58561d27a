"""What a soak (soak.py) found, and whether it may be so."""

import gc
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

MOST_NATS = 0.5  # an answer's tokens in a batch and alone, on average


@dataclass(frozen=True)
class Token:
    text: str
    logprob: float


@dataclass
class Report:
    """What happened; `check` says whether it may.

    tokens      that came to clients
    recomputed  whole answers that were run once more, alone, as prompts; recomputed_nats: by how much their tokens'
                log-probabilities changed on average, worst_nats: those of the answer where it is most
    left        what was there after everybody had gone
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    faults: int = 0
    preemptions: int = 0
    recomputed: int = 0
    recomputed_nats: float = 0.0
    worst_nats: float = 0.0
    memory_mib: tuple[float, float] = (0.0, 0.0)
    device_mib: tuple[float, float] = (0.0, 0.0)
    left: dict[str, int] = field(default_factory=dict)

    def check(self, max_growth_mib: float, most_nats: float = MOST_NATS) -> None:
        """AssertionError for anything lost, doubled, left or leaked, and if the soak never got hard."""
        assert not self.wrong, f"{len(self.wrong)} answers are wrong; the first: {self.wrong[0]}"
        assert self.left and not any(self.left.values()), f"left behind: {self.left}"
        for where, (before, after) in (("memory", self.memory_mib), ("the GPU's memory", self.device_mib)):
            grown = after - before
            assert grown < max_growth_mib, f"{where} grew by {grown:.1f} MiB, at most {max_growth_mib} are allowed"
        assert self.recomputed, "no answer was computed once more"
        assert self.worst_nats < most_nats, f"an answer's tokens are {self.worst_nats:.2f} nats off when computed alone"
        missing = [kind for kind in ("whole", "left", "aborted", "refused", "failed") if not self.outcomes[kind]]
        assert not missing and self.preemptions, f"the soak was too easy: no {missing}, {self.preemptions} preemptions"


def memory_mib() -> float:
    """What this process holds, after everything that nobody uses is gone."""
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status does not say how much memory is used; run the soak on Linux.")


def device_mib() -> float:
    """What torch holds of a GPU, cached for itself or not; 0 without one."""
    return torch.cuda.memory_reserved() / 2**20 if torch.cuda.is_available() else 0.0
