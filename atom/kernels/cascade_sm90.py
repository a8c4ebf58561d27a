"""Prefixes that decoding sequences share, on Hopper: whether reading them once pays, the plan's buffers, the launch."""

import threading
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from .attention_config import DecodeConfig, choose_prefix
from .attention_kernels import has_prefix_kernel, prefix_kernel
from .cache import compile_together
from .cascade_plan import Cascade, Costs, PrefixPlan, most_prefix_segments, most_rows, plan_cascade, plan_prefix
from .kv_layout import KVLayout
from .paged_step import Ints, Share
from .step_buffers_sm90 import PrefixBuffers

# Fitted to 42 cells of 4 to 256 sequences, 256 to 4096 shared tokens and 512 of their own (H200, head_dim 128, GQA 4).
READ_BYTES_PER_US = 6_600_000  # of a prefix that each sequence reads for itself: the L2 cache serves all but the first
ROW_COST = {"int4": 5.0, "int8": 8.0, "fp8_e4m3": 7.0, "bf16": 4.0}  # Costs.row
MEMBER_US = 0.04  # of a sequence, in all its KV heads
STEP_US = 7.5


class SharedPrefixes:
    """What a decode step needs to read shared prefixes once; `members` sequences at a time."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self.buffers: dict[int, PrefixBuffers] = {}
        self.kernels: dict[DecodeConfig, Any] = {}
        self.compiling: set[DecodeConfig] = set()

    def config(self, queries: int, has_cap: bool) -> DecodeConfig:
        layout = self.layout
        return choose_prefix(layout.kv, layout.head_dim, queries, layout.block_size, has_cap, layout.zero_bias)

    def find(self, tables: Ints, stored: Ints, queries: int, share: Share = "auto") -> Cascade | None:
        """What decoding sequences should read together; None where that does not pay. See plan_cascade."""
        layout, members = self.layout, self.config(queries, False).members
        costs = Costs()
        if share != "always":
            block_us = layout.tile_bytes * layout.num_kv_heads / READ_BYTES_PER_US
            costs = Costs(ROW_COST[layout.kv], MEMBER_US / block_us, STEP_US / block_us)
        found = plan_cascade(tables, stored, layout.block_size, members, costs)
        if share == "always":
            return found
        return None if found is None or not self.is_ready(queries, False) else found

    def plan(self, cascade: Cascade, queries: int, multiprocessors: int, first_slot: int) -> PrefixPlan:
        config = self.config(queries, False)
        ctas = config.ctas_per_sm * multiprocessors
        least = 4 * config.stage_blocks
        return plan_prefix(
            cascade, self.layout.num_kv_heads, ctas, config.stage_blocks, 2 * config.stage_blocks, least, first_slot
        )

    def most_slots(self, room: int, queries: int, multiprocessors: int) -> int:
        """Partial results of a step of `room` sequences."""
        config = self.config(queries, False)
        ctas = config.ctas_per_sm * multiprocessors
        return config.members * most_prefix_segments(room, config.members, self.layout.num_kv_heads, ctas)

    def fill(
        self, room: int, cascade: Cascade, plan: PrefixPlan, rows: Ints, queries: int, multiprocessors: int, device: Any
    ) -> PrefixBuffers:
        """The plan on the device; rows [B]: tokens of the sequences' queries."""
        config = self.config(queries, False)
        if room not in self.buffers:
            ctas = config.ctas_per_sm * multiprocessors
            segments = most_prefix_segments(room, config.members, self.layout.num_kv_heads, ctas)
            self.buffers[room] = PrefixBuffers(most_rows(room, config.members), ctas, segments, config, device)
        self.buffers[room].fill(np.asarray(rows)[cascade.members], plan)
        return self.buffers[room]

    def is_ready(self, queries: int, has_cap: bool) -> bool:
        """The kernel is compiled; if not, it is being compiled now, and nobody waits for it."""
        config = self.config(queries, has_cap)
        if config in self.kernels:
            return True
        if has_prefix_kernel(config):
            self.kernels[config] = prefix_kernel(config)
            return True
        if config not in self.compiling:
            self.compiling.add(config)
            job = partial(compile_together, [partial(prefix_kernel, config)], 1)
            threading.Thread(target=job, name="atom-prefix-kernel", daemon=True).start()
        return False

    def __call__(
        self, q: Tensor, layer: Tensor, tables: Tensor, buffers: PrefixBuffers, partial: Tensor, lse: Tensor,
        scale: float, cap: float | None, is_early: int,
    ) -> None:  # fmt: skip
        """Partial results of all shared rows; q: uint32 [T, num_heads, head_dim / 2]."""
        queries = q.shape[1] // self.layout.num_kv_heads
        config = self.config(queries, cap is not None)
        if config not in self.kernels:
            self.kernels[config] = prefix_kernel(config)
        self.kernels[config](
            q, layer, tables, buffers.members, buffers.work, buffers.segments, partial, lse,
            scale if cap is None else scale / cap, 1.0 if cap is None else cap, is_early,
        )  # fmt: skip
