"""Op greedy: the best token of each row of logits, told to the host and left for the next step."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .cache import load_kernel
from .draw_config import FAULTY
from .host_memory import HostRing
from .refusals_sm90 import refuses_rows
from .registry import Implementation, Op, Problem

ARCH = "sm_90a"

Greedy = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def greedy_reference() -> Greedy:
    """Builder of the op; its function takes

    logits       [S, V]       bfloat16, or any float on a CPU
    lanes        [S] int64
    last_tokens  [num_lanes] int64: at `lanes` it becomes the rows' tokens
    returns      int64 [S]: the first of the largest logits of each row, 0 where a row holds a NaN or +inf or nothing
                 but -inf; and the same with FAULTY in those rows, on the device or in page-locked memory (then it is
                 there when the stream has come so far)
    """

    def run(logits: Tensor, lanes: Tensor, last_tokens: Tensor) -> tuple[Tensor, Tensor]:
        largest, tokens = logits.max(-1)
        faulty = (largest - largest) != 0
        tokens = tokens.masked_fill(faulty, 0)
        last_tokens[lanes] = tokens
        return tokens, tokens.masked_fill(faulty, FAULTY)

    return run


def build_greedy_sm90() -> Greedy:
    """Builder of the op on Hopper."""

    ring = HostRing()

    def run(logits: Tensor, lanes: Tensor, last_tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens, told = torch.empty_like(lanes), ring.take(len(lanes))
        if len(logits):
            greedy_kernel()(logits, lanes, last_tokens, tokens, told.data_ptr())
        return tokens, told

    return run


@lru_cache
def greedy_kernel() -> Any:
    """The compiled kernel, from memory, disk or compiled now."""

    def compile() -> Any:
        from .greedy_sm90 import compile_greedy

        return compile_greedy()

    return load_kernel("greedy_sm90", "greedy", compile, ARCH)


def refuses_greedy(problem: Problem) -> str | None:
    """Why the sm_90a kernel cannot take logits of K tokens, or None."""
    return refuses_rows(problem, "logits", "bfloat16")


GREEDY = Op(
    name="greedy",
    formula="last_tokens[lanes] = argmax(logits)",
    reference=greedy_reference,
    implementations=(Implementation("greedy_sm90", "atom.kernels.greedy:build_greedy_sm90", refuses_greedy),),
)
