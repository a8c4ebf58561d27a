"""What comes back from a step: tokens, and logprobs where they were asked for, as plain Python values."""

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import NamedTuple


class TokenLogprobs(NamedTuple):
    """How likely a token was, and which ones were likelier.

    logprob  natural logarithm of the probability, before temperature and penalties
    rank     1 for the most likely token
    top      (token id, logprob) of the most likely tokens, best first, as many as were asked for
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class StepResult:
    """The results of one step, on the host.

    token_ids        sampled tokens, in the order of the batch's `sample_rows`
    logprobs         beside them, None where a sequence asked for none; None if no sequence did
    prompt_logprobs  by index of an entry whose sequence asked for them: of the prompt tokens at positions
                     start + 1 ... min(end, prompt length - 1) of the entry
    """

    token_ids: SequenceOf[int]
    logprobs: SequenceOf[TokenLogprobs | None] | None = None
    prompt_logprobs: Mapping[int, SequenceOf[TokenLogprobs]] = field(default_factory=dict)
