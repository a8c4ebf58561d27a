"""Op greedy: the best token of each row of logits, told to the host and left for the next step."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor

from .cache import kept_argument, load_kernel
from .draw_config import FAULTY
from .host_memory import STEPS_KEPT, HostRing
from .leading import Leading
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
    """Builder of the op on Hopper. The tokens that it returns stay as they are for STEPS_KEPT calls."""
    return GreedySm90()


class GreedySm90:
    """See greedy_reference; a decode step calls it once, so that it makes no tensor that it has already."""

    def __init__(self) -> None:
        self._ring = HostRing()
        self._tokens: list[Leading | None] = [None] * STEPS_KEPT
        self._turn = 0
        self._last: Tensor | None = None  # last_tokens of the call before, and how the kernel takes it
        self._kept: Any = None

    def __call__(self, logits: Tensor, lanes: Tensor, last_tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens, told = self._room(lanes), self._ring.take(len(lanes))
        if last_tokens is not self._last:
            self._last, self._kept = last_tokens, kept_argument(last_tokens)
        if len(logits):
            greedy_kernel()(logits, lanes, self._kept, tokens, told.data_ptr())
        return tokens, told

    def _room(self, lanes: Tensor) -> Tensor:
        self._turn = (self._turn + 1) % len(self._tokens)
        found = self._tokens[self._turn]
        if found is None or len(found.whole) < len(lanes):
            found = self._tokens[self._turn] = Leading(lanes.new_empty(1 << max(9, (len(lanes) - 1).bit_length())))
        return found(len(lanes))


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
