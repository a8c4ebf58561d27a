"""What /metrics reports: the engine's counters and gauges, and the latencies that clients saw.

Names are vLLM's with the prefix atom:, so that its dashboards need only another prefix. Every server has a registry of
its own. Gauges and the engine's counters are read when they are asked for; histograms are fed by the front end.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.utils import floatToGoString

from .request import FinishReason, Request
from .stats import Stats

SECONDS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75)
LONG_SECONDS = (*SECONDS[::3], 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))

GAUGES: dict[str, tuple[str, Callable[[Stats], float]]] = {
    "num_requests_running": ("Sequences that run.", lambda s: s.running),
    "num_requests_waiting": ("Sequences that wait, preempted ones included.", lambda s: s.waiting),
    "num_tokens_waiting": ("Prompt tokens of those that never ran.", lambda s: s.waiting_tokens),
    "kv_cache_usage_perc": ("Used share of the KV cache, 0 to 1.", lambda s: s.used_blocks / s.blocks),
    "kv_cache_cached_perc": (
        "Share of the KV cache that is free and holds a prefix.",
        lambda s: s.cached_blocks / s.blocks,
    ),
    "kv_cache_blocks": ("Blocks of the KV cache.", lambda s: s.blocks),
}
COUNTERS: dict[str, tuple[str, Callable[[Stats], float]]] = {
    "engine_steps": ("Steps.", lambda s: s.num_steps),
    "engine_step_failures": ("Steps that failed.", lambda s: s.num_failures),
    "num_preemptions": ("Sequences that gave up their blocks and were computed again.", lambda s: s.num_preemptions),
    "prefix_cache_queries": ("Tokens looked up in the prefix cache.", lambda s: s.num_prefix_queries),
    "prefix_cache_hits": ("Tokens found in the prefix cache.", lambda s: s.num_prefix_hits),
    "prefix_cache_evictions": ("Blocks whose prefix was forgotten.", lambda s: s.num_evictions),
    "prompt_tokens": ("Prompt tokens of admitted sequences, cached ones included.", lambda s: s.num_prompt_tokens),
    "generation_tokens": ("Tokens that were handed out.", lambda s: s.num_output_tokens),
    "spec_decode_num_draft_tokens": ("Tokens that were guessed.", lambda s: s.num_draft_tokens),
    "spec_decode_num_accepted_tokens": ("Guessed tokens that were right.", lambda s: s.num_accepted_tokens),
}


class Histogram:
    """Counts by bucket, fed by one thread: prometheus_client's own takes a lock and 6 us a token."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...], model: str) -> None:
        self._family = (name, text)
        self._bounds = bounds
        self._model = model
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """The same value `count` times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterator[Metric]:
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        totals = zip(names, accumulate(self._counts), strict=True)
        family = HistogramMetricFamily(*self._family, labels=("model_name",))
        family.add_metric((self._model,), [(name, float(total)) for name, total in totals], self._sum)
        yield family


class Metrics:
    """One server's registry. `stats` is asked at every scrape."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, stats: Callable[[], Stats], model: str) -> None:
        self._stats = stats
        self._model = model
        self.registry = CollectorRegistry()
        self.registry.register(_EngineNumbers(stats, model))
        self._ttft = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", LONG_SECONDS)
        self._itl = self._histogram("inter_token_latency_seconds", "From one token to the next.", (*SECONDS, 1.0, 2.5))
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds",
            "A request's mean time for a token after its first.",
            (*SECONDS, 1.0, 2.5),
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.", LONG_SECONDS)
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens of finished sequences.", TOKENS)
        self._output = self._histogram("request_generation_tokens", "Tokens of finished sequences.", TOKENS)
        self._success = Counter(
            "atom:request_success",
            "Sequences that ended, by reason.",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        self._http = Counter(
            "atom:http_requests", "Answers by path and status.", ("path", "status"), registry=self.registry
        )
        for reason in FinishReason:
            self._success.labels(model, reason.value)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        text: bytes = generate_latest(self.registry)
        return text

    def tokens(self, count: int, seconds: float, is_first: bool) -> None:
        """A sequence got `count` tokens, `seconds` after those before or after its arrival."""
        if is_first:
            self._ttft.observe(seconds)
            return
        self._itl.observe(seconds / count, count)

    def finished(self, reason: FinishReason, seconds: float, ttft: float, request: Request, tokens: int) -> None:
        """A sequence ended `seconds` after it arrived, its first token came after `ttft`."""
        self._success.labels(self._model, reason.value).inc()
        self._e2e.observe(seconds)
        self._prompt.observe(len(request.prompt_token_ids))
        self._output.observe(tokens)
        if tokens > 1:
            self._tpot.observe((seconds - ttft) / (tokens - 1))

    def answered(self, path: str, status: int) -> None:
        self._http.labels(path, str(status)).inc()

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(f"atom:{name}", text, buckets, self._model)
        self.registry.register(made)
        return made


class _EngineNumbers:
    """The engine's own numbers, read at the scrape."""

    def __init__(self, stats: Callable[[], Stats], model: str) -> None:
        self._stats = stats
        self._model = model

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, (text, read) in GAUGES.items():
            gauge = GaugeMetricFamily(f"atom:{name}", text, labels=("model_name",))
            gauge.add_metric((self._model,), read(stats))
            yield gauge
        for name, (text, read) in COUNTERS.items():
            counter = CounterMetricFamily(f"atom:{name}", text, labels=("model_name",))
            counter.add_metric((self._model,), read(stats))
            yield counter
