"""What is asked of a server: requests as lengths and shared parts, before there are any tokens.

A prompt is a list of segments. Two segments of one key begin with the same tokens, in whichever requests they stand:
that is how a trace's shared prefixes become prefixes that a cache can hit. `prompts.py` draws the tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Segment:
    """`length` tokens that are a function of the seed and `key` alone; a shorter one is a prefix of a longer one."""

    key: str
    length: int


@dataclass(frozen=True)
class WorkItem:
    """One request to send.

    output_tokens  how many the server is asked for (max_tokens)
    is_under_way   it stands for a request that has run for a while, its prompt for what it has so far (window.py)
    arrival_s      seconds after the first request, as a trace recorded it; None where there is no such time
    """

    segments: tuple[Segment, ...]
    output_tokens: int
    arrival_s: float | None = None
    is_under_way: bool = False

    @property
    def prompt_tokens(self) -> int:
        return sum(segment.length for segment in self.segments)

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens


class Workload(Protocol):
    """A source of requests. `name` stands in records: `512/256`, `paper`, `trace:conv`."""

    @property
    def name(self) -> str: ...

    @property
    def shares_prefixes(self) -> bool:
        """Some prompts begin alike on purpose."""
        ...

    def items(self, count: int | None, seed: int) -> list[WorkItem]:
        """The first `count` requests; the same for the same seed. None: all that a trace has."""
        ...


def drop_long(items: Sequence[WorkItem], max_model_len: int | None) -> tuple[list[WorkItem], int]:
    """The items that fit a context of `max_model_len` tokens, and how many did not."""
    if max_model_len is None:
        return list(items), 0
    kept = [item for item in items if item.total_tokens <= max_model_len]
    return kept, len(items) - len(kept)


def mean_context(items: Sequence[WorkItem]) -> float:
    """Tokens in the cache of a running sequence, averaged over the decode steps of all items.

    A sequence of p prompt and o output tokens attends over p + 1 ... p + o - 1 tokens in its o - 1 decode steps; long
    outputs weigh more because they run longer. This, not the final length, is what a full batch holds on average.
    """
    steps = sum(item.output_tokens - 1 for item in items)
    if not steps:
        return sum(item.prompt_tokens for item in items) / len(items)
    attended = sum(
        (item.output_tokens - 1) * (item.prompt_tokens + item.output_tokens / 2)
        for item in items  # sum of p + i for i = 1 ... o - 1
    )
    return attended / steps
