"""Attention of a step's prefill chunks on Hopper: blocks to dense keys and values, then torch's attention.

One launch of the gather kernel reads the blocks of all sequences with several queries, this step's tokens included,
since attention is over rounded keys. prefill_plan.py says which of torch's kernels follows. Query heads share keys as
they lie, and a sliding window reads no block that its queries do not see. With a recent window (recent_plan.py) the
exact keys near each query are attended over apart, and the two results are merged.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attention_config import GatherConfig
from .cache import load_kernel
from .dense_attention import AttentionSpec, attend_dense
from .kv_layout import KVLayout
from .merge_config import MergeConfig
from .merge_parts import Part, merge_into, merge_kernel
from .paged_attention import RopeTable
from .paged_step import PagedStep, RecentLayer
from .prefill_plan import SQUARE, PrefillPlan, RaggedPart, SquarePart, plan_prefill
from .recent_plan import RecentPlan, plan_recent
from .rotate import rotate
from .square_shapes import SquareShape, SquareShapes

ARCH = "sm_90a"


@dataclass(frozen=True)
class PlanOnDevice:
    """A plan, and what kernels read of it: int32 tiles [N, 4], and of its ragged part cu_seqlens and tokens."""

    plan: PrefillPlan
    tiles: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    tokens: slice | Tensor

    @cached_property
    def positions(self) -> Tensor:
        """Of the keys in dense rows; only key offsets need them."""
        return torch.from_numpy(self.plan.positions).to(self.tiles.device)


def on_device(plan: PrefillPlan, device: torch.device) -> PlanOnDevice:
    """Bring what kernels read of a plan to the device, without waiting for what runs there."""
    ragged = plan.ragged
    ends = [np.zeros(1, dtype=np.int32)] * 2 if ragged is None else [ragged.cu_seqlens_q, ragged.cu_seqlens_k]
    joined = _copy(np.concatenate((plan.tiles.ravel(), *ends)), device)
    tiles, *both = joined.split([plan.tiles.size, *(len(x) for x in ends)])
    tokens: slice | Tensor = slice(0, 0)
    if ragged is not None:
        tokens = ragged.tokens if isinstance(ragged.tokens, slice) else _copy(ragged.tokens, device)
    return PlanOnDevice(plan, tiles.view(-1, 4), both[0], both[1], tokens)


def _copy(array: np.ndarray, device: torch.device) -> Tensor:
    on_host = torch.from_numpy(array)
    if device.type != "cuda" or not array.size:
        return on_host.to(device)
    return on_host.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class RecentOnDevice:
    """A RecentPlan, and what is read of it on the device."""

    plan: RecentPlan
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    tokens: slice | Tensor
    ring_rows: Tensor
    order: Tensor | None
    far: PlanOnDevice | None


def recent_on_device(plan: RecentPlan, device: torch.device) -> RecentOnDevice:
    """Bring what is read of a plan to the device, without waiting for what runs there."""
    near, far = plan.near, None if plan.far is None else on_device(plan.far, device)
    ends = _copy(np.concatenate((near.cu_seqlens_q, near.cu_seqlens_k)), device).split(len(near.cu_seqlens_q))
    tokens = near.tokens if isinstance(near.tokens, slice) else _copy(near.tokens, device)
    order = None if plan.order is None else _copy(plan.order, device)
    return RecentOnDevice(plan, ends[0], ends[1], tokens, _copy(plan.ring_rows, device), order, far)


def exact_rows(chunks: RecentOnDevice, recent: RecentLayer) -> Tensor:
    """Exact keys and values of the chunks, chunk by chunk: [n, 2, num_kv_heads, head_dim]."""
    own = recent.scratch[chunks.tokens]
    if not len(chunks.ring_rows):
        return own
    both = torch.cat((recent.ring.index_select(0, chunks.ring_rows), own))
    return both if chunks.order is None else both.index_select(0, chunks.order)


Planned = PlanOnDevice | RecentOnDevice


class Prefill:
    """Prefill attention over caches of one layout.

    is_invariant  a chunk's result must not depend on the others of its step
    """

    def __init__(self, layout: KVLayout, is_invariant: bool = False) -> None:
        self.layout = layout
        self.is_invariant = is_invariant
        self.config = GatherConfig(layout.kv, layout.head_dim, layout.block_size, zero_bias=layout.zero_bias)
        self.kernel: Any = None
        self.is_warm = False
        self.shapes = SquareShapes()

    def load(self) -> None:
        """Have the gather kernel ready before the first prompt comes."""
        if self.kernel is None:
            self.kernel = gather_kernel(self.config)

    def warm_up(self, num_heads: int, device: torch.device) -> None:
        """Have all of it ready: the first square of a process waits 0.8 s for cuDNN to be loaded."""
        self.load()
        if self.is_warm or device.type != "cuda":
            return
        for has_places in (False, True):
            merge_kernel(MergeConfig(self.layout.head_dim, has_places))
        self.is_warm = self.is_invariant
        if self.is_warm:
            return
        dim, heads = self.layout.head_dim, self.layout.num_kv_heads
        q, kv = (torch.zeros(1, n, SQUARE, dim, dtype=torch.bfloat16, device=device) for n in (num_heads, heads))
        dense_attention(q, kv, kv, True, 1.0)
        self.shapes.prepared(SquareShape(1, SQUARE, SQUARE, SQUARE))
        self.is_warm = True

    def plan(self, step: PagedStep, window: int | None, num_heads: int, has_cap: bool = False) -> Planned | None:
        """The step's chunks, made once for each window; None if no sequence prefills."""
        return step.derive(("prefill", window, has_cap), lambda: self._plan(step, window, num_heads, has_cap))

    def _plan(self, step: PagedStep, window: int | None, num_heads: int, has_cap: bool) -> Planned | None:
        flops = 4 * num_heads * self.layout.head_dim
        allows_squares = not self.is_invariant and not has_cap
        self.shapes.begin_step()
        if step.recent is not None:
            recent = plan_recent(step, window, self.layout.block_size, flops, allows_squares, self.shapes.takes)
            return None if recent is None else recent_on_device(recent, step.slots.device)
        plan = plan_prefill(step, window, self.layout.block_size, flops, allows_squares, self.shapes.takes)
        return None if plan is None else on_device(plan, step.slots.device)

    def __call__(
        self, q: Tensor, layer: Tensor, chunks: Planned, spec: AttentionSpec, out: Tensor,
        table: RopeTable | None = None, recent: RecentLayer | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of the chunks' queries, in the places of `out` [T, num_heads, head_dim] that are theirs.

        Returns `out`, or a tensor that stands for it where one launch gave all of it.
        """
        self.shapes.count_layer()
        if isinstance(chunks, RecentOnDevice):
            assert recent is not None and table is None, "a recent window comes with its layer and no offsets"
            return self._attend_recent(q, layer, chunks, spec, out, recent)
        plan = chunks.plan
        is_one = plan.is_all and len(plan.squares) + (plan.ragged is not None) == 1
        for part in self.parts(q, layer, chunks, spec, spec.window, table):
            if is_one:
                return part.out
            out[part.tokens] = part.out
        return out

    def parts(
        self, q: Tensor, layer: Tensor, chunks: PlanOnDevice, spec: AttentionSpec, window: int | None,
        table: RopeTable | None = None, wants_sums: bool = False,
    ) -> Iterator[Part]:  # fmt: skip
        """Attention of a plan's queries, part by part; arguments as in __call__, `window` instead of the spec's."""
        keys, values = self.gather(layer, chunks)
        plan = chunks.plan
        if spec.key_offset is not None:
            assert table is not None, "offsets that are turned on reading need a table"
            positions = chunks.positions
            offset = spec.key_offset.to(keys.dtype).expand(keys.shape)
            keys = keys + rotate(offset, table.cos[positions], table.sin[positions])
        if plan.ragged is not None:
            ends = (chunks.cu_seqlens_q, chunks.cu_seqlens_k)
            own = q[chunks.tokens]
            yield Part(chunks.tokens, *attend_ragged(own, keys, values, plan.ragged, ends, spec, window, wants_sums))
        for square in plan.squares:
            own = q[square.tokens]
            yield Part(square.tokens, *attend_square(own, keys, values, square, spec.scale, wants_sums))

    def _attend_recent(
        self, q: Tensor, layer: Tensor, chunks: "RecentOnDevice", spec: AttentionSpec, out: Tensor, recent: RecentLayer
    ) -> Tensor:
        """Two parts, merged by their sums: the exact keys of the window, and the rounded ones before it."""
        plan, own = chunks.plan, q[chunks.tokens]
        exact = exact_rows(chunks, recent)  # [n, 2, num_kv_heads, head_dim]
        ends = (chunks.cu_seqlens_q, chunks.cu_seqlens_k)
        near, sums = attend_ragged(own, exact[:, 0], exact[:, 1], plan.near, ends, spec, plan.tokens_exact, True)
        assert sums is not None
        if chunks.far is not None:
            for part in self.parts(own, layer, chunks.far, spec, plan.far_window, wants_sums=True):
                merge_into(near, sums, part)
        if plan.is_all:
            return near
        out[chunks.tokens] = near
        return out

    def gather(self, layer: Tensor, chunks: PlanOnDevice) -> tuple[Tensor, Tensor]:
        """Dense keys and values of the chunks, bfloat16 [num_rows, num_kv_heads, head_dim] each."""
        self.load()
        shape = (2, chunks.plan.num_rows, self.layout.num_kv_heads, self.layout.head_dim)
        both = torch.empty(shape, dtype=torch.bfloat16, device=layer.device)
        words = both.view(torch.int32).view(torch.uint32)
        self.kernel(layer, chunks.tiles, words[0], words[1])
        return both[0], both[1]


def attend_ragged(
    q: Tensor, keys: Tensor, values: Tensor, part: RaggedPart, ends: tuple[Tensor, Tensor], spec: AttentionSpec,
    window: int | None, wants_sums: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Causal attention of each chunk over its own keys, whose last one belongs to its last query.

    q             bfloat16 [T, num_heads, head_dim]
    keys, values  bfloat16 [num_rows, num_kv_heads, head_dim]
    ends          the part's cu_seqlens_q and cu_seqlens_k, on the device
    window        sliding window, instead of the spec's
    returns a Part's out and sums
    Capped scores, which torch's kernels do not know, are computed chunk by chunk; so is everything on a CPU.
    """
    if spec.soft_cap is not None or q.device.type != "cuda":
        out, sums, spec = torch.empty_like(q), [], replace(spec, window=window)
        for start, end, first, last in zip(
            part.cu_seqlens_q[:-1], part.cu_seqlens_q[1:], part.cu_seqlens_k[:-1], part.cu_seqlens_k[1:], strict=True
        ):
            seen = slice(first, last)
            own, k, v = (x.transpose(0, 1)[None] for x in (q[start:end], keys[seen], values[seen]))
            out[start:end] = attend_dense(own, k, v, spec)[0].transpose(0, 1)
            if wants_sums:
                sums.append(log_sums(own, k, spec)[0])
        return out, torch.cat(sums, 1) if wants_sums else None
    left = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    found, sums = torch.ops.aten._flash_attention_forward(
        q, keys, values, *ends, *part.most, 0.0, True, False, scale=spec.scale, **left
    )[:2]
    return found, sums if wants_sums else None


def log_sums(q: Tensor, k: Tensor, spec: AttentionSpec) -> Tensor:
    """log(sum(exp(scores))) of attend_dense, without a cap: float32 [batch, num_heads, seq]."""
    seq, length = q.shape[2], k.shape[2]
    scores = q.float() @ k.float().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * spec.scale
    distance = torch.arange(length - seq, length, device=q.device)[:, None] - torch.arange(length, device=q.device)
    hidden = (distance < 0) if spec.window is None else (distance < 0) | (distance >= spec.window)
    return scores.masked_fill(hidden, float("-inf")).logsumexp(-1)


def attend_square(
    q: Tensor, keys: Tensor, values: Tensor, part: SquarePart, scale: float, wants_sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of equal chunks; arguments and result as in attend_ragged."""
    k, v = (_rows(x, part, is_prefix=False).transpose(1, 2) for x in (keys, values))  # [count, heads, side, D]
    own = q.unflatten(0, (part.count, part.queries))
    filled = own
    if part.side != part.queries:
        filled = own.new_empty(part.count, part.side, *own.shape[2:])
        filled[:, part.filling : part.filling + part.queries] = own
    chosen = slice(part.filling, part.filling + part.queries)
    out, lse = dense_attention(filled.transpose(1, 2), k, v, True, scale)
    out, sums = _own(out, lse, chosen)
    if part.prefix:
        k, v = (_rows(x, part, is_prefix=True).transpose(1, 2) for x in (keys, values))
        before, seen = _own(*dense_attention(filled.transpose(1, 2), k, v, False, scale), chosen)
        out = out.contiguous()
        merge_into(out, sums, Part(slice(None), before, seen))
        sums = torch.logaddexp(sums, seen) if wants_sums else sums
    return out, sums if wants_sums else None


def _own(out: Tensor, lse: Tensor, chosen: slice) -> tuple[Tensor, Tensor]:
    """Results [n, heads, D] and sums [heads, n] of the chunks' queries in squares [count, heads, side, ...]."""
    return out.transpose(1, 2)[:, chosen].flatten(0, 1), lse[:, :, chosen].transpose(0, 1).flatten(1)


def _rows(x: Tensor, part: SquarePart, is_prefix: bool) -> Tensor:
    """Dense rows of a part's chunks, of their prefixes or of the rest: [count, rows, heads, D].

    One chunk's are cut out before they get their first dimension, whose stride cuDNN would take for a new shape.
    """
    apart = part.prefix + part.side
    own = slice(0, part.prefix) if is_prefix else slice(part.prefix, apart)
    if part.count == 1:
        return x[part.first + own.start : part.first + own.stop].unsqueeze(0)
    return x[part.first : part.first + part.count * apart].view(part.count, apart, *x.shape[1:])[:, own]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """cuDNN's attention, [batch, heads, rows, head_dim], and log(sum(exp(scores))), [batch, heads, rows]."""
    if q.device.type != "cuda":
        groups = q.shape[1] // k.shape[1]
        scores = q.float() @ k.float().repeat_interleave(groups, 1).mT * scale
        if is_causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
        return (scores.softmax(-1) @ v.float().repeat_interleave(groups, 1)).to(q.dtype), scores.logsumexp(-1)
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, is_causal, False, scale=scale
    )[:2]
    return out, lse.view(out.shape[:3])


def gather_kernel(config: GatherConfig) -> Any:
    """The compiled kernel of a config, from memory, disk or compiled now."""

    def compile() -> Any:
        from .kv_gather_sm90 import compile_gather

        return compile_gather(config)

    return load_kernel("kv_gather_sm90", config, compile, ARCH)
