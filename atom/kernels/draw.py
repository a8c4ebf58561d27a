"""Op draw: a token of each row of logits, by temperature, min-p, top-k, top-p and a seed, told to the host and left for
the next step. Its definition is serving/sampler.py, which runs what this kernel refuses."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .cache import load_kernel
from .draw_config import THREADS, TILE
from .greedy import refuses_greedy
from .host_memory import HostRing
from .registry import Problem

ARCH = "sm_90a"

_ring = HostRing()


def draw(logits: Tensor, words: Tensor, counters: Tensor, lanes: Tensor, last_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens int64 [S] as op greedy returns them: to go on with, and with FAULTY for the host.

    logits       [S, V] bfloat16
    words        int64 [words, S]: the rows' parameters, as draw_config.py numbers them
    counters     int64 [TILE + tiles]: what a candidate adds to a row's key
    lanes        int64 [S]
    last_tokens  int64 [num_lanes]: at `lanes` it becomes the rows' tokens
    """
    tokens, told = torch.empty_like(lanes), _ring.take(len(lanes))
    if len(logits):
        draw_kernel()(logits, words, counters, lanes, last_tokens, tokens, told.data_ptr())
    return tokens, told


@lru_cache
def draw_kernel() -> Any:
    """The compiled kernel, from memory, disk or compiled now."""

    def compile() -> Any:
        from .draw_sm90 import compile_draw

        return compile_draw()

    return load_kernel("draw_sm90", "draw", compile, ARCH)


def refuses_draw(problem: Problem) -> str | None:
    """Why the sm_90a kernel cannot draw from logits of K tokens, or None."""
    if problem.K > THREADS * TILE:
        return f"vocabularies have at most {THREADS * TILE} tokens, got {problem.K}"
    return refuses_greedy(problem)
