"""Guesses at a sequence's next tokens within a schedule: how many fit, and how far they were right.

What is guessed is serving/ngram.py's business. A step computes a sequence's last token and its drafts and samples from
each; the drafts are right as far as they are what was sampled before them. What was computed for wrong ones lies beyond
`Sequence.computed` and is overwritten.
"""

from collections.abc import Callable, Iterable, Iterator

from .batch import Entry
from .block_manager import BlockManager
from .config import SchedulerConfig
from .result import FAULTY, TokenLogprobs
from .sequence import Sequence

Sampled = tuple[int, TokenLogprobs | None]


class Drafting:
    """The guesses of one scheduler.

    extend    writes a sequence's new blocks into its lane
    proposed  drafts that were checked, and accepted: those of them that were right
    """

    def __init__(self, config: SchedulerConfig, blocks: BlockManager, extend: Callable[[Sequence], None]) -> None:
        self.config = config
        self.blocks = blocks
        self.proposed = 0
        self.accepted = 0
        self._extend = extend

    def propose(self, sequence: Sequence, spare: int) -> tuple[int, ...]:
        """At most `spare` guesses at what follows a sequence's last token, with blocks for them.

        Nobody is preempted for a guess.
        """
        assert sequence.ngrams is not None
        length, blocks = sequence.length, self.blocks
        most = min(self.config.num_speculative_tokens, spare, sequence.max_length - length - 1)
        drafts = sequence.ngrams.propose(sequence.token_ids, most)
        if not drafts:
            return ()
        if blocks.num_free > self.config.watermark_blocks and blocks.append(sequence.sequence_id, length + len(drafts)):
            self._extend(sequence)
        return drafts[: len(blocks.table(sequence.sequence_id)) * self.config.block_size - length]

    def take(self, entry: Entry, tokens: Iterator[int], logprobs: Iterator[TokenLogprobs | None]) -> list[Sampled]:
        """What was sampled from a sequence's last token and from its drafts, as far as the drafts were right.

        Takes one item for each row from both iterators; a token may be FAULTY, then it is the last.
        """
        found = [(next(tokens), next(logprobs)) for _ in range(1 + len(entry.drafts))]
        right = 0
        while right < len(entry.drafts) and found[right][0] == entry.drafts[right]:
            right += 1
        return found[: right + 1]

    def accept(self, entry: Entry, found: Iterable[Sampled]) -> list[Sampled]:
        """Append tokens to the entry's sequence until it ends; returns those that it took."""
        sequence, taken = entry.sequence, []
        sequence.pending -= 1
        for token, logprob in found:
            assert token != FAULTY
            if sequence.is_finished:
                break
            sequence.append(token)
            taken.append((token, logprob))
        self.proposed += len(entry.drafts)
        self.accepted += len(taken) - 1
        if sequence.lane is not None and sequence.epoch == entry.epoch:  # not preempted since
            sequence.scheduled = sequence.computed = entry.start + len(taken)  # the rest was computed for wrong tokens
        return taken
