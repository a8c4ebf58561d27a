"""A model without weights, run through a batch's arrays as a device would run it.

Its memory holds, for every slot, the token that was written there and its position. The next token of a sequence is a
checksum of the tokens that attention finds through the block table, so a wrong block, slot, position or length shows in
the output (or at once, in an assertion). It runs steps when they are launched and hands the tokens back later.
"""

import zlib
from array import array
from collections import deque
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np

from atom.serving.batch import Batch, Step
from atom.serving.request import Request
from atom.serving.result import StepResult, TokenLogprobs
from atom.serving.scheduler import Scheduler
from atom.serving.sequence import Output, Sequence

VOCAB = 24


def next_token(tokens: list[int], index: int, forbidden: frozenset[int]) -> int:
    """The fake model's word: a token after these, for sample `index`, none of the forbidden ones.

    It repeats what came three tokens ago half of the time, so that guesses by prompt lookup are right now and then.
    """
    checksum = zlib.crc32(array("q", [index, *tokens]).tobytes())
    token = tokens[-3] if checksum & 1 and len(tokens) > 2 else (checksum >> 1) % VOCAB
    while token in forbidden:
        token = (token + 1) % VOCAB
    return token


def expected_output(request: Request, index: int, max_tokens: int) -> list[int]:
    """What the request's sample must yield, from the definition and not from a scheduler."""
    params, tokens, output = request.params, list(request.prompt_token_ids), []
    stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(request.eos_token_ids))
    while len(output) < max_tokens:
        forbidden = stops if len(output) + 1 < params.min_tokens else frozenset()
        output.append(next_token(tokens + output, index, forbidden))
        if output[-1] in stops:
            break
    return output


class FakeRunner:
    def __init__(self, num_blocks: int, block_size: int, num_lanes: int) -> None:
        self.block_size = block_size
        self.tokens = np.full(num_blocks * block_size, -1)
        self.positions = np.full(num_blocks * block_size, -1)
        self.writer = np.full((num_blocks * block_size, 2), -1)  # step, and sequence in it
        self.last = [-1] * num_lanes
        self.occupants: list[Sequence | None] = [None] * num_lanes

    def run(self, step: Step) -> list[int]:
        batch = step.batch
        check_shapes(batch)
        for sequence in step.admitted:
            assert sequence.lane is not None
            self.occupants[sequence.lane] = sequence
        inputs = batch.token_ids.copy()
        inputs[batch.pending] = [self.last[lane] for lane in batch.pending_lanes]
        assert len(set(batch.slots.tolist())) == batch.num_tokens, "two tokens of a step share a slot"
        self.tokens[batch.slots] = inputs
        self.positions[batch.slots] = batch.positions
        rows = np.repeat(np.arange(batch.num_seqs), np.diff(batch.cu_seqlens_q))
        self.writer[batch.slots] = np.stack((np.full(batch.num_tokens, step.number), rows), 1)
        for row in range(batch.num_seqs):
            step_of, row_of = self.writer[self.slots(batch, row)].T
            assert ((step_of < step.number) | (row_of == row)).all(), "reads what the same step computes for another"
        sampled = []
        owners = np.searchsorted(batch.cu_seqlens_q, batch.sample_rows, side="right") - 1
        for place, row, lane, masks in zip(
            batch.sample_rows, owners, batch.sample_lanes, batch.masks_stop, strict=True
        ):
            assert batch.lanes[row] == lane
            occupant = self.occupants[lane]
            assert occupant is not None
            forbidden = occupant.stop_token_ids if masks else frozenset[int]()
            before = self.context(batch, int(row))[: int(batch.positions[place]) + 1]  # drafts see no later ones
            token = next_token(before, occupant.index, forbidden)
            self.last[lane] = token
            sampled.append(token)
        return sampled

    def slots(self, batch: Batch, row: int) -> Any:
        """Where the tokens that sequence `row` attends over lie, by its block table."""
        places = np.arange(batch.seqlens_k[row])
        slots = batch.block_tables[row, places // self.block_size] * self.block_size + places % self.block_size
        assert (self.positions[slots] == places).all(), "a block table leads to another position's slot"
        return slots

    def context(self, batch: Batch, row: int) -> list[int]:
        """The tokens that sequence `row` attends over."""
        found: list[int] = self.tokens[self.slots(batch, row)].tolist()
        return found


def check_shapes(batch: Batch) -> None:
    T, B, S = batch.num_tokens, batch.num_seqs, len(batch.sample_rows)
    for array_, shape, dtype in (
        (batch.token_ids, (T,), np.int32),
        (batch.positions, (T,), np.int32),
        (batch.slots, (T,), np.int64),
        (batch.cu_seqlens_q, (B + 1,), np.int32),
        (batch.seqlens_k, (B,), np.int32),
        (batch.lanes, (B,), np.int32),
        (batch.pending, (len(batch.pending),), np.int32),
        (batch.pending_lanes, (len(batch.pending),), np.int32),
        (batch.sample_lanes, (S,), np.int32),
        (batch.sample_rows, (S,), np.int32),
        (batch.masks_stop, (S,), np.bool_),
    ):
        assert array_.shape == shape and array_.dtype == dtype
    assert batch.block_tables.shape[0] == B and batch.block_tables.dtype == np.int32
    assert T > 0 and batch.cu_seqlens_q[0] == 0 and batch.cu_seqlens_q[-1] == T
    assert len(set(batch.lanes.tolist())) == B
    assert (np.diff(batch.cu_seqlens_q)[: batch.num_decodes] == 1).all()


def prompt_logprobs(step: Step) -> dict[int, list[TokenLogprobs]]:
    """Of every prompt token whose logprob is wanted; it says the token and the position."""
    found = {}
    for index, entry in enumerate(step.entries):
        sequence = entry.sequence
        if sequence.computes_prompt and entry.start + 1 < sequence.num_prompt:
            places = range(entry.start + 1, min(entry.end, sequence.num_prompt - 1) + 1)
            found[index] = [TokenLogprobs(sequence.token_ids[place], -float(place)) for place in places]
    return found


class FakeEngine:
    """A scheduler and the fake runner, with up to `depth` steps whose tokens have not come back."""

    def __init__(self, scheduler: Scheduler, depth: int = 1) -> None:
        config = scheduler.config
        self.scheduler = scheduler
        self.depth = depth
        self.runner = FakeRunner(config.num_blocks, config.block_size, config.max_num_seqs)
        self.results: deque[tuple[Step, StepResult]] = deque()
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.last: dict[tuple[str, int], Output] = {}
        self.prompt_logprobs: dict[tuple[str, int], tuple[TokenLogprobs, ...]] = {}
        self.finished: list[tuple[str, int]] = []  # in order
        self.admitted: dict[int, int] = {}  # sequence -> step of its first admission

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        for index in range(request.params.n):
            self.outputs[request.request_id, index] = []
            self.last.pop((request.request_id, index), None)

    def take(self, outputs: SequenceOf[Output]) -> None:
        for output in outputs:
            key = output.request_id, output.index
            assert key not in self.last or self.last[key].finish_reason is None, "an output after the last"
            if output.prompt_logprobs is not None:
                assert not self.outputs[key], "prompt logprobs come with the first token"
                self.prompt_logprobs[key] = output.prompt_logprobs
            self.outputs[key] += output.token_ids
            self.last[key] = output
            if output.finish_reason is not None:
                self.finished.append(key)

    def launch(self) -> Step | None:
        config = self.scheduler.config
        step = self.scheduler.schedule()
        if step is not None:
            assert step.batch.num_tokens <= config.max_num_batched_tokens
            assert step.batch.num_seqs <= config.max_num_seqs
            assert all(e.end < e.sequence.max_length for e in step.entries), "computes beyond what may be sampled"
            self.results.append((step, StepResult(self.runner.run(step), None, prompt_logprobs(step))))
            for sequence in step.admitted:
                self.admitted.setdefault(sequence.sequence_id, step.number)
        return step

    def deliver(self) -> None:
        self.take(self.scheduler.update(*self.results.popleft()))

    def advance(self) -> None:
        """Launch one step if anything can be computed; bring tokens back when `depth` steps are out."""
        launched = self.launch()
        assert launched or self.results or not self.scheduler.has_unfinished, "deadlock"
        if self.results and (launched is None or len(self.results) >= self.depth):
            self.deliver()

    def finish(self, limit: int = 10_000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_unfinished and not self.results:
                return
            self.advance()
        raise AssertionError(f"not done after {limit} steps")

    def assert_idle(self) -> None:
        """Nothing is left behind."""
        self.scheduler.check()
        stats = self.scheduler.stats()
        assert self.scheduler.blocks.num_free == stats.blocks and stats.used_blocks == 0
        assert (stats.waiting, stats.running, stats.in_flight, stats.waiting_tokens) == (0, 0, 0, 0)
