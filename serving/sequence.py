"""A sequence: the tokens of one sample, and how far steps have come with them.

    token_ids   known tokens: the prompt, then what was sampled and has come back
    pending     tokens that scheduled steps will sample and that have not come back
    scheduled   leading tokens whose keys and values scheduled steps have computed or will compute
    computed    those of them whose steps have come back

A sequence lacks the steps for `length - scheduled` tokens, where length = len(token_ids) + pending: a whole prompt at
first, one token in decode, all of it again after a preemption.
"""

from typing import TYPE_CHECKING, NamedTuple

from .ngram import NgramIndex
from .request import FinishReason, Request
from .result import TokenLogprobs

if TYPE_CHECKING:
    from .decoding import Decoding


class Output(NamedTuple):  # made for every token: a named tuple takes a third of a frozen dataclass's time
    """News of one sequence: what `Scheduler.update` hands to the front end.

    token_ids      new tokens, in order; an EOS or stop token that ended the sequence is among them
    finish_reason  None while it runs; no output follows one that has a reason
    stop_token     the EOS or stop token id that ended it
    cached_tokens  prompt tokens that came from the prefix cache when it was first admitted
    logprobs       beside token_ids; None if the request asked for none
    prompt_logprobs  of the prompt's tokens but the first, with the first token of sample 0; None otherwise
    """

    request_id: str
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None


class Sequence:
    """State of one sample of a request; only the scheduler changes it.

    decoding  holds `scheduled`, `computed` and `pending` while all that steps do with the sequence is to decode
    """

    def __init__(self, sequence_id: int, request: Request, index: int, max_tokens: int, order: tuple[int, int]) -> None:
        self.sequence_id = sequence_id
        self.request = request
        self.request_id = request.request_id
        self.params = request.params
        self.index = index
        self.max_tokens = max_tokens
        self.order = order  # (virtual arrival in steps, number of arrival); lower is served first
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt = len(self.token_ids)
        self.stop_token_ids = frozenset(self.params.stop_token_ids) | (
            frozenset() if self.params.ignore_eos else frozenset(request.eos_token_ids)
        )
        # a guide allows EOS where the text fits, and forces it where nothing else may follow: then it ends in any case
        self.guided_ends = frozenset(request.eos_token_ids) if request.guide is not None else frozenset()
        self.max_length = self.num_prompt + max_tokens  # of the whole text
        self.min_length = self.num_prompt + self.params.min_tokens  # before EOS and stop tokens count
        self.ngrams: NgramIndex | None = None  # where drafts come from, if its tokens are guessed at all
        self.digests: list[bytes] = []  # of the full blocks of token_ids, as far as they were needed
        self.registered = 0  # leading blocks of the current table that were offered to the prefix cache
        self.decoding: Decoding | None = None
        self._pending = 0
        self._scheduled = 0
        self._computed = 0
        self.lane: int | None = None  # row of the runner's per-sequence state while running
        self.epoch = 0  # admissions so far: tells a step's entries from before a preemption
        self.cached_tokens = 0
        self.num_preemptions = 0
        # of the prompt's tokens, by position; the first has none
        self.prompt_logprobs: list[TokenLogprobs | None] = [None] * (self.num_prompt if self.computes_prompt else 0)
        self.finish_reason: FinishReason | None = None
        self.stop_token: int | None = None

    def __repr__(self) -> str:
        state = self.finish_reason or ("waiting" if self.lane is None else "running")
        return f"Sequence({self.request.request_id!r}[{self.index}], {self.scheduled}/{self.length} tokens, {state})"

    @property
    def scheduled(self) -> int:
        return self._scheduled if self.decoding is None else int(self.decoding.scheduled[self.lane])

    @scheduled.setter
    def scheduled(self, count: int) -> None:
        assert self.decoding is None
        self._scheduled = count

    @property
    def computed(self) -> int:
        return self._computed if self.decoding is None else int(self.decoding.computed[self.lane])

    @computed.setter
    def computed(self, count: int) -> None:
        if self.decoding is None:
            self._computed = count
        else:
            self.decoding.computed[self.lane] = count

    @property
    def pending(self) -> int:
        return self._pending if self.decoding is None else self.scheduled + 1 - len(self.token_ids)

    @pending.setter
    def pending(self, count: int) -> None:
        assert self.decoding is None
        self._pending = count

    @property
    def length(self) -> int:
        """Tokens, those that are pending included."""
        return len(self.token_ids) + self.pending

    @property
    def num_output(self) -> int:
        """Sampled tokens that have come back."""
        return len(self.token_ids) - self.num_prompt

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def is_decode(self) -> bool:
        """One sampled token is all that is left to compute."""
        length = len(self.token_ids) + self.pending
        return length - self.scheduled == 1 and length > self.num_prompt

    @property
    def is_sampled_out(self) -> bool:
        """Scheduled steps sample its last token already."""
        return self.length >= self.max_length

    @property
    def computes_prompt(self) -> bool:
        """Every prompt token must run through the model, cached or not: their logprobs are wanted, once a request."""
        return self.params.prompt_logprobs is not None and self.index == 0 and not self.num_output

    def came_back(self, token: int) -> None:
        """Take a token that was pending, as `append` does."""
        if self.decoding is None:
            self._pending -= 1
        else:
            assert self.lane is not None
            self.decoding.came_back(self.lane, token)
        self.append(token)

    def append(self, token: int) -> None:
        """Take a token that came back; sets `finish_reason` if it is the last."""
        token_ids = self.token_ids
        token_ids.append(token)
        if (token in self.stop_token_ids and len(token_ids) >= self.min_length) or token in self.guided_ends:
            self.finish_reason, self.stop_token = FinishReason.STOP, token
        elif len(token_ids) >= self.max_length:
            self.finish_reason = FinishReason.LENGTH

    def output(self, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...] | None = None) -> Output:
        of_prompt: tuple[TokenLogprobs, ...] | None = None
        if self.prompt_logprobs and token_ids:
            found = [each for each in self.prompt_logprobs if each is not None]
            assert len(found) == self.num_prompt - 1, "a prompt token's logprob was never computed"
            of_prompt, self.prompt_logprobs = tuple(found), []
        return Output(
            self.request_id,
            self.index,
            token_ids,
            self.finish_reason,
            self.stop_token,
            self.cached_tokens,
            logprobs,
            of_prompt,
        )
