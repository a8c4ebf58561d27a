"""The sm_90a attention kernels as implementations of rope_append_kv and paged_attention: plans, buffers, launches.

Decodes (sequences with one query) run the split decode kernel; prefill chunks are prefill_sm90.py's. What
changes from step to step of a decode lies in buffers that keep their place, so that a CUDA graph captured over one step
replays any other of the same batch size: `prepare` fills them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .append_sm90 import OffsetWords, as_words
from .attention_config import DecodeConfig, choose_decode, row_token
from .attention_kernels import decode_kernel, recent_kernel
from .attention_plan import most_segments, plan_balanced, plan_fixed
from .cascade_plan import Cascade
from .cascade_sm90 import SharedPrefixes
from .dense_attention import AttentionSpec
from .kv_layout import KVLayout
from .paged_attention import RopeTable
from .paged_step import Ints, PagedStep, RecentLayer, Share
from .prefill_sm90 import Prefill
from .recent_config import RecentConfig
from .step_buffers_sm90 import Near, PrefixBuffers, Scratch, StepBuffers


@dataclass
class DecodePlan:
    """A step's plan on the device. With `prefix`, what sequences share comes first, in a launch of its own.

    rows, tables  under which a shared prefix was planned
    """

    buffers: StepBuffers
    prefix: PrefixBuffers | None = None
    cascade: Cascade | None = None
    rows: Ints | None = None
    tables: Ints | None = None

    def goes_on(self, step: PagedStep, lengths: Ints, rows: Ints) -> bool:
        """It serves another step; see StepBuffers.go_on. Where a prefix is shared, that still is in all tables.

        A sequence that has just grown beyond the recent window has a row for the first time.
        """
        if step.recent is not None and (lengths == step.recent.tokens + 1).any():
            return False
        if self.cascade is not None:
            found = step.tables[:, : int(self.cascade.blocks.max())]
            assert self.rows is not None and self.tables is not None
            if not (np.array_equal(rows, self.rows) and np.array_equal(found, self.tables)):
                return False
        return self.buffers.go_on(lengths, None if step.lengths is not None else rows)


class PagedAttentionSm90:
    """paged_attention on Hopper; called as paged_attention_reference's function is.

    split_tokens  cut every sequence there, so that results do not depend on the batch; None: as fast as possible.
                  Prefixes that sequences share are then read by each
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
        self.buffers: dict[tuple[int, int | None, bool, int], StepBuffers] = {}
        self.plans: dict[tuple[int, int], DecodePlan] = {}  # of the last step of each size, of layers without a window
        self.recents: dict[RecentConfig, Any] = {}
        self.nears: dict[int, Near] = {}  # by queries that they have room for
        self.prefixes = SharedPrefixes(layout)
        self.scratch: Scratch | None = None
        self.is_planned_now = False  # the plan comes with this call, not with `prepare`: the kernel has to wait for it
        self.is_prepared_now = False  # no call since `prepare`: its copies may be the last thing that was launched
        self.turns: dict[tuple[int, int], Tensor] = {}
        self.offsets = OffsetWords()

    def prepare(self, step: PagedStep, windows: Iterable[int | None], queries: int, share: Share = "auto") -> bool:
        """Plan the step for layers of each window and bring the plans to the device; before a graph is replayed too.

        Returns whether sequences read prefixes together, for which there are launches that other steps have not.
        """
        self.prefill.warm_up(queries * self.layout.num_kv_heads, step.slots.device)
        plans = []
        self.is_prepared_now = True
        for window in dict.fromkeys(windows):
            plans.append(self._ready(step, window, queries, share))
            if step.recent is not None and plans[-1] is not None:
                self._near(step, queries * self.layout.num_kv_heads)
            if step.lengths is None:  # else nothing prefills
                self.prefill.plan(step, window, queries * self.layout.num_kv_heads)
        return any(plan is not None and plan.prefix is not None for plan in plans)

    def __call__(
        self, q: Tensor, layer: Tensor, step: PagedStep, spec: AttentionSpec, table: RopeTable | None = None,
        recent: RecentLayer | None = None,
    ) -> Tensor:  # fmt: skip
        """See PagedAttentionReference."""
        queries, cap = q.shape[1] // self.layout.num_kv_heads, spec.soft_cap
        self.is_planned_now = False
        plan = self._ready(step, spec.window, queries)
        chunks = self.prefill.plan(step, spec.window, q.shape[1], cap is not None)
        q = q.contiguous()
        out = torch.empty_like(q)
        if chunks is not None:
            out = self.prefill(q, layer, chunks, spec, out, table, recent)
        if plan is not None:
            buffers, scratch, is_early = plan.buffers, plan.buffers.scratch, self._may_be_early(q)
            has_offset = spec.key_offset is not None
            tokens = recent_tokens(step, spec.window)
            config = self._config(queries, spec.window is not None, cap is not None, has_offset, tokens)
            decode = self._kernel(config)
            words = as_words(q)
            offsets: tuple[Tensor, ...] = (words[0], buffers.nothing, buffers.nothing, words[0])
            if spec.key_offset is not None:
                assert table is not None, "offsets that are turned on reading need a table"
                offsets = (self.offsets.get(spec.key_offset), table.cos, table.sin, self._turns(table, config))
            if plan.prefix is not None:
                self.prefixes(
                    words, layer, step.block_tables, plan.prefix, scratch.partial, scratch.lse, spec.scale, cap,
                    is_early,
                )  # fmt: skip
            lengths = buffers.lengths if step.lengths is None else step.lengths
            near: tuple[Tensor | None, ...] = (None, None)
            if step.recent is not None:
                assert recent is not None and cap is None and not has_offset, "see Scheme.kv_recent"
                near = self._attend_recent(words, step, recent, lengths, buffers.rows, out, spec.scale, is_early)
            decode(
                words, layer, step.block_tables, lengths, buffers.rows, buffers.work, buffers.segments, out,
                scratch.partial, scratch.lse, scratch.counters, *offsets, *near,
                spec.scale if cap is None else spec.scale / cap,
                1.0 if cap is None else cap, 0 if spec.window is None else spec.window - tokens, is_early,
            )  # fmt: skip
        return out

    def _attend_recent(
        self, words: Tensor, step: PagedStep, layer: RecentLayer, lengths: Tensor, rows: Tensor, out: Tensor,
        scale: float, is_early: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Decodes over their newest tokens: into `out` where there are no others, else what the decode kernel adds."""
        assert step.recent is not None
        heads, dim = out.shape[1:]
        config = RecentConfig(step.recent.tokens, dim, heads // self.layout.num_kv_heads)
        if config not in self.recents:
            self.recents[config] = recent_kernel(config)
        near = self._near(step, heads)
        self.recents[config](
            words, as_words(layer.ring), lengths, rows, step.recent.rings, out, near.values, near.lse, scale,
            is_early, step.recent.capacity,
        )  # fmt: skip
        return near.values, near.lse

    def _may_be_early(self, q: Tensor) -> int:
        """1 if the plan was there before the kernel before began: then a decode reads it before it waits.

        The copies that bring a plan let the next kernel start before they write. A graph starts when they have ended.
        """
        was_prepared, self.is_prepared_now = self.is_prepared_now, False
        is_captured = was_prepared and q.is_cuda and torch.cuda.is_current_stream_capturing()
        return 0 if self.is_planned_now or (was_prepared and not is_captured) else 1

    def _near(self, step: PagedStep, heads: int) -> Near:
        """Room for all decodes of a step; kept, since graphs may have captured it."""
        room = step.derive("near", lambda: 1 << int(step.cu_seqlens_q[:-1][step.counts == 1].max()).bit_length())
        if room not in self.nears:
            self.nears[room] = Near(room, heads, self.layout.head_dim, step.slots.device)
        return self.nears[room]

    def _config(self, queries: int, has_window: bool, has_cap: bool, has_offset: bool, recent: int = 0) -> DecodeConfig:
        layout = self.layout
        return choose_decode(
            layout.kv, layout.head_dim, queries, layout.block_size, has_window, has_cap, has_offset, layout.zero_bias,
            recent,
        )  # fmt: skip

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

    def _ready(self, step: PagedStep, window: int | None, queries: int, share: Share = "auto") -> DecodePlan | None:
        """The step's plan on the device; None if no sequence decodes."""
        return step.derive(("plan", window), lambda: self._plan(step, window, queries, share))

    def _plan(self, step: PagedStep, window: int | None, queries: int, share: Share) -> DecodePlan | None:
        lengths, rows = step.seqlens_k, step.cu_seqlens_q[:-1]
        if step.lengths is None:
            is_decode = step.counts == 1
            if not is_decode.any():
                return None
            lengths = np.where(is_decode, lengths, 0)
        self.is_planned_now = True
        room = room_for(len(lengths))
        if window is not None or self.split_blocks is not None or share == "never":
            return self._plan_alone(step, window, queries, room, lengths, rows, None)
        key = (room, recent_tokens(step, None))
        last = self.plans.get(key)
        if last is None or share != "auto" or step.ahead is not None or not last.goes_on(step, lengths, rows):
            cascade = None
            if not self.has_offset and step.recent is None:  # shared prefixes know of no recent window
                stored = lengths - 1 if step.ahead is None else lengths - 1 - step.ahead  # in steps before
                cascade = self.prefixes.find(step.tables, stored, queries, share)
            last = self.plans[key] = self._plan_alone(step, window, queries, room, lengths, rows, cascade)
        return last

    def _plan_alone(
        self, step: PagedStep, window: int | None, queries: int, room: int, lengths: Ints, rows: Ints,
        cascade: Cascade | None,
    ) -> DecodePlan:  # fmt: skip
        """A plan that owes nothing to the step before."""
        recent = recent_tokens(step, window)
        config = self._config(queries, window is not None, False, self.has_offset, recent)
        device, heads, size = step.slots.device, self.layout.num_kv_heads, self.layout.block_size
        sms = multiprocessors(device)
        ctas = config.ctas_per_sm * sms
        key = (room, window, cascade is not None, recent)
        seen = lengths  # by the decode kernel
        if recent:
            seen, window = np.maximum(lengths - recent, 0), None if window is None else window - recent
        most, slots = most_segments(room, heads, ctas), 0
        if self.split_blocks is not None:
            plan = plan_fixed(seen, size, heads, ctas, self.split_blocks, window, config.overhead_blocks)
            most = 1 << max(10, (len(plan.segments) - 1).bit_length())
        else:
            skipped = shared = None
            if cascade is not None:
                prefix_plan = self.prefixes.plan(cascade, queries, sms, most)
                slots = self.prefixes.most_slots(room, queries, sms)
                skipped, shared = cascade.skipped, prefix_plan.shared
            plan = plan_balanced(
                seen, size, heads, ctas, window, config.stage_blocks, config.overhead_blocks, config.least_blocks,
                skipped, shared,
            )  # fmt: skip
        if key not in self.buffers or self.buffers[key].most_segments < most:
            scratch = self._scratch(most + slots, config, device)
            self.buffers[key] = StepBuffers(room, ctas, most, scratch, config, device)
        if step.ahead is not None:
            plan.segments[:, 7] = step.ahead[plan.segments[:, 0]]
        self.buffers[key].fill(lengths, rows, plan, serves_others=step.ahead is None)
        if cascade is None:
            return DecodePlan(self.buffers[key])
        prefix = self.prefixes.fill(room, cascade, prefix_plan, rows, queries, sms, device)
        kept = step.tables[:, : int(cascade.blocks.max())].copy()
        return DecodePlan(self.buffers[key], prefix, cascade, np.array(rows), kept)

    def _scratch(self, slots: int, config: DecodeConfig, device: Any) -> Scratch:
        """Room for so many partial results, the same for steps of all sizes, since they run one after the other."""
        if self.scratch is None or len(self.scratch.lse) < slots:  # buffers of earlier steps keep what graphs captured
            self.scratch = Scratch(slots, config, device)
        return self.scratch


def recent_tokens(step: PagedStep, window: int | None) -> int:
    """Newest tokens of each sequence that are read exactly; a sliding window sees more than those."""
    tokens = 0 if step.recent is None else step.recent.tokens
    assert window is None or window > tokens, "a sliding window must be longer than the recent one"
    return tokens


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


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
