"""What a server says of itself before and after a run: version, model, context, and its own latency histograms."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from atom.errors import AtomError

# The server's own view, by the ends of the metrics' names: vLLM, SGLang and Atom all use these.
HISTOGRAMS = {
    "ttft": ("time_to_first_token_seconds",),
    "tpot": ("request_time_per_output_token_seconds", "time_per_output_token_seconds"),
    "itl": ("inter_token_latency_seconds",),
    "e2e": ("e2e_request_latency_seconds",),
    "queue": ("request_queue_time_seconds", "queue_time_seconds"),
}
_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+\S+)?$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class NoServerError(AtomError):
    """The address does not answer as an OpenAI-compatible server."""


def make_client(headers: Mapping[str, str]) -> httpx.AsyncClient:
    """For questions, not for load. It takes no proxy from the environment, as the load does not either."""
    return httpx.AsyncClient(headers=dict(headers), trust_env=False)


@dataclass(frozen=True)
class ServerFacts:
    """version and models as the server gave them, metrics by their full sample name; None where it has none."""

    version: Any = None
    models: tuple[Mapping[str, Any], ...] = ()
    metrics: Mapping[str, float] | None = field(default=None, repr=False)

    def model(self, wanted: str | None) -> Mapping[str, Any]:
        """The entry of the model called `wanted`, or the only one there is.

        Raises ValueError with the names there are if it is not served, or if there are several to choose from.
        """
        names = [str(entry.get("id")) for entry in self.models]
        if wanted is None and len(names) == 1:
            return self.models[0]
        for entry in self.models:
            if entry.get("id") == wanted:
                return entry
        raise ValueError(f"--model is {wanted or 'not given'}, the server has {', '.join(names) or 'none'}; name one")


async def ask_server(client: httpx.AsyncClient, base_url: str) -> ServerFacts:
    """Version, models and metrics of the server; only the models must be there.

    Raises NoServerError if nothing answers, or not with a list of models.
    """
    try:
        answer = await client.get(f"{base_url}/v1/models", timeout=30)
        models = answer.json()["data"] if answer.status_code == 200 else None
    except httpx.TransportError as error:
        raise NoServerError(
            f"no server answers at {base_url} ({error or type(error).__name__}); start one (atom serve), or fix --url"
        ) from None
    except (ValueError, KeyError, TypeError):
        models = None
    if models is None:
        raise NoServerError(
            f"{base_url}/v1/models answered {answer.status_code} and no list of models; --url must be an "
            "OpenAI-compatible server's; set OPENAI_API_KEY if it wants a key"
        )
    return ServerFacts(await _version(client, base_url), tuple(models), await read_metrics(client, base_url))


async def _version(client: httpx.AsyncClient, base_url: str) -> Any:
    """vLLM and Atom answer /version, SGLang /get_server_info; None from a server that has neither."""
    for path in ("/version", "/get_server_info"):
        try:
            answer = await client.get(base_url + path, timeout=30)
            if answer.status_code == 200:
                found = answer.json()
                return found.get("version", found) if isinstance(found, dict) else found
        except (httpx.HTTPError, ValueError):
            continue
    return None


async def read_metrics(client: httpx.AsyncClient, base_url: str) -> dict[str, float] | None:
    """The samples of /metrics by name and labels, or None if there is no such page."""
    try:
        answer = await client.get(f"{base_url}/metrics", timeout=30, follow_redirects=True)
    except httpx.HTTPError:
        return None
    return parse_metrics(answer.text) if answer.status_code == 200 else None


def parse_metrics(text: str) -> dict[str, float]:
    """`name{labels}` -> value of every sample in Prometheus' text format; lines that are none are left out."""
    found = {}
    for line in text.splitlines():
        match = None if line.startswith("#") else _SAMPLE.match(line)
        if match:
            try:
                found[f"{match[1]}{{{match[2] or ''}}}"] = float(match[3])
            except ValueError:
                continue
    return found


def metric_changes(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Counters and histogram buckets that grew between two readings, by how much."""
    return {
        name: value - before.get(name, 0.0)
        for name, value in after.items()
        if name.partition("{")[0].endswith(("_total", "_count", "_sum", "_bucket")) and value != before.get(name, 0.0)
    }


def server_latencies(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The server's own histograms over the run, as {measure: {count, mean_ms, p50_ms, p99_ms}}.

    A quantile lies within its bucket, where it is interpolated: it is as exact as the buckets are narrow.
    """
    found = {}
    for measure, endings in HISTOGRAMS.items():
        for ending in endings:
            result = _latency(before, after, ending)
            if result is not None:
                found[measure] = result
                break
    return found


def _latency(before: Mapping[str, float], after: Mapping[str, float], ending: str) -> dict[str, float] | None:
    buckets: dict[float, float] = {}
    total = count = 0.0
    for name, value in after.items():
        base, _, labels = name.partition("{")
        change = value - before.get(name, 0.0)
        stem, _, part = base.rpartition("_")
        if not _is_metric(stem, ending):
            continue
        if part == "bucket":
            le = dict(_LABEL.findall(labels)).get("le", "+Inf")
            buckets[float(le)] = buckets.get(float(le), 0.0) + change
        elif part == "sum":
            total += change
        elif part == "count":
            count += change
    if not count:
        return None
    return {
        "count": count,
        "mean_ms": round(total / count * 1000, 3),
        **{f"p{q}_ms": round(_quantile(buckets, q / 100) * 1000, 3) for q in (50, 99) if buckets},
    }


def _is_metric(stem: str, ending: str) -> bool:
    """`stem` is the metric `ending`, perhaps with an engine's prefix: vllm:..., atom:..., sglang:..."""
    return stem == ending or stem.endswith(f":{ending}") or stem.removeprefix("atom_") == ending


def _quantile(buckets: Mapping[float, float], q: float) -> float:
    """As Prometheus' histogram_quantile: linear within the bucket, the last finite bound beyond it."""
    bounds = sorted(buckets)
    rank = q * buckets[bounds[-1]]
    low, below = 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= rank:
            if bound == float("inf"):
                return low
            share = (rank - below) / (buckets[bound] - below) if buckets[bound] > below else 1.0
            return low + (bound - low) * share
        low, below = bound, buckets[bound]
    return low
