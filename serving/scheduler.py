"""Which tokens of which sequences the next step computes.

A step is put together in three passes: one token for each decoding sequence, then the next chunk of each prompt under
way, then new sequences while lanes, blocks and tokens last. Everything goes by `Sequence.order`: the step in which a
request arrived, shifted by its priority. It never changes, so what arrives later passes a request only by its priority,
and only for as many steps as that is worth; the queue's head is never passed.

A sequence gets blocks for all its known tokens when it is admitted, and one more whenever its decoding fills the last.
If there is none, the last sequence in order is preempted: it gives up its blocks and lane, waits, and is computed
again (cheaply, where the prefix cache kept its blocks). The first in order is never preempted for another, and alone it
fits, so it always ends: that is why no request waits for ever.

`schedule` may be called again before the tokens of earlier steps are known; `update` brings them, step by step. The
runner must execute steps in order on one stream: a block that was freed may be written by the very next step.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence as SequenceOf
from operator import attrgetter

from .admission import check_room
from .batch import Entry, Step
from .block_manager import BlockManager
from .config import SchedulerConfig
from .decoding import Decoding
from .drafts import Drafting
from .errors import InvalidRequestError
from .lane_tables import LaneTables
from .ngram import NgramIndex, can_speculate
from .prefix import Prefixes
from .request import FinishReason, Request
from .result import StepResult
from .sequence import Output, Sequence
from .stats import Stats
from .taking import Taking
from .waiting import Waiting

ENOUGH = 4  # prompts of this part of a step's tokens are not made to wait for more

_order = attrgetter("order")
_new_tuple = tuple.__new__


def _entry(
    sequence: Sequence, lane: int, start: int, end: int, samples: bool, masks_stop: bool, drafts: tuple[int, ...] = ()
) -> Entry:
    """Entry(...), in half the time."""
    return _new_tuple(Entry, (sequence, lane, sequence.epoch, start, end, samples, masks_stop, drafts))


class Scheduler:
    """Requests in, steps out. Not thread-safe: one thread owns it.

    hash_key  makes the prefix cache's digests reproducible; drawn at random without
    """

    def __init__(self, config: SchedulerConfig, hash_key: bytes | None = None) -> None:
        self.config = config
        self.blocks = BlockManager(config.num_blocks, config.block_size, config.prefix_cache)
        self._lanes = LaneTables(
            config.max_num_seqs, self.blocks.blocks_for(config.max_sequence_tokens), config.block_size
        )
        self._prefixes = Prefixes(self.blocks, hash_key)
        self._requests: dict[str, list[Sequence]] = {}  # unfinished sequences of each
        self._waiting = Waiting()
        self._running: list[Sequence] = []  # sorted by order
        self._decoding = Decoding(config.max_num_seqs, config.block_size)  # most of them
        self._in_flight: deque[Step] = deque()
        self._arrivals = 0
        self._steps = 0
        self._last_admission = -config.admission_interval
        self._preemptions = 0
        self._finished = 0
        self._prompt_tokens = 0
        self._drafting = Drafting(config, self.blocks, self._extend_lane)
        self._taking = Taking(self._decoding, self._drafting, self._prefixes, self._end, self._remove)
        self._prefix_queries = 0
        self._prefix_hits = 0

    @property
    def has_unfinished(self) -> bool:
        """Whether any request has not ended; `schedule` may still have to wait for an `update`."""
        return bool(self._requests)

    @property
    def in_flight(self) -> int:
        """Steps that were scheduled and not updated."""
        return len(self._in_flight)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises InvalidRequestError if it can never be served, QueueFullError if too many wait already.
        """
        if request.request_id in self._requests:
            raise InvalidRequestError(
                "request_id", f"request_id {request.request_id!r} is in use; give every request an id of its own."
            )
        max_tokens = request.max_tokens(self.config)
        n = request.params.n
        waiting = self._waiting
        check_room(self.config, waiting.num_new, waiting.new_tokens, n, n * len(request.prompt_token_ids))
        arrival = self._steps + request.priority * self.config.patience_steps
        sequences = []
        for index in range(n):
            sequence = Sequence(self._arrivals, request, index, max_tokens, (arrival, self._arrivals))
            self._arrivals += 1
            if self.config.num_speculative_tokens and can_speculate(request):
                sequence.ngrams = NgramIndex(self.config.prompt_lookup_min, self.config.prompt_lookup_max)
            sequences.append(sequence)
            waiting.add(sequence)
        self._requests[request.request_id] = sequences

    def abort(self, request_id: str) -> list[Output]:
        """End a request at whatever stage it is; nothing happens if there is no such request (any more)."""
        return [self._end(s, FinishReason.ABORT) for s in tuple(self._requests.get(request_id, ()))]

    def stop(self, request_id: str, index: int) -> list[Output]:
        """End one sample because a stop string was found in its text; nothing happens if it has ended already."""
        return [self._end(s, FinishReason.STOP) for s in tuple(self._requests.get(request_id, ())) if s.index == index]

    def fail(self) -> list[Output]:
        """End all sequences that steps in flight belong to, or may have damaged, because one of those steps failed.

        Steps in flight are forgotten (an `update` with one of them changes nothing), and so is the prefix cache.
        Sequences that only wait are not touched.
        """
        lost = [*self._running, *(s for s in self._waiting if s.pending)]
        self._in_flight.clear()
        outputs = [self._end(s, FinishReason.ERROR) for s in lost]
        self.blocks.reset_cache()
        return outputs

    def schedule(self) -> Step | None:
        """The next step; None if there is nothing to compute before an update, or at all."""
        preemptions = self._preemptions
        self._grow()
        decodes = self._decoding.advance()
        rest, drafted, prefills = self._plan_others()
        num_decodes = len(decodes) + len(rest)
        rest += drafted
        budget = self.config.max_num_batched_tokens - num_decodes - sum(entry.num_tokens for entry in drafted)
        chunks = []
        for sequence in prefills:
            if budget:
                end = min(sequence.length, sequence.scheduled + budget)
                budget -= end - sequence.scheduled
                chunks.append((sequence, end))
        admitted = []
        gathers = not drafted and not chunks and self._gathers(num_decodes)
        if gathers:
            budget = min(budget, self.config.admission_few)
        while budget and self._preemptions == preemptions:
            head = self._waiting.head
            if head is None or (gathers and head.length > budget) or not self._admit(head):
                break
            insort(self._running, head, key=_order)
            end = min(head.length, head.scheduled + budget)
            budget -= end - head.scheduled
            chunks.append((head, end))
            admitted.append(head)
        if admitted:
            self._last_admission = self._steps
        rest += [self._chunk(sequence, end) for sequence, end in chunks]
        if not decodes and not rest:
            return None
        batch = self._lanes.build(decodes, rest, num_decodes, len(admitted))
        step = Step(self._steps, decodes, tuple(rest), tuple(admitted), batch)
        self._steps += 1
        self._in_flight.append(step)
        return step

    def update(self, step: Step, result: StepResult) -> SequenceOf[Output]:
        """Take what a step sampled; steps come in order. Returns the news for the front end."""
        if not self._in_flight or step.number < self._in_flight[0].number:
            return []  # forgotten by fail()
        assert self._in_flight.popleft() is step, "steps must be updated in the order in which they were scheduled"
        return self._taking.take(step, result)

    def stats(self, num_failures: int = 0) -> Stats:
        """How it stands; the scheduler does not know of failed steps."""
        return Stats(
            waiting=len(self._waiting),
            waiting_tokens=self._waiting.new_tokens,
            running=len(self._running),
            in_flight=len(self._in_flight),
            blocks=self.config.num_blocks,
            used_blocks=self.blocks.num_used,
            cached_blocks=self.blocks.num_cached,
            num_steps=self._steps,
            num_preemptions=self._preemptions,
            num_evictions=self.blocks.num_evictions,
            num_prefix_queries=self._prefix_queries,
            num_prefix_hits=self._prefix_hits,
            num_finished=self._finished,
            num_prompt_tokens=self._prompt_tokens,
            num_output_tokens=self._taking.num_tokens,
            waiting_new=self._waiting.num_new,
            num_draft_tokens=self._drafting.proposed,
            num_accepted_tokens=self._drafting.accepted,
            num_failures=num_failures,
        )

    def check(self) -> None:
        """Assert what must hold between any two calls; what breaks it is a bug here."""
        self.blocks.check()
        self._decoding.check()
        self._waiting.check()
        running, waiting = self._running, self._waiting
        live = {s.sequence_id for sequences in self._requests.values() for s in sequences}
        assert live == {s.sequence_id for s in (*running, *waiting)}, "a sequence is lost or outlived its request"
        assert len(live) == len(running) + len(waiting), "a sequence is queued twice"
        assert all(self._requests.values()), "a request without sequences is kept"
        assert running == sorted(running, key=_order), "running sequences are out of order"
        assert len({s.lane for s in running}) == len(running) == self.config.max_num_seqs - self._lanes.num_free
        assert self.blocks.num_used == len({b for s in running for b in self.blocks.table(s.sequence_id)})
        for sequence in running:
            assert not sequence.is_finished and sequence.computed <= sequence.scheduled <= sequence.length
            table = self.blocks.table(sequence.sequence_id)
            assert len(table) >= self.blocks.blocks_for(sequence.scheduled), "a scheduled token has no block"
            for block in table[sequence.scheduled // self.config.block_size :]:
                alone = self.blocks.references(block) == 1 and not self.blocks.is_registered(block)
                assert alone, "a block that will be written is shared"

    def _grow(self) -> None:
        """Have a block for every token that begins one, in order; preempts the last in order to get there."""
        growing = self._decoding.at_block_start()
        if self.config.num_speculative_tokens:
            size = self.config.block_size
            growing += [
                (s, s.length)
                for s in self._running
                if s.ngrams is not None and s.scheduled % size == 0 and not s.pending and s.is_decode
            ]
            growing.sort(key=lambda each: each[0].order)
        for sequence, length in growing:
            while sequence.lane is not None:
                if self.blocks.append(sequence.sequence_id, length):
                    self._extend_lane(sequence)
                    break
                self._preempt(self._running[-1])  # never before `sequence` in order, so not grown already

    def _plan_others(self) -> tuple[list[Entry], list[Entry], list[Sequence]]:
        """Entries of sequences that may guess, without and with drafts, and the sequences still in their prompts."""
        plain: list[Entry] = []
        drafted: list[Entry] = []
        prefills: list[Sequence] = []
        if len(self._decoding) == len(self._running):
            return plain, drafted, prefills
        spare = self.config.max_num_batched_tokens - len(self._running)  # tokens of a step that may be drafts
        for sequence in self._running:
            if sequence.decoding is not None:
                continue
            start, length = sequence.scheduled, sequence.length
            if length >= sequence.max_length:
                continue
            if sequence.ngrams is None or length - start != 1 or length == sequence.num_prompt:
                prefills.append(sequence)
            elif not sequence.pending:  # drafts follow the last token, so it must be known
                masks = length + 1 < sequence.min_length
                drafts = () if masks else self._drafting.propose(sequence, spare)
                spare -= len(drafts)
                assert sequence.lane is not None
                entry = _entry(sequence, sequence.lane, start, length + len(drafts), True, masks, drafts)
                (drafted if drafts else plain).append(entry)
                sequence.scheduled = length
                sequence.pending += 1
        return plain, drafted, prefills

    def _extend_lane(self, sequence: Sequence) -> None:
        assert sequence.lane is not None
        self._lanes.extend(sequence.lane, self.blocks.table(sequence.sequence_id))

    def _gathers(self, num_decodes: int) -> bool:
        """Whether long prompts that wait are left to wait for more of their kind, since a step without is cheaper.

        For admission_interval steps at most, and only while a crowd decodes and little could begin.
        """
        config = self.config
        if num_decodes < config.admission_crowd or self._steps - self._last_admission >= config.admission_interval:
            return False
        lanes, blocks, tokens = (
            self._lanes.num_free,
            self.blocks.num_free - config.reserve_blocks(len(self._running)),
            0,
        )
        for sequence in self._waiting:
            lanes, blocks = lanes - 1, blocks - self.blocks.blocks_for(sequence.length)
            if lanes < 0 or blocks < 0:
                break
            tokens += sequence.length
            if tokens >= config.max_num_batched_tokens // ENOUGH:
                return False
        return True

    def _admit(self, sequence: Sequence) -> bool:
        """Give the head of the queue a table and a lane and take it out, if it may run now."""
        if not self._lanes.num_free:
            return False
        if sequence.pending:  # preempted while its next token is being sampled: wait for that
            return False
        size, config = self.config.block_size, self.config
        reserve = config.reserve_blocks(len(self._running))
        digests = self._prefixes.digests(sequence)
        # full blocks that all samples of a request have in common
        shared = 0 if sequence.computes_prompt or not config.forks else (sequence.num_prompt - 1) // size
        siblings = [s for s in self._requests[sequence.request.request_id] if s.lane is not None]
        if siblings and self.blocks.find(digests) < shared:
            source = next((s for s in siblings if s.scheduled >= shared * size), None)
            if source is None:  # another sample is computing what this one will share
                return False
            cached = self.blocks.fork(source.sequence_id, sequence.sequence_id, shared, sequence.length, reserve)
        else:
            cached = self.blocks.allocate(sequence.sequence_id, sequence.length, digests, reserve)
        if cached is None:
            return False
        self._waiting.remove(sequence)
        if sequence.epoch == 0:
            sequence.cached_tokens = cached
        sequence.epoch += 1
        sequence.scheduled = sequence.computed = cached
        sequence.registered = cached // size
        sequence.lane = self._lanes.take()
        self._extend_lane(sequence)
        self._prefix_queries += sequence.length
        self._prefix_hits += cached
        if sequence.epoch == 1:
            self._prompt_tokens += sequence.num_prompt
        return True

    def _chunk(self, sequence: Sequence, end: int) -> Entry:
        """The entry that computes a prompt up to `end`, noted as scheduled."""
        assert sequence.lane is not None
        start, length = sequence.scheduled, sequence.length
        samples = end == length
        sequence.scheduled = end
        sequence.pending += samples
        if samples and sequence.ngrams is None:
            self._decoding.join(sequence)
        return _entry(sequence, sequence.lane, start, end, samples, length + 1 < sequence.min_length)

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.scheduled = sequence.computed = 0
        sequence.num_preemptions += 1
        self._preemptions += 1
        self._waiting.add(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Take a sequence out of the running ones, with its blocks and lane."""
        assert sequence.lane is not None
        if sequence.decoding is not None:
            self._decoding.leave(sequence)
        del self._running[bisect_left(self._running, sequence.order, key=_order)]
        self.blocks.free(sequence.sequence_id)
        self._lanes.give_back(sequence.lane)
        sequence.lane = None

    def _end(self, sequence: Sequence, reason: FinishReason) -> Output:
        sequence.finish_reason = reason
        self._remove(sequence)
        return sequence.output(())

    def _remove(self, sequence: Sequence) -> None:
        """Forget a finished sequence, wherever it is."""
        if sequence.lane is not None:
            self._release(sequence)
        else:
            self._waiting.remove(sequence)
        siblings = self._requests[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[sequence.request.request_id]
        self._finished += 1
