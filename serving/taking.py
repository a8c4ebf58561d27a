"""What a step sampled, taken to its sequences: tokens and logprobs in, news for the front end out."""

from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from itertools import compress, repeat, starmap

import numpy as np

from .batch import Entry, Step
from .decoding import Decodes, Decoding
from .drafts import Drafting, Sampled
from .news import News
from .prefix import Prefixes
from .request import FinishReason
from .result import FAULTY, StepResult, TokenLogprobs
from .sequence import Output, Sequence


class Taking:
    """The results of one scheduler's steps, in their order.

    end         ends a sequence for a reason, and returns its last output
    remove      forgets one that has ended by itself
    num_tokens  that were taken
    """

    def __init__(
        self,
        decoding: Decoding,
        drafting: Drafting,
        prefixes: Prefixes,
        end: Callable[[Sequence, FinishReason], Output],
        remove: Callable[[Sequence], None],
    ) -> None:
        self.num_tokens = 0
        self._decoding = decoding
        self._drafting = drafting
        self._prefixes = prefixes
        self._end = end
        self._remove = remove

    def take(self, step: Step, result: StepResult) -> SequenceOf[Output]:
        """The news. Tokens of sequences that have ended since are dropped; a faulty one ends its sequence."""
        assert len(result.token_ids) == len(step.batch.sample_rows), "one token for each row that is sampled"
        if result.prompt_logprobs:
            self._keep_prompt_logprobs(step, result)
        news = self._take_decodes(step.decodes, result) if step.decodes else None
        if news is not None and not step.rest:
            return news
        outputs: list[Output] = [] if news is None else news.others
        count = len(step.decodes)
        tokens = iter(result.token_ids[count:])
        logprobs = repeat(None) if result.logprobs is None else iter(result.logprobs[count:])
        for entry in step.rest:
            if entry.drafts:
                outputs += self._take_drafts(entry, self._drafting.take(entry, tokens, logprobs))
            elif entry.samples:
                outputs += self._take_one(entry.sequence, entry.epoch, entry.end, next(tokens), next(logprobs))
            elif not entry.sequence.is_finished:
                self._note_computed(entry.sequence, entry.epoch, entry.end)
        return outputs if news is None else news

    def _take_decodes(self, decodes: Decodes, result: StepResult) -> News:
        """Those of the sequences that do nothing but decode, which come first."""
        rows, count = decodes.rows, len(decodes)
        sequences, tokens, logprobs = rows.sequences, result.token_ids[:count], result.logprobs
        taken = self._decoding.take(decodes, np.array(tokens, dtype=np.int32))
        texts: Iterable[tuple[list[int], int]] = zip(rows.token_ids, tokens, strict=True)
        chosen = None if np.logical_and.reduce(taken) else taken
        if chosen is not None:
            texts = compress(texts, chosen.tolist())
        deque(starmap(list.append, texts), maxlen=0)  # for all of them at once, without Python's loop
        news = News(rows, tokens, logprobs, chosen)
        self.num_tokens += len(news)
        if self._prefixes.enabled:
            ends = decodes.starts + 1
            for row in np.nonzero(taken & (ends % self._prefixes.block_size == 0))[0].tolist():
                self._prefixes.offer(sequences[row], int(ends[row]))
        for row in () if chosen is None else np.nonzero(~taken)[0].tolist():
            epoch, end = int(decodes.epochs[row]), int(decodes.starts[row]) + 1
            logprob = None if logprobs is None else logprobs[row]
            news.others += self._take_one(sequences[row], epoch, end, tokens[row], logprob)
        return news

    def _take_one(
        self, sequence: Sequence, epoch: int, end: int, token: int, logprob: TokenLogprobs | None
    ) -> list[Output]:
        """The token that was sampled from a sequence's first `end` tokens."""
        if sequence.is_finished:
            return []
        if token == FAULTY:
            return [self._end(sequence, FinishReason.ERROR)]
        sequence.came_back(token)
        self._note_computed(sequence, epoch, end)
        return self._news(sequence, (token,), None if logprob is None else (logprob,))

    def _take_drafts(self, entry: Entry, found: list[Sampled]) -> list[Output]:
        """What was sampled from a sequence's last token and from those of its drafts that were right."""
        sequence = entry.sequence
        if sequence.is_finished:
            return []
        if found[-1][0] == FAULTY:
            return [self._end(sequence, FinishReason.ERROR)]
        taken = self._drafting.accept(entry, found)
        if sequence.lane is not None:
            self._prefixes.offer(sequence, sequence.computed)
        logprobs = tuple(each for _, each in taken if each is not None)
        return self._news(sequence, tuple(token for token, _ in taken), logprobs or None)

    def _news(
        self, sequence: Sequence, tokens: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...] | None
    ) -> list[Output]:
        self.num_tokens += len(tokens)
        output = sequence.output(tokens, logprobs)
        if sequence.is_finished:
            self._remove(sequence)
        return [output]

    def _note_computed(self, sequence: Sequence, epoch: int, end: int) -> None:
        """A step has come back that computed a sequence up to `end`, if it has not been preempted since."""
        if sequence.lane is not None and sequence.epoch == epoch:
            sequence.computed = end
            self._prefixes.offer(sequence, end)

    def _keep_prompt_logprobs(self, step: Step, result: StepResult) -> None:
        """Collect them chunk by chunk; they leave with the sequence's first token."""
        for index, found in result.prompt_logprobs.items():
            entry = step.rest[index - len(step.decodes)]
            kept, start = entry.sequence.prompt_logprobs, entry.start + 1
            if kept:  # not handed out already
                kept[start : start + len(found)] = found
