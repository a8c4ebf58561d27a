"""Readers of public serving traces: lengths, arrival times and shared prefixes; none of them holds any text.

The format is told from the file's first line. Plain or gzip-compressed:

    Azure LLM inference 2023   CSV, arrival_s,context_tokens,generated_tokens, or as published: TIMESTAMP,...
    Mooncake (FAST '25)        JSON lines: timestamp (ms), input_length, output_length, hash_ids (blocks of 512 tokens)
    ShareGPT turn lengths      JSON lines: id, turns = [[user, assistant], ...]
    vidur's arXiv lengths      CSV, num_prefill_tokens,num_decode_tokens,...

Requests without a prompt or without an output are left out, as no server could answer them; `skipped` counts them.
"""

import csv
import datetime
import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .workload import Segment, WorkItem

MOONCAKE_BLOCK = 512


@dataclass(frozen=True)
class Trace:
    """A recorded workload, in the order of its file.

    name     `trace:FORMAT-FILE`, the file without its endings
    has_arrivals   every request has the time at which it came
    skipped  requests of the file without a prompt or an output
    """

    name: str
    format: str
    requests: tuple[WorkItem, ...]
    skipped: int = 0

    @property
    def has_arrivals(self) -> bool:
        return all(request.arrival_s is not None for request in self.requests)

    @property
    def shares_prefixes(self) -> bool:
        firsts = [request.segments[0].key for request in self.requests]
        return len(set(firsts)) < len(firsts)

    def items(self, count: int | None, seed: int) -> list[WorkItem]:
        """The first `count` requests (arrival times are the trace's, so nothing is shuffled), or all.

        A trace without arrival times has no order that matters: `count` of it are a random choice by `seed`.
        """
        if count is None or count == len(self.requests):
            return list(self.requests)
        if count > len(self.requests):
            raise ValueError(f"{self.name} has {len(self.requests)} requests, {count} were asked for; ask for fewer")
        if self.has_arrivals:
            return list(self.requests[:count])
        chosen = np.random.default_rng(seed).choice(len(self.requests), count, replace=False)
        return [self.requests[i] for i in sorted(chosen)]


def read_trace(path: str | Path, all_turns: bool = False) -> Trace:
    """The trace in `path`; ValueError for a format not known here, or a row that does not follow its format.

    all_turns  of ShareGPT's conversations every turn is a request, with the conversation so far before it
    """
    path = Path(path)
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    first = text.partition("\n")[0].strip()
    name = next((name for name, (recognise, _) in _READERS.items() if recognise(first)), None)
    if name is None:
        raise ValueError(
            f"{path.name} begins with {first[:60]!r}, which no trace format does; known are {', '.join(_READERS)}"
        )
    read = _READERS[name][1]
    if all_turns:
        if name != "sharegpt":
            raise ValueError(f"{path.name} is an {name} trace, only sharegpt has turns; use trace:{path.name}")
        read = _conversations
    requests: list[WorkItem] = []
    skipped = 0
    rows = read(text)
    while True:
        try:
            item = next(rows, None)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            line = len(requests) + skipped + 1
            raise ValueError(f"{path.name}: request {line} does not read as {name} ({error}); check the file") from None
        if item is None:
            break
        if item.prompt_tokens < 1 or item.output_tokens < 1:
            skipped += 1
        else:
            requests.append(item)
    if not requests:
        raise ValueError(f"{path.name} holds no request with a prompt and an output; check the file")
    return Trace(f"trace:{name.split()[0]}-{path.name.partition('.')[0]}", name, tuple(_from_zero(requests)), skipped)


def _from_zero(requests: list[WorkItem]) -> Iterator[WorkItem]:
    """Arrival times counted from the first request, in order of arrival."""
    if any(request.arrival_s is None for request in requests):
        yield from requests
        return
    ordered = sorted(requests, key=lambda request: request.arrival_s or 0.0)
    start = ordered[0].arrival_s or 0.0
    for request in ordered:
        yield WorkItem(request.segments, request.output_tokens, (request.arrival_s or 0.0) - start)


def _csv(text: str) -> Iterator[tuple[int, dict[str, str]]]:
    return enumerate(csv.DictReader(io.StringIO(text)))


def _json_lines(text: str) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in text.splitlines() if line.strip())


def _azure(text: str) -> Iterator[WorkItem]:
    for index, row in _csv(text):
        if "arrival_s" in row:
            arrival, prompt, output = float(row["arrival_s"]), row["context_tokens"], row["generated_tokens"]
        else:
            stamp = row["TIMESTAMP"][:26]  # seven decimals; datetime reads six
            arrival, prompt, output = (
                datetime.datetime.fromisoformat(stamp).timestamp(),
                row["ContextTokens"],
                row["GeneratedTokens"],
            )
        yield WorkItem((Segment(f"request {index}", int(prompt)),), int(output), arrival)


def _arxiv(text: str) -> Iterator[WorkItem]:
    for index, row in _csv(text):
        prompt, output = int(float(row["num_prefill_tokens"])), int(float(row["num_decode_tokens"]))
        yield WorkItem((Segment(f"request {index}", prompt),), output)


def _mooncake(text: str) -> Iterator[WorkItem]:
    """A block of equal hash id is equal text; the last block of a prompt is as long as is left."""
    for row in _json_lines(text):
        left, segments = int(row["input_length"]), []
        for block in row["hash_ids"]:
            length = min(MOONCAKE_BLOCK, left)
            segments.append(Segment(f"block {block}", length))
            left -= length
        if left or not all(segment.length for segment in segments):
            raise ValueError(f"{len(segments)} blocks of {MOONCAKE_BLOCK} tokens for {row['input_length']} tokens")
        yield WorkItem(tuple(segments), int(row["output_length"]), float(row["timestamp"]) / 1000)


def _sharegpt(text: str) -> Iterator[WorkItem]:
    """The first turn of each conversation, as vLLM's benchmark takes it."""
    for row in _json_lines(text):
        user, assistant = row["turns"][0]
        yield WorkItem((Segment(f"{row['id']} user 0", int(user)),), int(assistant))


def _conversations(text: str) -> Iterator[WorkItem]:
    """Every turn as a request whose prompt is the whole conversation so far, so that turns share prefixes.

    The assistant's part of the history is drawn like a prompt: what the server really answered is not fed back, so a
    prefix cache can hit the prompt of the turn before, but not its output.
    """
    for row in _json_lines(text):
        history: tuple[Segment, ...] = ()
        for turn, (user, assistant) in enumerate(row["turns"]):
            history = (*history, Segment(f"{row['id']} user {turn}", int(user)))
            yield WorkItem(tuple(s for s in history if s.length), int(assistant))
            history = (*history, Segment(f"{row['id']} assistant {turn}", int(assistant)))


def _object_with(*keys: str) -> Callable[[str], bool]:
    def recognise(line: str) -> bool:
        try:
            row = json.loads(line)
        except ValueError:
            return False
        return isinstance(row, Mapping) and all(key in row for key in keys)

    return recognise


def _columns(*names: str) -> Callable[[str], bool]:
    return lambda line: set(names) <= {cell.strip() for cell in line.split(",")}


Reader = Callable[[str], Iterator[WorkItem]]
_READERS: dict[str, tuple[Callable[[str], bool], Reader]] = {
    "azure": (_columns("arrival_s", "context_tokens", "generated_tokens"), _azure),
    "azure as published": (_columns("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _azure),
    "mooncake": (_object_with("timestamp", "input_length", "output_length", "hash_ids"), _mooncake),
    "sharegpt": (_object_with("id", "turns"), _sharegpt),
    "arxiv": (_columns("num_prefill_tokens", "num_decode_tokens"), _arxiv),
}
