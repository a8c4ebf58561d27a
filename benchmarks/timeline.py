"""Where a decode step's time on the GPU goes, kernel by kernel, from the profiler's timeline of an engine at work.

Kernels overlap where one starts before the one before it has ended (programmatic dependent launch), so a kernel's own
duration says too much. What it *adds* is the time from the end of all before it to its own end; the sum of these is the
step. A *gap* is time in which nothing runs before a kernel starts, and is part of what that kernel adds.
"""

import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Span:
    """A kernel, copy or fill on the GPU; microseconds."""

    name: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        return self.start + self.duration


@dataclass(frozen=True)
class Line:
    """All spans of one name in a step: their number, durations, gaps before them and what they add, in microseconds."""

    name: str
    count: int
    duration: float
    gap: float
    adds: float


def record(run: Callable[[], Any]) -> list[Span]:
    """What the GPU does while `run` is called (by whatever thread), in the order of starts."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return spans_of(json.loads(file.read_text())["traceEvents"])


def spans_of(events: Sequence[dict[str, Any]]) -> list[Span]:
    """Those of a Chrome trace's events that are work of the GPU."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    found = [Span(e["name"], float(e["ts"]), float(e["dur"])) for e in events if e.get("cat") in kinds]
    return sorted(found, key=lambda span: (span.start, span.end))


def split_steps(spans: Sequence[Span], steps: int) -> list[list[Span]]:
    """Spans by step. A step begins at the kernel that comes first among those that run once in each of `steps`."""
    counts = Counter(span.name for span in spans)
    marker = next((s.name for s in spans if steps <= counts[s.name] <= steps + 1), None)
    if marker is None:
        raise ValueError(f"no kernel runs {steps} times; counted: {counts.most_common(20)}")
    starts = [index for index, span in enumerate(spans) if span.name == marker]
    return [list(spans[a:b]) for a, b in pairwise(starts)]


def lines_of(step: Sequence[Span]) -> list[Line]:
    """One line a name, in the order of first occurrence."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    end = step[0].start
    for span in step:
        adds = max(0.0, span.end - end)
        found.setdefault(span.name, []).append((span.duration, max(0.0, span.start - end), adds))
        end = max(end, span.end)
    return [
        Line(name, len(parts), *(sum(column) for column in zip(*parts, strict=True))) for name, parts in found.items()
    ]


def idle_share(steps: Sequence[Sequence[Span]]) -> float:
    """Share of the time of consecutive steps in which nothing runs on the GPU, before the first kernel of each too."""
    spans = [span for step in steps for span in step]
    lines = lines_of(spans)
    return sum(line.gap for line in lines) / sum(line.adds for line in lines)


def idle_median(steps: Sequence[Sequence[Span]]) -> float:
    """The same of the median step: a pause of the profiler's own in one of them does not show."""
    ends = [Span("end", max(span.end for span in step), 0.0) for step in steps]
    return statistics.median(idle_share([[end], step]) for end, step in zip(ends, steps[1:], strict=False))


def table(steps: Sequence[Sequence[Span]], width: int = 90) -> str:
    """The median step as text: lines by what they add, largest first, and their sum."""
    length = [step[-1].end - step[0].start for step in steps]
    middle = steps[length.index(statistics.median_low(length))]
    lines = sorted(lines_of(middle), key=lambda line: -line.adds)
    rows = [f"{'count':>5} {'adds':>8} {'gaps':>7} {'each':>7}  kernel (us)"]
    rows += [
        f"{x.count:5d} {x.adds:8.1f} {x.gap:7.1f} {x.duration / x.count:7.2f}  {_short(x.name)[:width]}" for x in lines
    ]
    total, gaps = sum(x.adds for x in lines), sum(x.gap for x in lines)
    return "\n".join([*rows, f"{sum(x.count for x in lines):5d} {total:8.1f} {gaps:7.1f}          one step"])


def _short(name: str) -> str:
    """A kernel's name without what all have in common."""
    for long, short in (
        ("void at::native::", ""),
        ("at::native::", ""),
        ("(anonymous namespace)::", ""),
        ("kernel_cutlass_kernel_", ""),
    ):
        name = name.replace(long, short)
    return name
