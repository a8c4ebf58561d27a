"""What comes back from a step: tokens, and logprobs where they were asked for, as plain Python values."""

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import NamedTuple

from atom.kernels.draw_config import FAULTY as FAULTY


class TokenLogprobs(NamedTuple):
    """How likely a token was, and which tokens were the most likely.

    logprob  natural logarithm of the probability, by the model's own distribution
    top      (token id, logprob) of the most likely tokens, best first, as many as were asked for
    rank     1 where no token was likelier
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 1


@dataclass(frozen=True)
class StepResult:
    """The results of one step, on the host.

    token_ids        sampled tokens, in the order of the batch's `sample_rows`; FAULTY where there was none to sample
    logprobs         beside them, None where a sequence asked for none; None if no sequence did
    prompt_logprobs  by index of an entry whose sequence asked for them: of the prompt tokens at positions
                     start + 1 ... min(end, prompt length - 1) of the entry
    """

    token_ids: SequenceOf[int]
    logprobs: SequenceOf[TokenLogprobs | None] | None = None
    prompt_logprobs: Mapping[int, SequenceOf[TokenLogprobs]] = field(default_factory=dict)
