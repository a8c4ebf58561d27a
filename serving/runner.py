"""Steps on a real model: inputs up, one forward pass, tokens sampled on the device, results down; nothing waits.

The sampler keeps, on the device, the token that each lane sampled last, so that the next step can be launched before
this one's tokens have come back. Decode steps run in buckets of fixed batch sizes (serving/decode_buckets.py), as CUDA
graphs on a GPU. On a CPU `launch` computes at once and everything else is the same.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from atom.kernels.registry import Kernels
from atom.models.model import Model

from .batch import Batch, Entry, Step
from .decode_buckets import DecodeBuckets
from .guided_lanes import GuidedLanes
from .kv_pool import KVPool, PagedKV
from .logprobs import Logprobs, prompt_logprobs, unpack
from .prompt_pieces import PromptPieces
from .result import StepResult, TokenLogprobs
from .rows import as_rows, fits_rows
from .sampler import Sampled, Sampler
from .sampling_plan import Upload
from .split import is_split, split_decodes
from .step_inputs import Staging, is_decode, step_inputs


@dataclass(frozen=True)
class PromptPart:
    """Prompt tokens of one entry whose logprobs are wanted: of tokens start + 1 ... of the entry's sequence."""

    index: int  # of the entry
    first_row: int  # among the step's tokens
    token_ids: tuple[int, ...]
    num_top: int


class Runner:
    """Executes steps in the order in which they are launched.

    depth       steps under way at most
    buckets     batch sizes of decode steps, ascending; none: every step runs as it is. With buckets the pool has one
                block more than the scheduler knows of
    max_blocks  of one sequence; buckets need it
    split_tokens  see PagedKV
    piece_sizes   tokens of steps with prompts that run in pieces (prompt_pieces.py); these need that block too
    """

    def __init__(
        self,
        model: Model,
        pool: KVPool,
        sampler: Sampler,
        num_lanes: int,
        depth: int = 1,
        kernels: Kernels = "auto",
        buckets: tuple[int, ...] = (),
        max_blocks: int = 0,
        split_tokens: int | None = None,
        piece_sizes: tuple[int, ...] = (),
    ) -> None:
        self.model = model
        self.depth = depth
        self.device = model.device
        self.kv = PagedKV(pool, kernels, split_tokens)
        self._sampler = sampler
        self._guided = GuidedLanes(model.config.vocab_size)
        self._thread = 0  # the one that has entered the device
        self._events = Events(self.device, 2 * depth + 2)
        self._staging = Staging(self.device, depth)
        self.buckets: DecodeBuckets | None = None
        if buckets:
            varies = split_tokens is not None
            self.buckets = DecodeBuckets(
                model, self.kv, sampler.last_tokens, buckets, depth, max_blocks, num_lanes, varies, kernels
            )
        # a chunk's angles under dynamic RoPE follow from its end; fixed parts are to be those of prefill's attention
        is_dynamic = any(rope.kind == "dynamic" for rope in model.config.ropes)
        self._takes_rows = bool(buckets) and split_tokens is None and not is_dynamic
        self._pieces = PromptPieces(model, self.kv, piece_sizes) if piece_sizes and not is_dynamic else None

    @torch.inference_mode()
    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Make sampling and every decode bucket ready; progress(done, of) counts the buckets."""
        self._enter_device()
        self._sampler.warm_up()
        if self.buckets is not None:
            self.buckets.warm_up(progress)
        if self._pieces is not None:
            self._pieces.warm_up()

    @torch.inference_mode()
    def launch(self, step: Step) -> "Launched":
        """Enqueue a step on the device. If it samples for guided sequences, wait for the steps before it on the way."""
        self._enter_device()
        for sequence in step.admitted:
            assert sequence.lane is not None
            self._sampler.admit(sequence.lane, sequence)
            self._guided.admit(sequence.lane, sequence)
        parts = prompt_parts(step)
        logits, sample_lanes, prompt = self._forward(step.batch, parts)
        if logits is None:
            return Launched(self._events, parts, prompt, None)
        lanes = step.batch.sample_lanes
        mask, masks_stop = self._guided.mask(lanes, step.batch.masks_stop)  # may wait for the step before, not for this
        sampled = self._sampler.sample(logits, lanes, masks_stop, mask, sample_lanes)
        launched = Launched(self._events, parts, prompt, sampled)
        self._guided.follow(lanes, launched.tokens)
        return launched

    def reset(self) -> None:
        """Wait until the device has nothing to do; raises if it is lost."""
        self._guided.reset()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _enter_device(self) -> None:
        """Streams, events and kernels are those of the calling thread's device."""
        if self.device.type == "cuda" and self._thread != threading.get_ident():
            torch.cuda.set_device(self.device)
            self._thread = threading.get_ident()

    def _forward(self, batch: Batch, parts: list[PromptPart]) -> tuple[Tensor | None, Tensor, Logprobs | None]:
        """Logits [S, vocab_size] of the rows that sample (None if none does), their lanes [S], prompt logprobs."""
        if self.buckets is None or self.buckets.size_for(batch.num_decodes) is None:
            return self._forward_whole(batch, parts)
        if is_decode(batch):
            return *self.buckets.run(batch), None
        if not parts and self._is_rows(self.buckets, batch):
            logits, lanes = self.buckets.run(as_rows(batch))
            return logits if len(lanes) else None, lanes, None
        if is_split(batch) and not self._has_pieces(batch):
            return self._forward_in_two(self.buckets, batch, parts)
        return self._forward_whole(batch, parts)

    def _has_pieces(self, batch: Batch) -> bool:
        return self._pieces is not None and self._pieces.size_for(batch.num_tokens) is not None

    def _is_rows(self, buckets: DecodeBuckets, batch: Batch) -> bool:
        """See rows.py. Exact tokens of all rows must have a place before any attends."""
        pool = self.kv.pool
        if not self._takes_rows or not fits_rows(batch, buckets.sizes[-1], buckets.most_samples, pool.token_bytes):
            return False
        return pool.recent is None or pool.recent.holds(batch)

    def _forward_in_two(
        self, buckets: DecodeBuckets, batch: Batch, parts: list[PromptPart]
    ) -> tuple[Tensor, Tensor, Logprobs | None]:
        """See split.py."""
        decodes, rest = split_decodes(batch)
        moved = [replace(part, first_row=part.first_row - batch.num_decodes) for part in parts]
        logits, lanes = buckets.run(decodes)
        more, more_lanes, prompt = self._forward_whole(rest, moved)
        if more is None:
            return logits, lanes, prompt
        return torch.cat((logits, more)), torch.cat((lanes, more_lanes)), prompt

    def _forward_whole(self, batch: Batch, parts: list[PromptPart]) -> tuple[Tensor | None, Tensor, Logprobs | None]:
        """In pieces, or kernel by kernel."""
        inputs = step_inputs(batch, self._staging)
        has_pieces = self._has_pieces(batch)
        self.kv.begin(batch, inputs.attention, in_pieces=has_pieces)
        tokens = inputs.tokens(self._sampler.last_tokens)
        if self._pieces is not None and has_pieces:
            decoder = self.model.model
            embedded, turns = decoder.embed(tokens), decoder.rotations(inputs.positions)
            hidden = self._pieces.run(embedded, turns, inputs.attention.slots)
        else:
            hidden = self.model(tokens, inputs.positions, self.kv)
        prompt = self._prompt_logprobs(hidden, parts) if parts else None
        logits = self.model.logits(hidden[inputs.sample_rows]) if len(batch.sample_rows) else None
        return logits, inputs.sample_lanes, prompt

    def _prompt_logprobs(self, hidden: Tensor, parts: list[PromptPart]) -> Logprobs:
        rows = np.concatenate([np.arange(part.first_row, part.first_row + len(part.token_ids)) for part in parts])
        tokens = np.array([token for part in parts for token in part.token_ids], dtype=np.int64)
        upload = Upload(self.device)
        on_device, wanted = upload(rows), upload(tokens)
        return prompt_logprobs(self.model.logits, hidden[on_device], wanted, max(part.num_top for part in parts))


class Events:
    """Marks in the GPU's stream, of which `count` may be waited for; on a CPU there is nothing to wait for."""

    def __init__(self, device: torch.device, count: int) -> None:
        # waiting for one spins: a thread that slept finds its caches cold
        self._events = [torch.cuda.Event() for _ in range(count)] if device.type == "cuda" else []
        self._turn = 0

    def record(self) -> torch.cuda.Event | None:
        if not self._events:
            return None
        self._turn = (self._turn + 1) % len(self._events)
        event = self._events[self._turn]
        event.record()
        return event


class Launched:
    """Results on their way to the host."""

    def __init__(
        self,
        events: Events,
        parts: list[PromptPart],
        prompt: Logprobs | None,
        sampled: Sampled | None,
    ) -> None:
        self._parts = parts
        self._num_logprobs = None if sampled is None else sampled.num_logprobs
        self._found: list[int] | None = None
        self._tokens = None if sampled is None else _to_host(sampled.told)
        self._logprobs = None if sampled is None or sampled.logprobs is None else _to_host(sampled.logprobs.packed)
        self._prompt = None if prompt is None else _to_host(prompt.packed)
        self._event = events.record()

    def result(self) -> StepResult:
        """Wait until they are there."""
        return StepResult(self.tokens(), self._sampled_logprobs(), self._of_prompts())

    def tokens(self) -> list[int]:
        """Wait for the sampled tokens; they can be asked for again."""
        if self._found is None:
            if self._event is not None:
                self._event.synchronize()
            self._found = [] if self._tokens is None else self._tokens.tolist()
        return self._found

    def _sampled_logprobs(self) -> list[TokenLogprobs | None] | None:
        if self._logprobs is None or self._num_logprobs is None:
            return None
        wanted = self._num_logprobs
        found = iter(unpack(self._logprobs, wanted[wanted >= 0].tolist()))
        return [next(found) if has else None for has in (wanted >= 0).tolist()]

    def _of_prompts(self) -> dict[int, list[TokenLogprobs]]:
        if self._prompt is None:
            return {}
        widths = [part.num_top for part in self._parts for _ in part.token_ids]
        found = iter(unpack(self._prompt, widths))
        return {part.index: [next(found) for _ in part.token_ids] for part in self._parts}


def prompt_parts(step: Step) -> list[PromptPart]:
    """What a step computes of prompts whose logprobs are wanted."""
    return [
        PromptPart(index, int(step.batch.cu_seqlens_q[index]), tuple(tokens), wanted)
        for index, entry in enumerate(step.rest, len(step.decodes))
        if (wanted := entry.sequence.params.prompt_logprobs) is not None and (tokens := _prompt_tokens(entry))
    ]


def _prompt_tokens(entry: Entry) -> list[int]:
    """The prompt tokens that an entry's rows predict."""
    sequence = entry.sequence
    if not sequence.computes_prompt:
        return []
    return sequence.token_ids[entry.start + 1 : min(entry.end + 1, sequence.num_prompt)]


def _to_host(x: Tensor) -> Tensor:
    """A copy that is under way, in page-locked memory; what lies on the host is itself."""
    return x.to("cpu", non_blocking=True) if x.is_cuda else x
