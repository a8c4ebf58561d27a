"""The queue: sequences that wait for blocks and a lane."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from .sequence import Sequence

_order = attrgetter("order")


class Waiting:
    """Sorted by `Sequence.order`: the head is next, whatever is behind it.

    num_new     sequences that never ran; the others were preempted
    new_tokens  their prompts'
    """

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []
        self.num_new = 0
        self.new_tokens = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def head(self) -> Sequence | None:
        return self._sequences[0] if self._sequences else None

    def add(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=_order)
        self._count(sequence, 1)

    def remove(self, sequence: Sequence) -> None:
        """Take out one that is there, before its first run is noted in it."""
        del self._sequences[bisect_left(self._sequences, sequence.order, key=_order)]
        self._count(sequence, -1)

    def _count(self, sequence: Sequence, change: int) -> None:
        if sequence.epoch == 0:
            self.num_new += change
            self.new_tokens += change * sequence.num_prompt

    def check(self) -> None:
        """Assert what must hold between any two calls."""
        found = self._sequences
        assert found == sorted(found, key=_order), "the queue is out of order"
        assert all(s.lane is None for s in found), "a waiting sequence has a lane"
        new = [s for s in found if s.epoch == 0]
        assert (self.num_new, self.new_tokens) == (len(new), sum(s.num_prompt for s in new))
