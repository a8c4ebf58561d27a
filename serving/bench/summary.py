"""What a run's samples amount to: percentiles, throughput, goodput, errors, and how late the client itself was."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from .sample import Sample
from .slo import Slo

PERCENTILES = (50, 90, 95, 99)
SEND_LIMIT_MS, LOOP_LIMIT_MS = 10.0, 20.0  # p99 of the client's own lateness beyond which its numbers are doubtful


@dataclass(frozen=True)
class Spread:
    """Of one measure over the requests (or gaps) that have it, in milliseconds."""

    count: int
    mean: float
    std: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of_seconds(cls, values: Iterable[float]) -> "Spread | None":
        """Linear interpolation between the order statistics; None without values."""
        ms = np.fromiter(values, dtype=np.float64) * 1000
        if not ms.size:
            return None
        p50, p90, p95, p99 = (float(p) for p in np.percentile(ms, PERCENTILES))
        return cls(ms.size, float(ms.mean()), float(ms.std()), float(ms.min()), p50, p90, p95, p99, float(ms.max()))

    def to_dict(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Summary:
    """A run in numbers.

    duration_s       from the first request due to the last end
    counted_by       where output tokens come from: "usage" (the server's count), "deltas" (chunks; one that holds
                     several tokens counts once), or "mixed"
    steady_out_tok_s output tokens a second while the load was on: from when as many requests as ever ran at once had
                     begun to answer until the last was sent; None where that is under a fifth of the run
    concurrency      requests under way, averaged over the run
    good_requests    that met the SLO, None without one
    short            good requests that ended before the tokens they asked for
    send_lag         lateness of the client in sending
    loop_lag         lateness of the client's event loop, sampled all along
    """

    requests: int
    completed: int
    errors: dict[str, int]
    short: int
    duration_s: float
    request_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None
    counted_by: Literal["usage", "deltas", "mixed"]
    out_tok_s: float
    total_tok_s: float
    steady_out_tok_s: float | None
    concurrency: float
    peak_concurrency: int
    good_requests: int | None
    goodput_s: float | None
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2e: Spread | None
    send_lag: Spread | None
    loop_lag: Spread | None

    @property
    def is_client_late(self) -> bool:
        """The client, not the server, may have been what was measured."""
        lags = ((self.send_lag, SEND_LIMIT_MS), (self.loop_lag, LOOP_LIMIT_MS))
        return any(lag is not None and lag.p99 > limit for lag, limit in lags)

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            plain[name] = value.to_dict() if isinstance(value, Spread) else value
        return plain | {"is_client_late": self.is_client_late}


def summarize(samples: Sequence[Sample], slo: Slo | None = None, loop_lags_s: Sequence[float] = ()) -> Summary:
    """The summary of all requests that were sent; failed ones count as errors and towards nothing else.

    Raises ValueError if there is no sample.
    """
    if not samples:
        raise ValueError("no request was sent; ask for at least one, and for lengths that fit the server's context")
    good = [sample for sample in samples if sample.is_good]
    start, end = min(s.due_s for s in samples), max(s.end_s for s in samples)
    duration = max(end - start, 1e-9)
    output = sum(s.tokens for s in good)
    prompt = sum(s.asked_prompt if s.prompt_tokens is None else s.prompt_tokens for s in good)
    cached = [s.cached_tokens for s in good if s.cached_tokens is not None]
    met = None if slo is None else sum(slo.is_met(sample) for sample in samples)
    peak = _peak_concurrency(samples)
    return Summary(
        requests=len(samples),
        completed=len(good),
        errors=dict(Counter(s.error for s in samples if s.error is not None).most_common()),
        short=sum(s.tokens < s.asked_output for s in good),
        duration_s=duration,
        request_s=len(good) / duration,
        prompt_tokens=prompt,
        output_tokens=output,
        cached_tokens=sum(cached) if cached else None,
        counted_by=_counted_by(good),
        out_tok_s=output / duration,
        total_tok_s=(prompt + output) / duration,
        steady_out_tok_s=_steady_rate(samples, peak, duration),
        concurrency=sum(s.end_s - s.sent_s for s in samples if s.sent_s) / duration,
        peak_concurrency=peak,
        good_requests=met,
        goodput_s=None if met is None else met / duration,
        ttft=Spread.of_seconds(t for s in good if (t := s.ttft_s) is not None),
        tpot=Spread.of_seconds(t for s in good if (t := s.tpot_s) is not None),
        itl=Spread.of_seconds(t for s in good for t in s.itl_s),
        e2e=Spread.of_seconds(s.e2e_s for s in good),
        send_lag=Spread.of_seconds(s.send_lag_s for s in samples if s.sent_s),
        loop_lag=Spread.of_seconds(loop_lags_s),
    )


def _counted_by(good: Sequence[Sample]) -> Literal["usage", "deltas", "mixed"]:
    ways = {s.output_tokens is not None for s in good}
    if ways == {True}:
        return "usage"
    return "mixed" if len(ways) == 2 else "deltas"


def _peak_concurrency(samples: Sequence[Sample]) -> int:
    sent = [s for s in samples if s.sent_s]
    events = sorted([(s.sent_s, 1) for s in sent] + [(s.end_s, -1) for s in sent])
    return int(np.cumsum([change for _, change in events]).max(initial=0))


def _steady_rate(samples: Sequence[Sample], peak: int, duration: float) -> float | None:
    """See `Summary.steady_out_tok_s`. A chunk counts as its request's tokens over its request's chunks."""
    firsts = sorted(s.token_s[0] for s in samples if s.is_good and s.token_s)
    if len(firsts) < peak:
        return None
    low, high = firsts[peak - 1], max(s.sent_s for s in samples)
    if high - low < duration / 5:
        return None
    tokens = 0.0
    for sample in samples:
        if sample.is_good and sample.token_s:
            within = sum(low < t <= high for t in sample.token_s)
            tokens += within * sample.tokens / len(sample.token_s)
    return tokens / (high - low)
