"""Decode steps in fixed batch sizes: buffers that stay where they are, and on a GPU one CUDA graph for each size.

A decode step is padded to the next bucket with rows that live in a scratch block. Its arrays are copied into the
buffers, then what was captured runs: input tokens, the model, the logits. Sampling follows outside, since it depends on
what the requests ask for.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from atom.kernels.leading import Leading
from atom.kernels.paged_step import Share
from atom.kernels.registry import Kernels
from atom.models.model import Model

from .batch import Batch, unsampled
from .decode_inputs import decode_inputs
from .kv_pool import PagedKV
from .step_inputs import pad_decodes

Replay = Callable[[], None]


def bucket_sizes(max_num_seqs: int, more: int = 0) -> tuple[int, ...]:
    """1, 2, 4, 8, then every eighth up to and with max_num_seqs; beyond 256, and for up to `more` rows, every 32nd."""
    sizes = [1, 2, 4, *range(8, min(max_num_seqs, 256) + 1, 8), *range(288, max_num_seqs + 1, 32)]
    wider = range(max_num_seqs // 32 * 32 + 32, max_num_seqs + more + 1, 32)
    return (*(size for size in sizes if size < max_num_seqs), max_num_seqs, *wider)


class DecodeBuckets:
    """The model's decode step at each of `sizes`.

    max_blocks    of one sequence
    most_samples  rows whose logits are computed: the first ones, if a bucket has more; None: all
    plans_vary    attention's plans take more memory for longer sequences: buckets are prepared for the longest of all
    The pool behind `kv` has one block that no sequence owns, its last, for the rows that pad.
    """

    def __init__(
        self,
        model: Model,
        kv: PagedKV,
        last_tokens: Tensor,
        sizes: tuple[int, ...],
        depth: int,
        max_blocks: int,
        most_samples: int | None = None,
        plans_vary: bool = False,
        kernels: Kernels = "auto",
    ) -> None:
        self.sizes = sizes
        self.model = model
        self.kv = kv
        self._plans_vary = plans_vary
        self._scratch_block = kv.pool.num_blocks - 1
        device, largest = model.device, sizes[-1]
        self.most_samples = largest if most_samples is None else min(most_samples, largest)
        self._max_blocks = max_blocks
        recent = kv.pool.recent
        self._spare_lane = 0 if recent is None else recent.spare_lane
        self._inputs = decode_inputs(
            model, last_tokens, largest, max_blocks, kv.pool.block_size, depth, kernels, recent
        )
        self._logits = Leading(
            torch.zeros(self.most_samples, model.config.vocab_size, dtype=model.dtype, device=device)
        )
        self._replays: dict[tuple[int, bool], Replay] = {}  # by size, and whether sequences read prefixes together
        self._memory = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def size_for(self, num_seqs: int) -> int | None:
        """The smallest bucket that holds them; None if none does."""
        return next((size for size in self.sizes if size >= num_seqs), None)

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Run (and on a GPU capture) every bucket, largest first, so that the smaller ones reuse its memory."""
        for done, size in enumerate(reversed(self.sizes)):
            self._prepare(size)
            if progress is not None:
                progress(done + 1, len(self.sizes))

    def run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [S, vocab_size] of a decode batch, whose first rows are sampled from, and their lanes int64 [S].

        The logits are valid until the next step runs.
        """
        size = self.size_for(batch.num_seqs)
        assert size is not None, f"{batch.num_seqs} sequences are more than the largest bucket"
        padded = pad_decodes(batch, size, self._scratch_block, self.kv.pool.block_size, self._spare_lane)
        lanes, shares = self._load(padded)
        if (size, shares) not in self._replays:  # of steps that share prefixes the first comes while serving
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)  # steps under way still read what loading more fills
            self._prepare(size, shares)
            lanes, _ = self._load(padded)
        self._replays[size, shares]()
        self.kv.finish()
        return self._logits(len(batch.sample_rows)), lanes

    def _load(self, padded: Batch, share: Share = "auto") -> tuple[Tensor, bool]:
        """Fill the buffers; returns the lanes that sample, and PagedKV.begin's answer."""
        shares = self.kv.begin(padded, self._inputs.arrays(padded.num_seqs), share)
        return self._inputs.load(padded, self.kv.rings), shares

    def _compute(self, size: int) -> None:
        hidden = self.model.model.run(*self._inputs.start(size), self.kv)
        rows = min(size, self.most_samples)
        self.model.logits(hidden[:rows], self._logits(rows))

    def _prepare(self, size: int, shares: bool = False) -> None:
        """Run a bucket once with long sequences, so that whatever grows with lengths has grown; then capture it.

        Their tables are alike: where more than one is long, they share a prefix.
        """
        count = size if self._plans_vary or shares else 1
        size_of_block = self.kv.pool.block_size
        batch = _long_batch(size, count, self._max_blocks, self._scratch_block, size_of_block, self._spare_lane)
        _, found = self._load(batch, "always" if shares else "auto")
        assert found == shares, "a step of another kind would be captured"
        if self.model.device.type == "cuda":  # attention starts early and reads lengths; before a graph they are there
            torch.cuda.synchronize(self.model.device)
        self._compute(size)
        self._replays[size, shares] = self._capture(size)

    def _capture(self, size: int) -> Replay:
        """What computes a bucket's logits from the buffers."""
        if self.model.device.type != "cuda":
            return lambda: self._compute(size)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.model.device)
        with torch.cuda.graph(graph, pool=self._memory):
            self._compute(size)
        return graph.replay


def _long_batch(size: int, count: int, max_blocks: int, scratch_block: int, block_size: int, spare_lane: int) -> Batch:
    """A decode batch of padding rows, `count` of them with as many tokens as a sequence can have, all in one block."""
    none = np.zeros(0, dtype=np.int32)
    nobody = unsampled(
        token_ids=none,
        positions=none,
        slots=none.astype(np.int64),
        cu_seqlens_q=np.zeros(1, dtype=np.int32),
        seqlens_k=none,
        block_tables=np.zeros((0, max_blocks), dtype=np.int32),
        lanes=none,
    )
    padded = pad_decodes(nobody, size, scratch_block, block_size, spare_lane)
    lengths = padded.seqlens_k.copy()
    lengths[:count] = max_blocks * block_size
    return replace(padded, seqlens_k=lengths, positions=lengths - 1)
