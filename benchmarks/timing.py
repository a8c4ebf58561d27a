"""The timing protocol of all benchmarks: CUDA graphs of calls over rotating inputs, cold L2, interleaved, median.

One graph holds enough calls that the inputs they read together are several times the L2 cache; competitors take turns
round by round, so that a change of clocks meets all of them alike.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from atom.records import circumstances, current_commit, write_record

COLD_BYTES = 260_000_000  # of rotating weights: four times an H200's L2
BANDWIDTH = 4.38e12  # bytes a second that one H200 reads
RATE = {"bf16": 900e12, "8bit": 1656e12}  # operations a second of its best GEMMs


def capture(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """One graph of all calls, warmed up."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def time_calls(candidates: Mapping[str, Sequence[Callable[[], Any]]], rounds: int = 15) -> dict[str, float]:
    """Median microseconds of one call of each candidate: name -> its calls, which rotate over inputs."""
    graphs = {name: capture(calls) for name, calls in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            samples[name].append(start.elapsed_time(stop) * 1000 / len(candidates[name]))
    return {name: statistics.median(times) for name, times in samples.items()}


def gemm_floor_us(M: int, N: int, K: int, weight_bytes: float, rate: str = "8bit") -> float:
    """Speed of light of one GEMM: its bytes at full bandwidth or its operations at full rate, the larger."""
    moved = weight_bytes + M * K + 2 * M * N
    return max(moved / BANDWIDTH, 2 * M * N * K / RATE[rate]) * 1e6


def keep(name: str, rows: list[dict[str, Any]], out: str | None, is_record: bool = True) -> None:
    """Write the rows of a finished run as record `name`, or with their circumstances into the file `out`."""
    if out:
        found = {"rows": rows, "where": circumstances("h200"), "commit": current_commit()}
        Path(out).write_text(json.dumps(found))
    elif is_record:
        print(write_record(name, rows, "h200"))


def save(name: str, file: str) -> None:
    """Write record `name` from what `keep` wrote into a file on another machine."""
    found = json.loads(Path(file).read_text())
    print(write_record(name, found["rows"], "h200", where=found["where"], commit=found["commit"]))
