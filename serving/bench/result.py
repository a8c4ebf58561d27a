"""The result of one load run: numbers, where they came from, and every request; as JSON and as a table."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .summary import Spread, Summary

KIND = "atom-bench-serve"
VERSION = 1


@dataclass(frozen=True)
class ServeResult:
    """What `atom bench serve` found.

    is_complete  false where the run was stopped before all was sent and answered
    config       the options as they were used
    server       version, model entry and the server's own latencies over the run, where it has them; the perplexity
                 that was measured through it (served_perplexity.py)
    provenance   date, command, commit, machine and versions of the client
    samples      one entry for each request that was due
    """

    is_complete: bool
    config: dict[str, Any]
    summary: Summary
    server: dict[str, Any]
    provenance: dict[str, Any]
    notes: tuple[str, ...] = ()
    samples: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def to_dict(self, with_samples: bool = True) -> dict[str, Any]:
        found = {
            "kind": KIND,
            "version": VERSION,
            "is_complete": self.is_complete,
            **self.provenance,
            "config": self.config,
            "server": self.server,
            "notes": list(self.notes),
            "summary": self.summary.to_dict(),
        }
        return found | {"samples": self.samples} if with_samples else found

    def write(self, path: Path) -> None:
        """Write the JSON file in one step, a sample a line."""
        head = json.dumps(self.to_dict(with_samples=False), indent=1, allow_nan=False)
        rows = ",\n  ".join(json.dumps(sample, allow_nan=False) for sample in self.samples)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(head.removesuffix("\n}") + f',\n "samples": [\n  {rows}\n ]\n}}\n', encoding="utf-8")
        partial.replace(path)

    def table(self) -> str:
        """For people."""
        s = self.summary
        lines = [
            f"{self.config['workload']}, {self.config['arrivals']}"
            + ("" if self.is_complete else "   INCOMPLETE: the run was stopped"),
            f"requests     {s.completed} of {s.requests} answered in {s.duration_s:.1f} s"
            f"{_errors(s)}, {s.request_s:.2f} requests/s, {s.concurrency:.1f} under way on average",
            f"throughput   {s.out_tok_s:,.1f} output tok/s, {s.total_tok_s:,.1f} with prompts"
            + ("" if s.steady_out_tok_s is None else f"; {s.steady_out_tok_s:,.1f} output tok/s under full load")
            + f"; counted by {s.counted_by}",
        ]
        if s.goodput_s is not None:
            lines.append(
                f"goodput      {s.goodput_s:.2f} requests/s within {self.config['slo']} "
                f"({s.good_requests} of {s.requests})"
            )
        if s.cached_tokens:
            lines.append(f"prefix cache {s.cached_tokens:,} of {s.prompt_tokens:,} prompt tokens")
        if (quality := self.server.get("perplexity")) is not None:
            lines.append(
                f"perplexity   {quality['perplexity']:.3f} of {quality['text']} through the server, "
                f"{quality['windows']} windows of {quality['window']} tokens"
            )
        lines += ["", f"{'ms':<12}" + "".join(f"{name:>11}" for name in ("mean", "p50", "p90", "p99", "max"))]
        for name, label in _MEASURES.items():
            if (spread := getattr(s, name)) is not None:
                lines.append(f"{label:<12}" + _cells(spread))
        for measure, found in self.server.get("latencies", {}).items():
            cells = [found.get(key) for key in ("mean_ms", "p50_ms", None, "p99_ms", None)]
            lines.append(
                f"{'server ' + measure:<12}" + "".join(f"{c:>11,.2f}" if c is not None else " " * 11 for c in cells)
            )
        return "\n".join([*lines, "", *(f"note: {note}" for note in self.notes)]).rstrip()


_MEASURES = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL",
    "e2e": "end to end",
    "send_lag": "client lag",
    "loop_lag": "loop lag",
}


def _cells(spread: Spread) -> str:
    return "".join(f"{v:>11,.2f}" for v in (spread.mean, spread.p50, spread.p90, spread.p99, spread.max))


def _errors(summary: Summary) -> str:
    if not summary.errors:
        return ", no errors"
    return ", errors: " + ", ".join(f"{count} {kind}" for kind, count in summary.errors.items())


def notes_on(summary: Summary, shares_prefixes: bool = False) -> list[str]:
    """What a reader of the numbers must know. shares_prefixes: of the workload, on purpose."""
    notes = []
    cached = summary.cached_tokens or 0
    if not shares_prefixes and cached > summary.prompt_tokens / 50:
        notes.append(
            f"{cached:,} of {summary.prompt_tokens:,} prompt tokens came from the server's prefix cache, and this "
            "workload shares none: the server has seen these prompts; use another --seed, or start it anew"
        )
    if summary.is_client_late:
        notes.append(
            "the client itself was late (client lag, loop lag): latencies are too high and throughput too low; "
            "run it on an idle machine, or load less"
        )
    if summary.counted_by != "usage" and summary.completed:
        notes.append("the server sent no usage: output tokens are counted by chunks, which may hold several each")
    if summary.short:
        notes.append(f"{summary.short} answers were shorter than asked for; is ignore_eos known to this server?")
    return notes
