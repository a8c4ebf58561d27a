"""When requests arrive: all at once under a limit on concurrency (closed loop), at random, or as a trace recorded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .workload import WorkItem


@dataclass(frozen=True)
class Arrivals:
    """The arrival process.

    rate             requests a second on average; inf: each as soon as max_concurrency lets it, a closed loop
    burstiness       gaps are gamma distributed with this shape: 1 is Poisson, below 1 burstier, above 1 more even
    max_concurrency  requests under way at once; None is no limit (with a rate: a true open loop)
    from_trace       arrive when the trace says so, instead of at `rate`
    speed            factor on the trace's clock: 2 sends it twice as fast
    """

    rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    from_trace: bool = False
    speed: float = 1.0

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ValueError(f"the request rate must be above 0, got {self.rate}; use inf for a closed loop")
        if not 0 < self.burstiness < math.inf:
            raise ValueError(f"burstiness must be above 0, got {self.burstiness}; use 1 for a Poisson process")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ValueError(
                f"max_concurrency must be at least 1, got {self.max_concurrency}; leave it out for no limit"
            )
        if not 0 < self.speed < math.inf:
            raise ValueError(f"the trace's speed must be above 0, got {self.speed}; use 1 for its own")
        if self.from_trace and math.isfinite(self.rate):
            raise ValueError(f"give a rate ({self.rate:g}) or the trace's own times, not both; drop one of them")
        if self.speed != 1 and not self.from_trace:
            raise ValueError(f"a speed of {self.speed:g} scales a trace's own times; add --trace-arrivals, or drop it")

    @property
    def is_closed(self) -> bool:
        """Requests have no arrival times of their own: a free slot is what sends the next one."""
        return not self.from_trace and math.isinf(self.rate)

    @property
    def kind(self) -> str:
        """closed, poisson, gamma or trace."""
        if self.is_closed:
            return "closed"
        if self.from_trace:
            return "trace"
        return "poisson" if self.burstiness == 1 else "gamma"

    def times(self, items: Sequence[WorkItem], seed: int) -> list[float] | None:
        """Seconds from the start at which each item arrives, ascending; None in a closed loop.

        Raises ValueError if the trace's times are wanted and an item has none.
        """
        if self.is_closed:
            return None
        if self.from_trace:
            if any(item.arrival_s is None for item in items):
                raise ValueError("this workload records no arrival times; use --request-rate, or another trace")
            first = min((item.arrival_s or 0.0 for item in items), default=0.0)
            return [((item.arrival_s or 0.0) - first) / self.speed for item in items]
        rng = np.random.default_rng([seed, 1])  # lengths use [seed]
        gaps = rng.gamma(self.burstiness, 1 / (self.rate * self.burstiness), len(items))
        return [float(t) for t in np.cumsum(gaps)]
