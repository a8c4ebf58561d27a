"""Op paged_attention: causal attention of a step's queries over keys and values that lie in blocks.

The torch reference takes sequences with one query in groups of like length, and prefill chunks one by one. A group's
keys are padded to a length that follows from each sequence's own, so a decode's result is the same alone and in any
batch. Places beyond a sequence's last token are read (they are in its own last block) and replaced by zeros.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .attention_refusals_sm90 import refuses_attention
from .dense_attention import AttentionSpec, attend_capped, attend_dense
from .kv_layout import KVLayout
from .paged_step import Ints, PagedStep, RecentLayer, Share
from .recent_attention import attend_recent
from .registry import Implementation, Op
from .rotate import rotate

GATHER_ELEMENTS = 1 << 23  # keys that the reference reads at a time: 32 MB in float32


@dataclass(frozen=True)
class RopeTable:
    """cos and sin [P, head_dim / 2] (float32) at positions 0 ... P - 1, for what is turned when it is read."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences of one query each that are attended over together.

    rows       int64 [B], their query tokens
    tiles      int64 [num_kv_heads, B, n], where their keys and values lie (KVLayout.gather); a sequence's last block is
               repeated to fill up
    visible    bool [B, n * block_size]
    hidden     int64 [H] each: row and column of what is not visible
    positions  int64 [B, n * block_size], of the keys
    newest     int64 [N] each, where the step has a recent window: row and column of what is read exactly, and where it
               lies in the ring store; else None
    """

    rows: Tensor
    tiles: Tensor
    visible: Tensor
    hidden: tuple[Tensor, Tensor]
    positions: Tensor
    newest: tuple[Tensor, Tensor, Tensor] | None = None


def padded_blocks(num_blocks: Ints) -> Ints:
    """Numbers of blocks rounded up to at most four steps an octave, each from its own number alone."""
    octave = np.floor(np.log2(np.maximum(num_blocks, 1))).astype(np.int64)
    step = np.maximum(1, 2**octave // 4)
    return -(-num_blocks // step) * step


def decode_groups(step: PagedStep, window: int | None, layout: KVLayout) -> list[DecodeGroup]:
    """The step's sequences with exactly one query, in groups whose keys have one padded length and a bounded size."""
    size = layout.block_size
    ones = np.flatnonzero(step.counts == 1)
    lengths = step.seqlens_k[ones].astype(np.int64)
    firsts = np.zeros_like(lengths) if window is None else np.maximum(0, lengths - window)  # first key seen
    first_blocks = firsts // size
    last_blocks = (lengths - 1) // size
    padded = padded_blocks(last_blocks - first_blocks + 1)
    groups = []
    for width in np.unique(padded):
        members = np.flatnonzero(padded == width)
        most = max(1, GATHER_ELEMENTS // int(width * size * layout.num_kv_heads * layout.head_dim))
        for start in range(0, len(members), most):
            part = members[start : start + most]
            index = np.minimum(first_blocks[part, None] + np.arange(width), last_blocks[part, None])
            positions = first_blocks[part, None] * size + np.arange(width * size)
            visible = (positions >= firsts[part, None]) & (positions < lengths[part, None])
            arrays = (
                step.cu_seqlens_q[ones[part]].astype(np.int64),
                step.tables[ones[part, None], index].astype(np.int64),
                visible,
                *np.nonzero(~visible),
                np.minimum(positions, lengths[part, None] - 1),
            )
            rows, blocks, seen, row, column, places = (torch.from_numpy(a).to(step.slots.device) for a in arrays)
            newest = _newest(step, ones[part], positions, lengths[part])
            groups.append(DecodeGroup(rows, layout.tile_rows(blocks), seen, (row, column), places, newest))
    return groups


def _newest(step: PagedStep, members: Ints, positions: Ints, lengths: Ints) -> tuple[Tensor, Tensor, Tensor] | None:
    """DecodeGroup.newest of the sequences `members`, whose keys stand at `positions` [B, L]."""
    recent = step.recent
    if recent is None:
        return None
    row, column = np.nonzero((positions >= lengths[:, None] - recent.tokens) & (positions < lengths[:, None]))
    places, rings = positions[row, column], recent.rings_host[members][row]
    exact = np.where(
        rings >= 0, rings + places % recent.capacity, ~rings + places - np.maximum(0, lengths[row] - recent.tokens)
    )
    a, b, c = (torch.from_numpy(x.astype(np.int64)).to(step.slots.device) for x in (row, column, exact))
    return a, b, c


class PagedAttentionReference:
    """The op in torch, on any device. `split_tokens` changes nothing: its results never depend on the batch."""

    def __init__(
        self, layout: KVLayout, pre_rope: bool = False, split_tokens: int | None = None, has_offset: bool = False
    ) -> None:
        self.layout = layout
        self.pre_rope = pre_rope

    def prepare(self, step: PagedStep, windows: Iterable[int | None], queries: int, share: Share = "auto") -> bool:
        """Nothing to do before the first layer; each sequence reads its prefix for itself."""
        return False

    def __call__(
        self, q: Tensor, layer: Tensor, step: PagedStep, spec: AttentionSpec, table: RopeTable | None = None,
        recent: RecentLayer | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of a step's queries.

        q       [T, num_heads, head_dim]   turned
        layer   uint8, KVLayout.shape: this step's keys and values are in it
        spec    key_offset (before RoPE) is what was taken off the stored keys, or None
        table   over all positions of the step, where keys or offsets are turned on reading; else None
        recent  exact keys and values, where the step has a recent window
        returns [T, num_heads, head_dim]
        """
        out = torch.empty_like(q)
        for group in step.derive(("groups", spec.window), lambda: decode_groups(step, spec.window, self.layout)):
            out[group.rows] = self._decode(q[group.rows], layer, group, spec, table, recent)
        self.attend_chunks(q, layer, step, spec, table, out, recent)
        return out

    def attend_chunks(
        self, q: Tensor, layer: Tensor, step: PagedStep, spec: AttentionSpec, table: RopeTable | None, out: Tensor,
        recent: RecentLayer | None = None,
    ) -> None:  # fmt: skip
        """The part of sequences with several queries, into `out`."""
        for index in np.flatnonzero(step.counts > 1):
            start, end = int(step.cu_seqlens_q[index]), int(step.cu_seqlens_q[index + 1])
            length = int(step.seqlens_k[index])
            exact = None if recent is None else _exact(step, recent, int(index))
            out[start:end] = self._chunk(q[start:end], layer, step.block_tables[index], length, spec, table, exact)

    def _decode(
        self, q: Tensor, layer: Tensor, group: DecodeGroup, spec: AttentionSpec, table: RopeTable | None,
        recent: RecentLayer | None,
    ) -> Tensor:  # fmt: skip
        layout = self.layout
        tiles = layout.gather(layer, group.tiles)  # [num_kv_heads, B, n, tile_bytes]
        both = (layout.read(tiles, part).flatten(2, 3) for part in (0, 1))
        keys, values = (x.to(q.dtype) for x in both)  # [num_kv_heads, B, L, head_dim]
        for x in (keys, values):  # copies already
            x[:, group.hidden[0], group.hidden[1]] = 0.0  # what was never written may be NaN
        if recent is not None and group.newest is not None:
            row, column, exact = group.newest
            for part, x in enumerate((keys, values)):
                x[:, row, column] = recent.ring[exact, part].transpose(0, 1)
        keys = self._finish(keys.movedim(0, 2), group.positions, spec.key_offset, table).movedim(2, 0)
        heads = q.unflatten(1, (layout.num_kv_heads, -1)).transpose(0, 1)  # [num_kv_heads, B, queries per KV head, D]
        seen = group.visible[:, None]  # [B, 1, L]
        if spec.soft_cap is not None:
            out = attend_capped(heads, keys, values, spec.scale, spec.soft_cap, seen)
        else:
            out = functional.scaled_dot_product_attention(heads, keys, values, attn_mask=seen, scale=spec.scale)
        return out.transpose(0, 1).flatten(1, 2)

    def _chunk(
        self, q: Tensor, layer: Tensor, blocks: Tensor, length: int, spec: AttentionSpec, table: RopeTable | None,
        exact: tuple[Tensor, int] | None,
    ) -> Tensor:  # fmt: skip
        layout, size = self.layout, self.layout.block_size
        first = 0 if spec.window is None else max(0, length - q.shape[0] - spec.window + 1) // size
        rows = layout.tile_rows(blocks[first : -(-length // size)])
        tiles = layout.gather(layer, rows)  # [num_kv_heads, n, tile_bytes]
        both = (layout.read(tiles, part).flatten(1, 2)[:, : length - first * size] for part in (0, 1))
        keys, values = (x.to(q.dtype) for x in both)
        positions = torch.arange(first * size, length, device=q.device)
        keys = self._finish(keys.transpose(0, 1), positions, spec.key_offset, table).transpose(0, 1)
        own, keys, values = q.transpose(0, 1)[None], keys[None], values[None]
        if exact is not None:
            newest, tokens = exact
            exact_keys, exact_values = (newest[:, part].transpose(0, 1)[None] for part in (0, 1))
            return attend_recent(own, keys, values, exact_keys, exact_values, spec, tokens)[0].transpose(0, 1)
        return attend_dense(own, keys, values, spec)[0].transpose(0, 1)

    def _finish(self, keys: Tensor, positions: Tensor, offset: Tensor | None, table: RopeTable | None) -> Tensor:
        """Stored keys [..., L, num_kv_heads, head_dim] at `positions` [..., L] -> turned, the offset in them."""
        if offset is None and not self.pre_rope:
            return keys
        assert table is not None, "keys or offsets that are turned on reading need a table"
        cos, sin = table.cos[positions], table.sin[positions]
        if offset is None:
            return rotate(keys, cos, sin)
        offset = offset.to(keys.dtype)
        if self.pre_rope:
            return rotate(keys + offset, cos, sin)
        return keys + rotate(offset.expand(keys.shape), cos, sin)


def _exact(step: PagedStep, recent: RecentLayer, index: int) -> tuple[Tensor, int]:
    """Exact keys and values of chunk `index` and of the tokens before it that its queries still read exactly.

    Returns [n, 2, num_kv_heads, head_dim], and the tokens of the recent window.
    """
    window = step.recent
    assert window is not None and not window.is_direct, "a chunk's own tokens lie in the scratch"
    start, end = int(step.cu_seqlens_q[index]), int(step.cu_seqlens_q[index + 1])
    first = int(step.seqlens_k[index]) - (end - start)
    before = torch.arange(max(0, first - window.tokens + 1), first, device=recent.ring.device) % window.capacity
    kept = recent.ring[int(window.rings_host[index]) + before]
    return torch.cat((kept, recent.scratch[start:end])), window.tokens


PAGED_ATTENTION = Op(
    name="paged_attention",
    formula="softmax(soft_cap(scale * q @ (keys + rope(offset)).T)) @ values, causal, over each sequence's blocks",
    reference=PagedAttentionReference,
    implementations=(
        Implementation("paged_decode_sm90", "atom.kernels.attention_sm90:PagedAttentionSm90", refuses_attention),
    ),
)
