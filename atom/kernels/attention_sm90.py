"""The sm_90a attention kernels as implementations of rope_append_kv and paged_attention: plans, buffers, launches.

Decodes (sequences with one query) run the split decode kernel; prefill chunks are prefill_sm90.py's. What
changes from step to step of a decode lies in buffers that keep their place, so that a CUDA graph captured over one step
replays any other of the same batch size: `prepare` fills them.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..quant.formats import get_format
from ..quant.rounding import largest_scale
from .attention_config import AppendConfig, DecodeConfig, choose_decode, row_token
from .attention_plan import (
    SEGMENT_FIELDS,
    AttentionPlan,
    most_merges,
    most_segments,
    most_slots,
    plan_balanced,
    plan_fixed,
)
from .cache import load_kernel
from .dense_attention import AttentionSpec
from .head_norm import HeadNorms
from .host_memory import bring
from .kv_layout import KVLayout
from .paged_attention import RopeTable
from .paged_step import PagedStep
from .prefill_sm90 import Prefill

ARCH = "sm_90a"
PINNED_COPIES = 4  # steps that may be under way before a host buffer is written again
REPLAN_AFTER = 32  # steps that one plan serves while sequences only grow
FEW_TOKENS = 2048  # up to which a warp of the append kernel takes one task: 7.5 us against 8.0 at 1024, on an H200
MANY_PARTS = 2  # tasks that it takes of more: 51.2 us against 52.0 at 8192


class OffsetWords:
    """Key offsets as the kernels read them, converted once: a model's parameters keep their place."""

    def __init__(self) -> None:
        self._words: dict[int, tuple[Tensor, Tensor]] = {}  # the offset itself is kept, so that nothing takes its place

    def get(self, offset: Tensor) -> Tensor:
        """[num_kv_heads, head_dim] -> bfloat16 pairs, uint32 [num_kv_heads, head_dim / 2]."""
        key = offset.data_ptr()
        if key not in self._words:
            self._words[key] = (offset, _words(offset.bfloat16()))
        return self._words[key][1]


class StepBuffers:
    """The int32 arrays of a step on the device, in one allocation that keeps its place, filled by one copy.

    lengths, rows  [B], work [CTAs + 1], segments [S, 8], merges [M, 4]: see PagedDecode and AttentionPlan
    partial        float32 [slots, queries, head_dim], and lse [slots, queries]: what the kernels hand each other
    """

    def __init__(
        self, seqs: int, ctas: int, segments: int, slots: int, merges: int, config: DecodeConfig, device: Any
    ) -> None:
        self.most_segments, self.most_slots = segments, slots
        sizes = (seqs, seqs, ctas + 1, segments * SEGMENT_FIELDS, merges * 4)
        ends = np.cumsum([-(-size // 32) * 32 for size in sizes])  # each begins on a line
        starts = [0, *ends[:-1].tolist()]
        self.places = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        is_cuda = torch.device(device).type == "cuda"
        self.host = [torch.zeros(int(ends[-1]), dtype=torch.int32, pin_memory=is_cuda) for _ in range(PINNED_COPIES)]
        self.turn = 0
        self.planned = np.zeros(0, dtype=np.int64)  # the last step's lengths, under the plan that is there
        self.steps = 0  # since that plan
        self.device = torch.zeros(int(ends[-1]), dtype=torch.int32, device=device)
        parts = [self.device[place] for place in self.places]
        self.lengths, self.rows, self.work = parts[:3]
        self.segments, self.merges = parts[3].view(-1, SEGMENT_FIELDS), parts[4].view(-1, 4)
        self.partial = torch.empty(slots, config.queries, config.head_dim, device=device)
        self.lse = torch.empty(slots, config.queries, device=device)
        self.counters = torch.zeros(max(1, merges), dtype=torch.int32, device=device)  # the kernel leaves zeros
        self.nothing = torch.zeros(1, config.head_dim // 2, device=device)  # where a kernel has no use for an argument

    def fill(self, lengths: np.ndarray, rows: np.ndarray, plan: AttentionPlan) -> None:
        assert len(plan.segments) <= self.most_segments, "a plan has more segments than its bound"
        assert plan.num_slots <= self.most_slots, "a plan has more partial results than its bound"
        self.turn = (self.turn + 1) % PINNED_COPIES
        host = self.host[self.turn].numpy()
        for place, array in zip(self.places, (lengths, rows, plan.work, plan.segments, plan.merges), strict=True):
            host[place.start : place.start + array.size] = array.reshape(-1)
        host[self.places[4].start + plan.merges.size : self.places[4].stop] = 0
        bring(self.host[self.turn], self.device)
        self.planned, self.steps = lengths, 0

    def go_on(self, lengths: np.ndarray, rows: np.ndarray) -> bool:
        """The step after the last one under the same plan, if sequences have only grown by a token: cheaper by far.

        False if it needs a plan of its own, as every REPLAN_AFTER-th does: rows grow alike, but not their parts.
        """
        if self.steps >= REPLAN_AFTER or not np.array_equal(lengths, self.planned + (self.planned > 0)):
            return False
        self.turn = (self.turn + 1) % PINNED_COPIES
        end = self.places[2].start
        host = self.host[self.turn]
        for place, array in zip(self.places[:2], (lengths, rows), strict=True):
            host.numpy()[place.start : place.start + array.size] = array
        bring(host[:end], self.device[:end])
        self.planned, self.steps = lengths, self.steps + 1
        return True


class PagedAttentionSm90:
    """paged_attention on Hopper; called as paged_attention_reference's function is.

    split_tokens  cut every sequence there, so that results do not depend on the batch; None: as fast as possible
    has_offset    some layers' keys have an offset: plans are made for the kernel that adds it
    """

    def __init__(
        self, layout: KVLayout, pre_rope: bool = False, split_tokens: int | None = None, has_offset: bool = False
    ) -> None:
        assert not pre_rope
        self.layout = layout
        self.has_offset = has_offset
        self.split_blocks = None if split_tokens is None else max(2, -(-split_tokens // layout.block_size) // 2 * 2)
        self.prefill = Prefill(layout, split_tokens is not None)
        self.kernels: dict[DecodeConfig, Any] = {}
        self.buffers: dict[tuple[int, int | None], StepBuffers] = {}
        self.is_planned_now = False  # the plan comes with this call, not with `prepare`: the kernel has to wait for it
        self.turns: dict[tuple[int, int], Tensor] = {}
        self.offsets = OffsetWords()

    def prepare(self, step: PagedStep, windows: Iterable[int | None], queries: int) -> None:
        """Plan the step for layers of each window and bring the plans to the device; before a graph is replayed too."""
        self.prefill.warm_up(queries * self.layout.num_kv_heads, step.slots.device)
        for window in dict.fromkeys(windows):
            self._ready(step, window, queries)
            self.prefill.plan(step, window, queries * self.layout.num_kv_heads)

    def __call__(
        self, q: Tensor, layer: Tensor, step: PagedStep, spec: AttentionSpec, table: RopeTable | None = None
    ) -> Tensor:
        """See PagedAttentionReference."""
        queries, cap = q.shape[1] // self.layout.num_kv_heads, spec.soft_cap
        self.is_planned_now = False
        buffers = self._ready(step, spec.window, queries)
        chunks = self.prefill.plan(step, spec.window, q.shape[1], cap is not None)
        q = q.contiguous()
        out = torch.empty_like(q)
        if chunks is not None:
            out = self.prefill(q, layer, chunks, spec, out, table)
        if buffers is not None:
            has_offset = spec.key_offset is not None
            config = self._config(queries, spec.window is not None, cap is not None, has_offset)
            decode = self._kernel(config)
            words = _words(q)
            offsets: tuple[Tensor, ...] = (words[0], buffers.nothing, buffers.nothing, words[0])
            if spec.key_offset is not None:
                assert table is not None, "offsets that are turned on reading need a table"
                offsets = (self.offsets.get(spec.key_offset), table.cos, table.sin, self._turns(table, config))
            decode(
                words, layer, step.block_tables, buffers.lengths, buffers.rows, buffers.work, buffers.segments,
                buffers.merges, out, buffers.partial, buffers.lse, buffers.counters, *offsets,
                spec.scale if cap is None else spec.scale / cap,
                1.0 if cap is None else cap, spec.window or 0, 0 if self.is_planned_now else 1,
            )  # fmt: skip
        return out

    def _config(self, queries: int, has_window: bool, has_cap: bool, has_offset: bool) -> DecodeConfig:
        layout = self.layout
        kv = "bf16" if layout.spec is None else layout.spec.format
        return choose_decode(kv, layout.head_dim, queries, layout.block_size, has_window, has_cap, has_offset)

    def _turns(self, table: RopeTable, config: DecodeConfig) -> Tensor:
        """The constant matrix of a table's angles; made once, on the layer's first call."""
        key = (table.cos.data_ptr(), config.stage_tokens)
        if key not in self.turns:
            self.turns[key] = turn_matrix(table, config.stage_tokens)
        return self.turns[key]

    def _kernel(self, config: DecodeConfig) -> Any:
        if config not in self.kernels:
            self.kernels[config] = decode_kernel(config)
        return self.kernels[config]

    def _ready(self, step: PagedStep, window: int | None, queries: int) -> StepBuffers | None:
        """The step's plan on the device; None if no sequence decodes."""
        return step.derive(("plan", window), lambda: self._plan(step, window, queries))

    def _plan(self, step: PagedStep, window: int | None, queries: int) -> StepBuffers | None:
        is_decode = step.counts == 1
        if not is_decode.any():
            return None
        config = self._config(queries, window is not None, False, self.has_offset)
        lengths, rows = np.where(is_decode, step.seqlens_k, 0), step.cu_seqlens_q[:-1]
        self.is_planned_now = True
        room = room_for(len(lengths))
        key = (room, window)
        can_go_on = window is None and self.split_blocks is None and step.ahead is None and key in self.buffers
        if can_go_on and self.buffers[key].go_on(lengths, rows):
            return self.buffers[key]
        ctas = config.ctas_per_sm * multiprocessors(step.slots.device)
        heads, size = self.layout.num_kv_heads, self.layout.block_size
        if self.split_blocks is None:
            plan = plan_balanced(
                lengths, size, heads, ctas, window, config.stage_blocks, config.overhead_blocks, config.least_blocks
            )
            most, merges = most_segments(room, heads, ctas), most_merges(room, heads, ctas)
            slots = most_slots(ctas)
        else:
            plan = plan_fixed(lengths, size, heads, ctas, self.split_blocks, window, config.overhead_blocks)
            most, merges = 1 << max(10, (len(plan.segments) - 1).bit_length()), room * heads
            slots = most
        if key not in self.buffers or self.buffers[key].most_segments < most:
            self.buffers[key] = StepBuffers(room, ctas, most, slots, merges, config, step.slots.device)
        if step.ahead is not None:
            plan.segments[:, 7] = step.ahead[plan.segments[:, 0]]
        self.buffers[key].fill(lengths, rows, plan)
        if step.ahead is not None:
            self.buffers[key].steps = REPLAN_AFTER  # no other step may go on under this plan
        return self.buffers[key]


class RopeAppendSm90:
    """rope_append_kv on Hopper; called as rope_append_kv_reference's function is. Negative slots store nothing."""

    def __init__(self, layout: KVLayout, pre_rope: bool = False, rotates: bool = False) -> None:
        assert not pre_rope
        self.layout = layout
        self.rotates = rotates
        spec = layout.spec
        self.kv = "bf16" if spec is None else spec.format
        self.clip = 1.0 if spec is None else float(spec.clip)
        self.largest = 1.0 if spec is None else largest_scale(get_format(spec.format))
        self.kernels: dict[AppendConfig, Any] = {}
        self.offsets = OffsetWords()
        self.norms: dict[int, tuple[HeadNorms, Tensor]] = {}
        self.nothing: tuple[Tensor, Tensor] | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, layer: Tensor,
        offset: Tensor | None = None, centre: Tensor | None = None, norms: HeadNorms | None = None,
    ) -> Tensor:  # fmt: skip
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if not len(q):
            return out
        dim, parts = self.layout.head_dim, 1 if len(q) <= FEW_TOKENS else MANY_PARTS
        norm = "none" if norms is None else "shifted" if norms.offset else "plain"
        config = AppendConfig(
            self.kv, dim, self.layout.block_size, self.clip, offset is not None, parts, norm=norm,
            has_centre=centre is not None, rotates=self.rotates,
        )  # fmt: skip
        if config not in self.kernels:  # with its sibling, so that the first long prompt does not wait for a compiler
            for each in (replace(config, parts=1), replace(config, parts=MANY_PARTS)):
                self.kernels[each] = append_kernel(each)
        if self.nothing is None:  # where a kernel has no use for an argument
            self.nothing = torch.zeros(1, dim, device=q.device), _words(torch.zeros(1, dim, device=q.device).bfloat16())
        floats, words = self.nothing
        if centre is not None:
            floats = centre.float().contiguous()
        self.kernels[config](
            _heads(q), _heads(k), _heads(v), cos.contiguous(), sin.contiguous(), slots,
            words if offset is None else self.offsets.get(offset), floats,
            words if norms is None else self._norm_words(norms), layer, _words(out), self.largest,
            0.0 if norms is None else norms.eps,
        )  # fmt: skip
        return out

    def _norm_words(self, norms: HeadNorms) -> Tensor:
        """The weights of both norms as the kernel reads them: uint32 [2, head_dim / 2]; made once for a layer."""
        key = norms.q.data_ptr()
        if key not in self.norms:
            self.norms[key] = (norms, _words(torch.stack((norms.q, norms.k)).bfloat16()))
        return self.norms[key][1]


def room_for(num_seqs: int) -> int:
    """Sequences that a step's buffers have room for: the sizes of serving's decode buckets, whose buffers are there.

    Page-locked memory for every number of sequences that a step ever had would stall each first one, and add up.
    """
    if num_seqs <= 8:
        return 1 << max(0, num_seqs - 1).bit_length()
    step = 8 if num_seqs <= 256 else 32
    return -(-num_seqs // step) * step


def turn_matrix(table: RopeTable, stage_tokens: int) -> Tensor:
    """cos and sin of the first positions as decode_offset_sm90.py reads them: uint32 [stage_tokens, head_dim / 2].

    Rows stand in the order of mma's, columns are 8 cosines and 8 sines by turns, in float16. The table's factor
    (YaRN's) is taken out: turning by a stage's first position brings it in.
    """
    order = [tile + row_token(row) for tile in range(0, stage_tokens, 16) for row in range(16)]
    rows = torch.tensor(order, device=table.cos.device).clamp(max=len(table.cos) - 1)  # a shorter text never has them
    both = torch.stack([(x[rows] / table.cos[0, 0]).unflatten(1, (-1, 8)) for x in (table.cos, table.sin)], 2)
    return both.flatten(1).half().view(torch.int32).view(torch.uint32)


def _heads(x: Tensor) -> Tensor:
    """bfloat16 [T, heads, head_dim] as uint32 pairs, where it lies if the heads of a token lie side by side."""
    side_by_side = x.stride(2) == 1 and x.stride(1) == x.shape[2] and x.stride(0) % 8 == 0
    return x.view(torch.int32).view(torch.uint32) if side_by_side else _words(x)


def _words(x: Tensor) -> Tensor:
    """bfloat16 [..., n] as uint32 [..., n / 2]."""
    return x.contiguous().view(torch.int32).view(torch.uint32)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def decode_kernel(config: DecodeConfig) -> Any:
    """The compiled kernel of a config, from memory, disk or compiled now."""

    def compile() -> Any:
        from .paged_decode_sm90 import compile_decode

        return compile_decode(config)

    return _load("paged_decode_sm90", config, compile)


def append_kernel(config: AppendConfig) -> Any:
    def compile() -> Any:
        from .rope_append_sm90 import compile_append

        return compile_append(config)

    return _load("rope_append_sm90", config, compile)


def _load(name: str, config: object, compile: Callable[[], Any]) -> Any:
    return load_kernel(name, config, compile, ARCH)
