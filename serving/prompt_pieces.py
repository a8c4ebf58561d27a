"""Steps with prompts in pieces: a CUDA graph for what lies between two attentions, at fixed numbers of tokens.

Launched kernel by kernel, a pass over 512 tokens costs the host more time than the GPU. All of it but attention depends
on the number of tokens alone, so it is captured: a graph up to the first layer's attention, one from each layer's to
the next, one from the last. Between them attention is launched as ever, whatever sequences, prefixes and decodes there
are.
Tokens are padded to the next size; what fills goes through every product and into a block that no sequence owns.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atom.kernels.dense_attention import AttentionSpec
from atom.models.config import ModelConfig
from atom.models.model import Model
from atom.models.rope import RopeConfig, Rotation

from .batch import unsampled
from .kv_pool import DeviceArrays, PagedKV

GRAPH_BYTES = 2**20  # of one: with these and the decode buckets Llama-3-8B's shape took 484 to 587 MB of an H200
SIZES = (256, 512, 768, 1024, 1280)  # beyond, the GPU takes longer than the host anyway


def memory_bytes(config: ModelConfig) -> int:
    """About what pieces of all SIZES take in 16 bits: their buffers, what the largest computes, and the graphs."""
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    values = 6 * config.hidden_size + 3 * heads + 3 * config.intermediate_size
    return SIZES[-1] * 2 * values + len(SIZES) * (config.num_layers + 1) * GRAPH_BYTES


@dataclass(frozen=True)
class Attention:
    """One layer's, between two pieces."""

    layer: int
    spec: AttentionSpec
    rotation: Rotation


@dataclass(frozen=True)
class Piece:
    """What runs up to an attention, and that attention; None after the last piece."""

    replay: Callable[[], None]
    attention: Attention | None


class PromptPieces:
    """The model's layers at each of `sizes` tokens, on buffers that keep their place.

    The pool behind `kv` has one block that no sequence owns, its last, for the tokens that pad.
    """

    def __init__(self, model: Model, kv: PagedKV, sizes: tuple[int, ...] = SIZES) -> None:
        self.model, self.kv, self.sizes = model, kv, sizes
        config, most, device, dtype = model.config, sizes[-1], model.device, model.dtype
        self._hidden = torch.zeros(most, config.hidden_size, dtype=dtype, device=device)
        self._slots = torch.zeros(most, dtype=torch.int64, device=device)
        self._q = torch.zeros(most, config.num_heads, config.head_dim, dtype=dtype, device=device)
        self._out = torch.zeros_like(self._q)
        self._rotations = {name: _fixed(turn) for name, turn in model.model.rotations(self._slots).items()}
        self._pieces: dict[int, list[Piece]] = {}
        self._num_tokens = 0  # of the step under way that are no filling

    def size_for(self, num_tokens: int) -> int | None:
        """The smallest size that holds them; None if none does."""
        return next((size for size in self.sizes if size >= num_tokens), None)

    def warm_up(self) -> None:
        """Run (and on a GPU capture) every size, largest first, so that the smaller ones reuse its memory."""
        if self.model.device.type != "cuda":
            return
        memory, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.model.device)
        gc.collect()  # no memory may be given back while something is captured
        for size in reversed(self.sizes):
            self._begin(size)
            self.model.model.run(self._hidden[:size], self._turns(size), self.kv)  # what is loaded once is loaded
            torch.cuda.synchronize(self.model.device)
            recorder = _Recorder(self, size, memory, stream)
            stream.wait_stream(torch.cuda.current_stream(self.model.device))
            with torch.cuda.stream(stream):
                recorder.begin()
                self._finish(self.model.model.run(self._hidden[:size], self._turns(size), recorder))
                recorder.end(None)
            torch.cuda.synchronize(self.model.device)
            self._pieces[size] = recorder.pieces

    def run(self, hidden: Tensor, rotations: Mapping[RopeConfig, Rotation], slots: Tensor) -> Tensor:
        """What Decoder.run returns of the step that `kv` has begun, valid until the next step.

        hidden     [T, hidden_size], embedded tokens
        rotations  their angles
        slots      int64 [T]
        """
        self._num_tokens = count = hidden.shape[0]
        size = self.size_for(count)
        assert size is not None, f"{count} tokens are more than the largest size"
        self._hidden[:count] = hidden
        self._slots[:count] = slots
        self._slots[count:size] = (self.kv.pool.num_blocks - 1) * self.kv.pool.block_size
        for name, turn in rotations.items():
            self._rotations[name].cos[:count] = turn.cos
            self._rotations[name].sin[:count] = turn.sin
        if size not in self._pieces:
            self._finish(self.model.model.run(self._hidden[:size], self._turns(size), _Unbroken(self, size)))
            return self._hidden[:count]
        for piece in self._pieces[size]:
            piece.replay()
            if piece.attention is not None:
                self.attend(piece.attention)
        return self._hidden[:count]

    def store(self, size: int, layer: int, q: Tensor, k: Tensor, v: Tensor, at: Attention) -> None:
        """Keys and values of all tokens into the cache, turned queries into their buffer."""
        self._q[:size] = self.kv.store(layer, q, k, v, at.rotation, at.spec, self._slots[:size])

    def attend(self, at: Attention) -> None:
        """From the buffer of queries to that of outputs."""
        count = self._num_tokens
        self._out[:count] = self.kv.attend_stored(at.layer, self._q[:count], at.rotation, at.spec)

    def outputs(self, size: int) -> Tensor:
        """What attention left, [size, num_heads, head_dim]; anything where it is filling."""
        return self._out[:size]

    def _turns(self, size: int) -> dict[RopeConfig, Rotation]:
        return {
            name: Rotation(turn.cos[:size], turn.sin[:size], turn.positions[:size], turn.rope)
            for name, turn in self._rotations.items()
        }

    def _finish(self, normed: Tensor) -> None:
        self._hidden[: normed.shape[0]] = normed

    def _begin(self, size: int) -> None:
        """Take a step of one prompt of `size` tokens, all in the block that no sequence owns."""
        pool = self.kv.pool
        blocks = -(-size // pool.block_size)
        table = np.full((1, blocks), pool.num_blocks - 1, dtype=np.int32)
        slots = np.full(size, (pool.num_blocks - 1) * pool.block_size, dtype=np.int64)
        batch = unsampled(
            token_ids=np.zeros(size, dtype=np.int32),
            positions=np.arange(size, dtype=np.int32),
            slots=slots,
            cu_seqlens_q=np.array([0, size], dtype=np.int32),
            seqlens_k=np.array([size], dtype=np.int32),
            block_tables=table,
            lanes=np.zeros(1, dtype=np.int32),
        )
        self._slots[:size] = int(slots[0])
        self.kv.begin(batch, DeviceArrays(self._slots[:size], torch.from_numpy(table).to(self._slots.device)))


class _Unbroken:
    """The cache as a model sees it that is not captured: attention where the pieces would have it."""

    takes_norms = True

    def __init__(self, pieces: PromptPieces, size: int) -> None:
        self._pieces, self._size = pieces, size

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, spec: AttentionSpec) -> Tensor:
        at = Attention(layer, spec, rotation)
        self._pieces.store(self._size, layer, q, k, v, at)
        self._pieces.attend(at)
        return self._pieces.outputs(self._size)


class _Recorder:
    """The cache as a model sees it while it is captured: every attention ends a graph and begins the next.

    What one graph leaves to the next (the residual stream) lies in the graphs' common memory, and is only reused by
    what is captured, and so replayed, later.
    """

    takes_norms = True

    def __init__(self, pieces: PromptPieces, size: int, memory: Any, stream: torch.cuda.Stream) -> None:
        self._pieces, self._size, self._memory, self._stream = pieces, size, memory, stream
        self._graph: torch.cuda.CUDAGraph | None = None
        self.pieces: list[Piece] = []

    def begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(pool=self._memory)

    def end(self, attention: Attention | None) -> None:
        assert self._graph is not None
        self._graph.capture_end()
        self.pieces.append(Piece(self._graph.replay, attention))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, spec: AttentionSpec) -> Tensor:
        at = Attention(layer, spec, rotation)
        self._pieces.store(self._size, layer, q, k, v, at)
        self.end(at)
        self.begin()
        return self._pieces.outputs(self._size)


def _fixed(turn: Rotation) -> Rotation:
    return Rotation(turn.cos.clone(), turn.sin.clone(), turn.positions, turn.rope)
