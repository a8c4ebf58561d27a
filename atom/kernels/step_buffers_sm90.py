"""Plans of decode steps on the device, where they keep their place: a CUDA graph finds the next step's there."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .attention_config import DecodeConfig
from .attention_plan import SEGMENT_FIELDS, AttentionPlan
from .cascade_plan import PrefixPlan
from .host_memory import bring
from .leading import Leading

PINNED_COPIES = 4  # steps that may be under way before a host buffer is written again
REPLAN_AFTER = 32  # steps that one plan serves while sequences only grow


class PlacedArrays:
    """int32 arrays of fixed sizes in one allocation on the device, each on lines of its own, filled by one copy."""

    def __init__(self, sizes: Sequence[int], device: Any) -> None:
        ends = np.cumsum([-(-size // 32) * 32 for size in sizes])
        starts = [0, *ends[:-1].tolist()]
        self.places = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        is_cuda = torch.device(device).type == "cuda"
        whole = [torch.zeros(int(ends[-1]), dtype=torch.int32, pin_memory=is_cuda) for _ in range(PINNED_COPIES)]
        self.host = [Leading(copy) for copy in whole]
        self.words = [copy.numpy() for copy in whole]
        self.turn = 0
        self.device = Leading(torch.zeros(int(ends[-1]), dtype=torch.int32, device=device))
        self.parts = [self.device.whole[place] for place in self.places]

    def fill(self, *arrays: np.ndarray) -> None:
        """The first arrays, or all; what they leave of their room keeps what it had."""
        self.turn = (self.turn + 1) % PINNED_COPIES
        words = self.words[self.turn]
        for place, array in zip(self.places, arrays, strict=False):
            words[place.start : place.start + array.size] = array.reshape(-1)
        end = len(words) if len(arrays) == len(self.places) else self.places[len(arrays)].start
        bring(self.host[self.turn](end), self.device(end))


class Scratch:
    """What CTAs hand each other within a launch, and a shared prefix's kernel to the next.

    partial   float32 [slots, queries, head_dim], and lse [slots, queries]: slots of segments, then of shared prefixes
    counters  int32 [slots]: a launch finds zeros and leaves them
    """

    def __init__(self, slots: int, config: DecodeConfig, device: Any) -> None:
        self.partial = torch.empty(slots, config.queries, config.head_dim, device=device)
        self.lse = torch.empty(slots, config.queries, device=device)
        self.counters = torch.zeros(slots, dtype=torch.int32, device=device)


class Near:
    """What the kernel of the newest tokens hands the decode kernel: float32 [rows, heads, head_dim] and [rows, heads].

    A row is a query token.
    """

    def __init__(self, rows: int, heads: int, head_dim: int, device: Any) -> None:
        self.values = torch.empty(rows, heads, head_dim, device=device)
        self.lse = torch.empty(rows, heads, device=device)


class StepBuffers:
    """The plan of a decode step on the device, where it stays: lengths, rows [B], work [CTAs + 1], segments [S, 8].

    See PagedDecode and AttentionPlan.
    """

    def __init__(
        self, seqs: int, ctas: int, segments: int, scratch: Scratch, config: DecodeConfig, device: Any
    ) -> None:
        self.most_segments = segments
        self.scratch = scratch
        self.arrays = PlacedArrays((seqs, seqs, ctas + 1, segments * SEGMENT_FIELDS), device)
        self.planned = np.zeros(0, dtype=np.int64)  # the last step's lengths, under the plan that is there
        self.steps = 0  # since that plan
        self.lengths, self.rows, self.work = self.arrays.parts[:3]
        self.segments = self.arrays.parts[3].view(-1, SEGMENT_FIELDS)
        self.nothing = torch.zeros(1, config.head_dim // 2, device=device)  # where a kernel has no use for an argument

    def fill(self, lengths: np.ndarray, rows: np.ndarray, plan: AttentionPlan, serves_others: bool = True) -> None:
        """serves_others: steps after this one may go on under the plan."""
        assert len(plan.segments) <= self.most_segments, "a plan has more segments than its bound"
        self.arrays.fill(lengths, rows, plan.work, plan.segments)
        self.planned, self.steps = lengths, 0 if serves_others else REPLAN_AFTER

    def go_on(self, lengths: np.ndarray, rows: np.ndarray | None) -> bool:
        """The step after the last one under the same plan, if sequences have only grown by a token: cheaper by far.

        rows  None: they are the last step's, and lengths lie on the device elsewhere
        False if it needs a plan of its own, as every REPLAN_AFTER-th does: rows grow alike, but not their parts. What
        has a single token may stay as it is: rows that pad a step do.
        """
        if self.steps >= REPLAN_AFTER or len(lengths) != len(self.planned):
            return False
        if not np.logical_and.reduce(lengths == self.planned + (self.planned > 1)):
            return False
        if rows is not None:
            self.arrays.fill(lengths, rows)
        self.planned, self.steps = lengths, self.steps + 1
        return True


class PrefixBuffers:
    """The plan of shared prefixes on the device, where it stays: members [rows, members], work, segments."""

    def __init__(self, rows: int, ctas: int, segments: int, config: DecodeConfig, device: Any) -> None:
        self.arrays = PlacedArrays((ctas + 1, rows * config.members, segments * SEGMENT_FIELDS), device)
        self.work = self.arrays.parts[0]
        self.members = self.arrays.parts[1].view(rows, config.members)
        self.segments = self.arrays.parts[2].view(-1, SEGMENT_FIELDS)

    def fill(self, tokens: np.ndarray, plan: PrefixPlan) -> None:
        """tokens [R, members]: which of the step's tokens are the members' queries."""
        self.arrays.fill(plan.work, tokens, plan.segments)
