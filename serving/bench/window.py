"""A steady state without waiting for it: a run that begins in the middle, and the part of it that is measured.

A server that has been busy for long holds requests of every age. Beginning with none, a run needs a request's whole
life to get there, and its rate up to then is not what the server delivers. So the first requests of a windowed run are
those that a long run would find under way: drawn by how long they run, each with a part of its answer, of any length
alike, already in its prompt. New requests follow as these end, and the run is cut when a full batch has been measured
for long enough.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .sample import Sample
from .workload import Segment, WorkItem

STEADY = "steady:"  # before the lengths of a workload whose steady state is to be measured
WINDOW_S = 4.0  # of it, unless something else is asked for: some hundred steps
FULL = 0.9  # share of the largest batch from which on a step counts as full


@dataclass(frozen=True)
class StepTime:
    """One call from the engine: when, with how many sequences' tokens, and how many tokens."""

    at_s: float
    sequences: int
    tokens: int


def mid_life(items: Sequence[WorkItem], count: int, seed: int) -> list[WorkItem]:
    """`count` requests as a steady state of `items` holds them.

    An item is drawn in proportion to its output tokens, since longer ones are under way for longer; of its o output
    tokens 0 ... o - 1, all alike, are done and stand at the end of its prompt. Both draws are stratified.
    """
    rng = np.random.default_rng((seed, count))
    weights = np.cumsum([item.output_tokens for item in items], dtype=np.float64)
    places = np.searchsorted(weights, _spread(rng, count) * weights[-1], side="right")
    found = []
    for number, (place, done) in enumerate(zip(places, _spread(rng, count), strict=True)):
        item = items[int(place)]
        age = int(done * item.output_tokens)
        # of its own from the first token on, as no two drawn requests share what they said
        segments = (Segment(f"under way {number}", item.prompt_tokens + age),)
        found.append(WorkItem(segments, item.output_tokens - age, is_under_way=True))
    return found


def _spread(rng: np.random.Generator, count: int) -> np.ndarray:
    """[count] numbers in 0 <= x < 1, uniform, one in each of `count` equal parts, shuffled.

    Requests then end at even distances: a short window holds as many ends, and new prompts, as a long one would.
    """
    return rng.permutation((np.arange(count) + rng.random(count)) / count)


def full_window(steps: Sequence[StepTime]) -> tuple[float, float] | None:
    """From the first to the last step of a full batch, in seconds; None for fewer than two such steps."""
    batch = max((step.sequences for step in steps), default=0)
    full = [step.at_s for step in steps if step.sequences >= FULL * batch]
    return (full[0], full[-1]) if len(full) > 1 else None


def within(samples: Sequence[Sample], start_s: float, end_s: float) -> list[Sample]:
    """What the samples did in start_s < t <= end_s; those that did nothing then are left out.

    A sample that began before has no TTFT, and is due when the window begins.
    """
    found = []
    for sample in samples:
        token_s = [t for t in sample.token_s if start_s < t <= end_s]
        if not token_s:
            continue
        is_begun = sample.token_s[0] <= start_s
        tokens = len(token_s) if sample.error is None else sample.output_tokens
        cut = replace(sample, token_s=token_s, output_tokens=tokens, end_s=min(sample.end_s, end_s))
        if is_begun or sample.due_s < start_s:
            cut = replace(cut, due_s=start_s, sent_s=start_s, free_s=start_s, is_cut=True)
        found.append(cut)
    return found
