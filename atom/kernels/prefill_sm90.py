"""Attention of a step's prefill chunks on Hopper: blocks to dense keys and values, then torch's attention.

One launch of the gather kernel reads the blocks of all sequences with several queries, this step's tokens included,
since attention is over rounded keys. prefill_plan.py says which of torch's kernels follows. Query heads share keys as
they lie, and a sliding window reads no block that its queries do not see.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attention_config import GatherConfig
from .cache import load_kernel
from .dense_attention import AttentionSpec, attend_dense
from .kv_layout import KVLayout
from .paged_attention import RopeTable
from .paged_step import PagedStep
from .prefill_plan import SQUARE, PrefillPlan, RaggedPart, SquarePart, plan_prefill
from .rotate import rotate

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
    return on_host if device.type != "cuda" else on_host.pin_memory().to(device, non_blocking=True)


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

    def load(self) -> None:
        """Have the gather kernel ready before the first prompt comes."""
        if self.kernel is None:
            self.kernel = gather_kernel(self.config)

    def warm_up(self, num_heads: int, device: torch.device) -> None:
        """Have all of it ready: the first square of a process waits 0.8 s for cuDNN to be loaded."""
        self.load()
        if self.is_warm or self.is_invariant or device.type != "cuda":
            return
        dim, heads = self.layout.head_dim, self.layout.num_kv_heads
        q, kv = (torch.zeros(1, n, SQUARE, dim, dtype=torch.bfloat16, device=device) for n in (num_heads, heads))
        dense_attention(q, kv, kv, True, 1.0)
        self.is_warm = True

    def plan(self, step: PagedStep, window: int | None, num_heads: int, has_cap: bool = False) -> PlanOnDevice | None:
        """The step's chunks, made once for each window; None if no sequence prefills."""
        return step.derive(("prefill", window, has_cap), lambda: self._plan(step, window, num_heads, has_cap))

    def _plan(self, step: PagedStep, window: int | None, num_heads: int, has_cap: bool) -> PlanOnDevice | None:
        flops = 4 * num_heads * self.layout.head_dim
        allows_squares = not self.is_invariant and not has_cap
        plan = plan_prefill(step, window, self.layout.block_size, flops, allows_squares)
        return None if plan is None else on_device(plan, step.slots.device)

    def __call__(
        self, q: Tensor, layer: Tensor, chunks: PlanOnDevice, spec: AttentionSpec, out: Tensor,
        table: RopeTable | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of the chunks' queries, in the places of `out` [T, num_heads, head_dim] that are theirs.

        Returns `out`, or a tensor that stands for it where one launch gave all of it.
        """
        keys, values = self.gather(layer, chunks)
        plan = chunks.plan
        if spec.key_offset is not None:
            assert table is not None, "offsets that are turned on reading need a table"
            positions = chunks.positions
            offset = spec.key_offset.to(keys.dtype).expand(keys.shape)
            keys = keys + rotate(offset, table.cos[positions], table.sin[positions])
        is_one = plan.is_all and len(plan.squares) + (plan.ragged is not None) == 1
        if plan.ragged is not None:
            found = attend_ragged(q[chunks.tokens], keys, values, plan.ragged, chunks, spec)
            if is_one:
                return found
            out[chunks.tokens] = found
        for part in plan.squares:
            found = attend_square(q[part.tokens], keys, values, part, spec.scale)
            if is_one:
                return found
            out[part.tokens] = found
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
    q: Tensor, keys: Tensor, values: Tensor, part: RaggedPart, chunks: PlanOnDevice, spec: AttentionSpec
) -> Tensor:
    """Causal attention of each chunk over its own keys, whose last one belongs to its last query.

    q             bfloat16 [T, num_heads, head_dim]
    keys, values  bfloat16 [num_rows, num_kv_heads, head_dim]
    Capped scores, which torch's kernels do not know, are computed chunk by chunk; so is everything on a CPU.
    """
    if spec.soft_cap is not None or q.device.type != "cuda":
        out = torch.empty_like(q)
        for start, end, first, last in zip(
            part.cu_seqlens_q[:-1], part.cu_seqlens_q[1:], part.cu_seqlens_k[:-1], part.cu_seqlens_k[1:], strict=True
        ):
            seen = slice(first, last)
            own, k, v = (x.transpose(0, 1)[None] for x in (q[start:end], keys[seen], values[seen]))
            out[start:end] = attend_dense(own, k, v, spec)[0].transpose(0, 1)
        return out
    window = {} if spec.window is None else {"window_size_left": spec.window - 1, "window_size_right": 0}
    found: Tensor = torch.ops.aten._flash_attention_forward(
        q, keys, values, chunks.cu_seqlens_q, chunks.cu_seqlens_k, int(np.diff(part.cu_seqlens_q).max()),
        int(np.diff(part.cu_seqlens_k).max()), 0.0, True, False, scale=spec.scale, **window,
    )[0]  # fmt: skip
    return found


def attend_square(q: Tensor, keys: Tensor, values: Tensor, part: SquarePart, scale: float) -> Tensor:
    """Causal attention of equal chunks; arguments and result as in attend_ragged."""
    rows = slice(part.first, part.first + part.count * (part.prefix + part.side))
    k, v = (x[rows].unflatten(0, (part.count, -1)).transpose(1, 2) for x in (keys, values))  # [count, heads, rows, D]
    own = q.unflatten(0, (part.count, part.queries))
    filled = own
    if part.side != part.queries:
        filled = own.new_empty(part.count, part.side, *own.shape[2:])
        filled[:, part.filling : part.filling + part.queries] = own
    chosen = slice(part.filling, part.filling + part.queries)
    out, lse = dense_attention(filled.transpose(1, 2), k[:, :, part.prefix :], v[:, :, part.prefix :], True, scale)
    out = out.transpose(1, 2)[:, chosen]  # [count, queries, heads, D]
    if part.prefix:
        full = slice(0, part.prefix)
        before, seen = dense_attention(filled.transpose(1, 2), k[:, :, full], v[:, :, full], False, scale)
        share = torch.sigmoid((seen - lse)[:, :, chosen]).transpose(1, 2)[..., None]  # of the prefix
        out = torch.lerp(out.float(), before.transpose(1, 2)[:, chosen].float(), share).to(q.dtype)
    return out.flatten(0, 1)


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
