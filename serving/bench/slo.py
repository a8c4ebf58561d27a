"""Service-level objectives, and goodput: requests a second that meet all of them."""

from collections.abc import Callable
from dataclasses import dataclass

from .sample import Sample

MEASURES: dict[str, Callable[[Sample], float | None]] = {
    "ttft": lambda sample: sample.ttft_s,
    "tpot": lambda sample: sample.tpot_s,
    "e2e": lambda sample: sample.e2e_s,
}


@dataclass(frozen=True)
class Slo:
    """Limits in milliseconds: (measure, limit) pairs."""

    limits: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, text: str) -> "Slo":
        """`ttft:500,tpot:50`; ValueError says what cannot be read."""
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition(":")
            try:
                limit = float(value)
            except ValueError:
                limit = 0.0
            if name not in MEASURES or not limit > 0:
                raise ValueError(
                    f"cannot read {part!r} of --slo; write MEASURE:MILLISECONDS, measures are {', '.join(MEASURES)}"
                )
            if name in limits:
                raise ValueError(f"--slo names {name} twice; give each measure one limit")
            limits[name] = limit
        return cls(tuple(limits.items()))

    def is_met(self, sample: Sample) -> bool:
        """The request succeeded and every limit holds; a measure that it has none of (TPOT of one token) holds."""
        if not sample.is_good:
            return False
        for name, limit in self.limits:
            value = MEASURES[name](sample)
            if value is not None and value * 1000 > limit:
                return False
        return True

    def __str__(self) -> str:
        return ",".join(f"{name}:{limit:g}" for name, limit in self.limits)
