"""How kernels are timed: CUDA graphs of calls over rotating inputs, cold L2, interleaved, median.

One graph holds enough calls that the inputs they read together are several times the L2 cache; competitors take turns
round by round, so that a change of clocks meets all of them alike.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

COLD_BYTES = 260_000_000  # of rotating weights: four times an H200's L2
HEAVY, REST_S = 1024, 0.3  # from so many tokens on the power limit lowers the clocks; 0.2 s later they are back


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


def time_products(candidates: Mapping[str, Sequence[Callable[[], Any]]], M: int) -> dict[str, float]:
    """time_calls of products of M tokens; of HEAVY and more each alone behind a rest: all find the same clocks."""
    if M < HEAVY:
        return time_calls(candidates)
    found: dict[str, float] = {}
    for name, calls in candidates.items():
        torch.cuda.synchronize()
        time.sleep(REST_S)
        found |= time_calls({name: calls})
    return found


def calls_in_graph(M: int, copies: int) -> int:
    """How many calls one graph holds: every copy of the inputs, and enough to time."""
    return max(copies, 3 if M > 2000 else 32)
