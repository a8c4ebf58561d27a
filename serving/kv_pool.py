"""The paged KV cache: storage of all layers' blocks, and the cache that a model sees for one step.

KVPool is memory and nothing else: which block belongs to whom is the block manager's business, how a block lies in
bytes that of atom/kernels/kv_layout.py. PagedKV implements the KV protocol of atom/models/kv.py over a pool: `begin`
takes a step's batch, then the model runs once. A layer's keys and values of the step are stored before it attends.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atom.errors import UnsupportedError
from atom.kernels.dense_attention import AttentionSpec
from atom.kernels.kv_layout import KVLayout
from atom.kernels.paged_attention import PAGED_ATTENTION, RopeTable
from atom.kernels.paged_step import Ints, PagedStep, RecentStep, Share
from atom.kernels.registry import Choice, Kernels, Problem, device_arch
from atom.kernels.rope_append import ROPE_APPEND_KV
from atom.models.config import ModelConfig
from atom.models.kv import SOFT_CAP, refuse_recent
from atom.models.rope import RopeConfig, Rotation
from atom.quant.schemes import Scheme

from .batch import Batch
from .recent import LayerRun, RecentRoom, RecentTokens


def kv_layouts(config: ModelConfig, scheme: Scheme | None, dtype: torch.dtype, block_size: int) -> list[KVLayout]:
    """The layout of each layer's cache. Raises UnsupportedError for a cache format that cannot be paged."""
    specs = [None if scheme is None else scheme.kv_of(layer) for layer in range(config.num_layers)]
    made = {spec: KVLayout(spec, dtype, config.num_kv_heads, config.head_dim, block_size) for spec in set(specs)}
    return [made[spec] for spec in specs]


def bytes_per_block(config: ModelConfig, scheme: Scheme | None, dtype: torch.dtype, block_size: int) -> int:
    """Bytes of one block in all layers, scales and filling included: what a pool of one block takes."""
    return sum(layout.block_bytes for layout in kv_layouts(config, scheme, dtype, block_size))


def _has_key_offset(config: ModelConfig, scheme: Scheme | None) -> bool:
    """Some layer's keys have an offset: the stored mean, or their projection's bias with no norm behind it."""
    if scheme is None or scheme.kv_offset not in ("bias", "mean"):
        return False
    return scheme.kv_offset == "mean" or (config.qkv_bias and not config.qk_norm)


class KVPool:
    """The keys and values of all layers in `num_blocks` blocks of `block_size` tokens, in one allocation.

    layouts  of each layer; its contents are undefined until written
    dtype    of the model: keys and values come and go in it, and a cache in full precision keeps it
    room     for the exact tokens beside the blocks, where the scheme has a recent window
    recent   these tokens; None without such a window
    """

    def __init__(
        self,
        config: ModelConfig,
        scheme: Scheme | None,
        num_blocks: int,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        room: RecentRoom | None = None,
    ) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}; give the KV cache more memory.")
        self.config = config
        self.scheme = scheme
        self.layouts = kv_layouts(config, scheme, dtype, block_size)
        self.dtype = dtype
        self.num_blocks = num_blocks
        self.block_size = block_size
        sizes = [num_blocks * layout.block_bytes for layout in self.layouts]
        self._memory = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        parts = self._memory.split(sizes)
        self._layers: list[Tensor] = [
            part.view(layout.shape(num_blocks)) for part, layout in zip(parts, self.layouts, strict=True)
        ]
        self.recent: RecentTokens | None = None
        if scheme is not None and scheme.kv_recent:
            refuse_recent(config, scheme.kv_recent)
            assert room is not None, "a recent window needs to know how many sequences there are"
            self.recent = RecentTokens(config, scheme.kv_recent, room, dtype, device)

    @property
    def device(self) -> torch.device:
        return self._memory.device

    @property
    def num_bytes(self) -> int:
        """Of blocks and exact tokens."""
        return self._memory.numel() + (0 if self.recent is None else self.recent.num_bytes)

    @property
    def token_bytes(self) -> float:
        """Of a token in the blocks of one layer, the mean over layers."""
        return self._memory.numel() / (self.num_blocks * self.block_size * len(self.layouts))

    def layer(self, index: int) -> Tensor:
        """uint8 [num_blocks, num_kv_heads, tile_bytes] of layer `index`."""
        return self._layers[index]

    def runs(self) -> list[LayerRun]:
        """Neighbouring layers of one layout together."""
        found: list[LayerRun] = []
        start = 0
        for layout, group in groupby(self.layouts):
            first, count = sum(run.count for run in found), len(list(group))
            end = start + count * self.num_blocks * layout.block_bytes
            memory = self._memory[start:end].view(layout.shape(count * self.num_blocks))
            found.append(LayerRun(layout, first, count, self.num_blocks, memory))
            start = end
        return found


@dataclass
class _Ops:
    """What stores keys and values of layers of one layout, and attends over them."""

    append: Any
    attend: Any


@dataclass(frozen=True)
class DeviceArrays:
    """Those arrays of a Batch that attention reads on the device; a runner may keep them in buffers of its own.

    slots         int64 [T]
    block_tables  int32 [B, max blocks]
    lengths       int32 [B], tokens to attend over, where every sequence has one query; None: attention brings them
    rings         int32 [B], see RecentStep, and
    exact_slots   int64 [T], its slots, filled before the step runs; None: they are brought if they are needed
    """

    slots: Tensor
    block_tables: Tensor
    lengths: Tensor | None = None
    rings: Tensor | None = None
    exact_slots: Tensor | None = None

    @staticmethod
    def of(batch: Batch, device: torch.device) -> "DeviceArrays":
        return DeviceArrays(
            torch.from_numpy(batch.slots).to(device, non_blocking=True),
            torch.from_numpy(batch.block_tables).to(device, non_blocking=True),
        )


class PagedKV:
    """The cache of one step at a time: `begin(batch)`, then `model(token_ids, positions, kv)`.

    What is stored equals DenseKV's bit for bit, and attention to float rounding. Raises UnsupportedError when it is
    made if no implementation runs the cache's format there.

    split_tokens  long sequences are attended over in parts of so many tokens, whatever else is in the batch: results
                  do not depend on it. None: as is fastest (on a CPU they never depend on it)
    """

    takes_norms = True

    def __init__(self, pool: KVPool, kernels: Kernels = "auto", split_tokens: int | None = None) -> None:
        config, scheme = pool.config, pool.scheme
        self.pool = pool
        self.pre_rope = scheme is not None and scheme.kv is not None and scheme.kv_pre_rope
        self.offset_apart = scheme is not None and scheme.kv is not None and scheme.kv_offset in ("bias", "mean")
        self.centred = scheme is not None and scheme.stores_key_centre
        rotates = scheme is not None and scheme.rotates_keys
        if self.centred and config.attention_soft_cap is not None:
            raise UnsupportedError(SOFT_CAP)
        if self.pre_rope and any(rope.kind == "dynamic" for rope in config.ropes):
            raise UnsupportedError(
                "a paged KV cache of keys before dynamic RoPE is not supported: the angles of stored keys would change "
                "with the text's length; use a scheme with kv_pre_rope=False."
            )
        has_offset = self.offset_apart and _has_key_offset(config, scheme)
        self.choices: tuple[Choice, ...] = ()
        self._ops: list[_Ops] = []  # one for each layout
        layouts = list(dict.fromkeys(pool.layouts))
        self._kinds = [layouts.index(layout) for layout in pool.layouts]  # of each layer, its place in `_ops`
        for layout in layouts:
            problem = Problem(
                device_arch(pool.device),
                kv=layout.spec,
                head_dim=config.head_dim,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                block_size=pool.block_size,
                kv_pre_rope=self.pre_rope,
                kv_centred=self.centred,
                kv_rotates=rotates,
                kv_recent=0 if pool.recent is None else pool.recent.tokens,
                dtype=str(pool.dtype).removeprefix("torch."),
            )
            chosen = (ROPE_APPEND_KV.choose(problem, kernels), PAGED_ATTENTION.choose(problem, kernels))
            append = chosen[0].build(layout, self.pre_rope, rotates)
            attend = chosen[1].build(layout, self.pre_rope, split_tokens, has_offset)
            self._ops.append(_Ops(append, attend))
            self.choices += chosen
        self._recent: RecentStep | None = None  # of the step, where exact tokens are kept
        self._steps: list[PagedStep] = []  # one for each layout: what is derived from a step is of one
        self._tables: dict[RopeConfig, RopeTable] = {}

    def begin(
        self, batch: Batch, arrays: DeviceArrays | None = None, share: Share = "auto", in_pieces: bool = False
    ) -> bool:
        """Take the next step's batch. `arrays` holds what lies on the device already; by default it is copied.

        in_pieces  what stores was captured over another step: exact tokens take the way that serves all
        Returns whether decodes that begin with the same blocks read them together: then other kernels are launched, so
        that a graph captured over a step replays steps of its own kind only.
        """
        arrays = DeviceArrays.of(batch, self.pool.device) if arrays is None else arrays
        self._recent = None
        if self.pool.recent is not None:
            self._recent = self._begin_recent(self.pool.recent, batch, arrays, in_pieces)
        shares = self._prepare(batch, arrays, share)
        if any(shares) and not all(shares):  # a graph replays either kind: caches of two formats have to agree
            shares = self._prepare(batch, arrays, "never")
        return any(shares)

    def _begin_recent(self, recent: RecentTokens, batch: Batch, arrays: DeviceArrays, in_pieces: bool) -> RecentStep:
        if batch.inherited is not None:
            recent.inherit(batch.inherited, self.pool.runs())
        is_decode = batch.num_decodes == batch.num_seqs
        is_direct = not in_pieces and (is_decode or bool((np.diff(batch.cu_seqlens_q) <= 1).all()))
        assert is_direct or batch.ahead is None, "a row has one token"
        return recent.step(batch, arrays.rings, arrays.exact_slots, is_direct)

    @property
    def rings(self) -> Ints | None:
        """RecentStep.rings of the step that has begun, on the host; None without a recent window."""
        return None if self._recent is None else self._recent.rings_host

    def finish(self) -> None:
        """To be called behind a step whose tokens were rows."""
        if self.pool.recent is not None:
            self.pool.recent.finish()

    def _prepare(self, batch: Batch, arrays: DeviceArrays, share: Share) -> list[bool]:
        """A step for each layout; whether decodes read beginnings together there."""
        config, shares = self.pool.config, []
        self._steps = []
        for ops in self._ops:
            step = PagedStep(
                batch.cu_seqlens_q,
                batch.seqlens_k,
                batch.block_tables,
                arrays.slots,
                arrays.block_tables,
                batch.ahead,
                arrays.lengths,
                self._recent,
            )
            shares.append(ops.attend.prepare(step, config.windows, config.queries_per_kv, share))
            self._steps.append(step)
        return shares

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, spec: AttentionSpec) -> Tensor:
        """See KV.attend; the T tokens are those of the batch that `begin` took."""
        step = self._step(layer)
        assert q.shape[0] == step.num_tokens, f"{q.shape[0]} queries came for a batch of {step.num_tokens} tokens"
        if rotation.rope.config.kind == "dynamic":
            rotation = self._by_length(step, rotation)
        return self.attend_stored(layer, self.store(layer, q, k, v, rotation, spec, step.slots), rotation, spec)

    def store(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, spec: AttentionSpec, slots: Tensor
    ) -> Tensor:
        """The first half of `attend`: keys and values go to `slots` int64 [T]; returns the turned queries."""
        offset, centre = self._offset(rotation, spec), spec.key_centre if self.centred else None
        storage = self.pool.layer(layer)
        append = self._ops[self._kinds[layer]].append
        exact: tuple[Tensor, ...] = ()
        if self.pool.recent is not None:
            assert self._recent is not None, "begin comes before the model"
            exact = self.pool.recent.place(layer, self._recent, len(slots))
        turned: Tensor = append(q, k, v, rotation.cos, rotation.sin, slots, storage, offset, centre, spec.norms, *exact)
        return turned

    def attend_stored(self, layer: int, q: Tensor, rotation: Rotation, spec: AttentionSpec) -> Tensor:
        """The second half: what the turned queries [T, num_heads, head_dim] find in the step's sequences."""
        step = self._step(layer)
        offset = self._offset(rotation, spec)
        table = self._table(step, rotation) if self.pre_rope or offset is not None else None
        rules = AttentionSpec(spec.scale, spec.window, spec.soft_cap, offset)
        attend, storage, recent = self._ops[self._kinds[layer]].attend, self.pool.layer(layer), self.pool.recent
        out: Tensor
        if recent is None or step.recent is None:
            out = attend(q, storage, step, rules, table)
        elif step.recent.is_direct:
            out = attend(q, storage, step, rules, table, recent.layer(layer))
        else:
            recent.move(layer, step, is_late=False)
            out = attend(q, storage, step, rules, table, recent.layer(layer))
            recent.move(layer, step, is_late=True)
        return out

    def _step(self, layer: int) -> PagedStep:
        assert self._steps, "begin comes before the model"
        return self._steps[self._kinds[layer]]

    def _offset(self, rotation: Rotation, spec: AttentionSpec) -> Tensor | None:
        """Keys under dynamic RoPE stand at the angles of the length they were stored at, which nobody knows later."""
        return spec.key_offset if self.offset_apart and rotation.rope.config.kind != "dynamic" else None

    def _by_length(self, step: PagedStep, rotation: Rotation) -> Rotation:
        """Dynamic NTK by each sequence's own length; the model made it from the longest of the batch."""

        def make() -> Rotation:
            lengths = torch.from_numpy(step.seqlens_k.repeat(step.counts)).to(rotation.positions.device)
            return rotation.rope(rotation.positions, lengths)

        return step.derive(rotation.rope.config, make)

    def _table(self, step: PagedStep, rotation: Rotation) -> RopeTable:
        """cos and sin of all positions of the step, kept from step to step and grown when a sequence is longer.

        On a GPU of all positions that the model has: a graph that was captured goes on reading the same table.
        """
        config, length = rotation.rope.config, int(step.seqlens_k.max())
        table = self._tables.get(config)
        if table is None or table.cos.shape[0] < length:
            rows = 1 << (length - 1).bit_length()
            if self.pool.device.type == "cuda":
                rows = max(rows, self.pool.config.max_position_embeddings)
            whole = rotation.rope(torch.arange(rows, device=self.pool.device))
            table = self._tables[config] = RopeTable(whole.cos, whole.sin)
        return table
