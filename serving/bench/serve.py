"""`atom bench serve`: load a server, and make a result of what came back."""

import asyncio
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from httpx import AsyncClient

from atom.circumstances import circumstances, current_commit
from atom.models.source import load_tokenizer

from .config import ServeBenchConfig
from .http_stream import StreamClient
from .lengths import parse_workload
from .load import Plan, Progress, run_load
from .prompts import Vocabulary
from .result import ServeResult, notes_on
from .sample import Sample
from .served_perplexity import served_perplexity
from .server_facts import ServerFacts, ask_server, make_client, metric_changes, read_metrics, server_latencies
from .slo import Slo
from .summary import summarize
from .target import Target, key_headers, normalize_url, send
from .workload import WorkItem, drop_long

Watch = Callable[[str, Progress], None]  # phase ("warm-up", "running"), state; called when a phase begins


def bench_serve(config: ServeBenchConfig, watch: Watch = lambda phase, progress: None) -> ServeResult:
    """Run the benchmark; SIGINT ends it early, and the result then says that it is not complete.

    Raises NoServerError, ValueError (workload, trace, model, tokenizer) before any request is sent, and
    KeyboardInterrupt if it was stopped before the first measured one.
    """
    return asyncio.run(_bench(config, watch))


async def _bench(config: ServeBenchConfig, watch: Watch) -> ServeResult:
    base_url = normalize_url(config.url)
    async with make_client(key_headers()) as asking, StreamClient(base_url, key_headers()) as client:
        facts = await ask_server(asking, base_url)
        entry = facts.model(config.model)
        target = Target(
            base_url,
            str(entry["id"]),
            config.endpoint,
            config.temperature,
            config.ignore_eos,
            config.timeout,
            json.loads(config.extra_body),
        )
        max_model_len = config.max_model_len or entry.get("max_model_len")
        workload = parse_workload(config.workload)
        items, too_long = drop_long(workload.items(config.wanted_requests, config.seed), max_model_len)
        if not items:
            raise ValueError(
                f"none of {too_long} requests of {workload.name} fits {max_model_len} tokens; choose shorter ones, or "
                "serve with a larger --max-model-len"
            )
        vocabulary = await asyncio.to_thread(_vocabulary, config, entry)
        arrivals = config.arrivals

        def make_body(item: WorkItem) -> bytes:
            return target.body(_prompt(vocabulary, config, item, config.seed), item.output_tokens)

        stop = asyncio.Event()
        with _interrupts(stop):
            await _warm_up(client, target, config, vocabulary, items, stop, watch)
            before = await read_metrics(asking, base_url)
            plan = Plan(items, make_body, arrivals.times(items, config.seed), arrivals.max_concurrency, config.duration)
            progress = Progress(len(items))
            watch("running", progress)
            await run_load(plan, _sender(client, target), progress, stop)
        if not progress.samples:
            raise KeyboardInterrupt
        after = await read_metrics(asking, base_url)
        quality = await _perplexity(asking, target, config, vocabulary)
        result = _result(config, facts, entry, progress, too_long, workload.shares_prefixes, before, after)
        return replace(result, server=result.server | quality)


async def _perplexity(
    asking: AsyncClient, target: Target, config: ServeBenchConfig, vocabulary: Vocabulary
) -> dict[str, Any]:
    """What the result says of the server's quality; nothing without --ppl."""
    if config.ppl is None:
        return {}
    tokenizer: Any = vocabulary.tokenizer
    window, limit = config.ppl_window, config.ppl_windows
    found = await served_perplexity(asking, target.base_url, target.model, tokenizer, config.ppl, window, limit)
    return {"perplexity": found.to_dict()}


def _prompt(vocabulary: Vocabulary, config: ServeBenchConfig, item: WorkItem, seed: int) -> list[int] | str:
    draw = vocabulary.token_ids if config.chosen_format == "ids" else vocabulary.text
    return draw(item, seed)


def _sender(client: StreamClient, target: Target) -> Any:
    async def send_one(body: bytes, sample: Sample, clock: Callable[[], float]) -> None:
        await send(client, target, body, sample, clock)

    return send_one


def _vocabulary(config: ServeBenchConfig, entry: Any) -> Vocabulary:
    """Where prompts are drawn from: the range given, the tokenizer given, or that of the served model's directory."""
    if config.token_ids is not None:
        low, _, high = config.token_ids.partition(":")
        return Vocabulary.of_range(int(low), int(high))
    candidates = [config.tokenizer] if config.tokenizer else [entry.get("root"), entry.get("id")]
    for candidate in candidates:
        if candidate and (config.tokenizer or Path(str(candidate)).is_dir()):
            return Vocabulary.of_tokenizer(load_tokenizer(str(candidate)))
    raise ValueError(
        f"the tokenizer of {entry.get('id')} is not at hand; name a directory or hub id with --tokenizer, or a range "
        "of ids with --token-ids"
    )


async def _warm_up(
    client: StreamClient,
    target: Target,
    config: ServeBenchConfig,
    vocabulary: Vocabulary,
    items: list[WorkItem],
    stop: asyncio.Event,
    watch: Watch,
) -> None:
    """Requests like the first ones, of other tokens, so that no prefix cache knows the measured ones.

    Raises RuntimeError's kin, ValueError, if all of them fail: then nothing can be measured.
    """
    count = min(config.wanted_warmup, len(items))
    if not count:
        return

    def make_body(item: WorkItem) -> bytes:
        return target.body(_prompt(vocabulary, config, item, config.seed + 1_000_003), item.output_tokens)

    progress = Progress(count)
    watch("warm-up", progress)
    plan = Plan(items[:count], make_body, max_concurrency=config.arrivals.max_concurrency or count)
    await run_load(plan, _sender(client, target), progress, stop)
    if stop.is_set():
        raise KeyboardInterrupt
    if progress.errors == count:
        sample = progress.samples[0]
        raise ValueError(
            f"all {count} requests of the warm-up failed, the first with {sample.error}: {sample.message}; "
            "nothing was measured; --warmup 0 measures all the same"
        )


@contextmanager
def _interrupts(stop: asyncio.Event) -> Iterator[None]:
    """While it lasts, Ctrl-C sets `stop`; a second one interrupts at once, as without this."""
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    with suppress(NotImplementedError, RuntimeError, ValueError):  # Windows, or not the main thread
        loop.add_signal_handler(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        with suppress(NotImplementedError, RuntimeError, ValueError):
            loop.remove_signal_handler(signal.SIGINT)


def _result(
    config: ServeBenchConfig,
    facts: ServerFacts,
    entry: Any,
    progress: Progress,
    too_long: int,
    shares_prefixes: bool,
    before: dict[str, float] | None,
    after: dict[str, float] | None,
) -> ServeResult:
    slo = None if config.slo is None else Slo.parse(config.slo)
    summary = summarize(progress.samples, slo, progress.loop_lags_s)
    server: dict[str, Any] = {"version": facts.version, "model": dict(entry)}
    if before is not None and after is not None:
        server |= {"latencies": server_latencies(before, after), "metrics": metric_changes(before, after)}
    notes = notes_on(summary, shares_prefixes)
    if too_long:
        notes.append(f"{too_long} requests were longer than the server's context and were not sent")
    if unsent := progress.total - len(progress.samples):
        notes.append(f"{unsent} of {progress.total} requests were not sent: the run ended before they were due")
    found = circumstances("cpu")
    provenance = {**found, "commit": current_commit(), "seed": config.seed}
    ppl = None if config.ppl is None else config.ppl.name
    options = {**asdict(config), "output": None, "ppl": ppl, "arrivals": _arrivals_text(config)}
    options |= {"model": entry["id"], "prompt_format": config.chosen_format, "requests_too_long": too_long}
    options = {key: (None if value == float("inf") else value) for key, value in options.items()}
    samples = [sample.to_dict() for sample in progress.samples]
    return ServeResult(not progress.is_stopped, options, summary, server, provenance, tuple(notes), samples)


def _arrivals_text(config: ServeBenchConfig) -> str:
    arrivals = config.arrivals
    limit = "" if arrivals.max_concurrency is None else f", at most {arrivals.max_concurrency} under way"
    if arrivals.is_closed:
        return f"closed loop of {arrivals.max_concurrency}"
    if arrivals.from_trace:
        return f"the trace's arrivals at {arrivals.speed:g} times its speed{limit}"
    burst = "Poisson" if arrivals.burstiness == 1 else f"gamma (burstiness {arrivals.burstiness:g})"
    return f"{burst} arrivals, {arrivals.rate:g} requests/s{limit}"
