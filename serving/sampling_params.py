"""How a request's tokens are chosen and when they end: a frozen value, checked when it is made."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import InvalidRequestError
from .guidance_spec import GuidanceSpec

MAX_N = 128  # samples of one request; each is a sequence of its own
MAX_STOP = 64  # stop strings, and stop token ids
MAX_STOP_LENGTH = 1024  # characters of a stop string: every one delays the stream by as much
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 64
MIN_TEMPERATURE = 1e-5  # below it, sampling is greedy: the quotients would leave the range of numbers


@dataclass(frozen=True)
class SamplingParams:
    """What the OpenAI API and its extensions say of one request; the names are the API's.

    max_tokens      tokens to generate; None: as many as the context and the cache allow
    min_tokens      EOS and stop token ids neither end the text nor are sampled before as many tokens
    temperature     0 is greedy, and so is what is below MIN_TEMPERATURE
    top_k           0 is off
    logit_bias      (token id, bias) pairs, biases within [-100, 100]
    seed            with one, the tokens are the same alone and in any batch; None draws a seed
    logprobs        alternatives to report for each token, 0 is the chosen one alone; None is off
    n               samples of the prompt, numbered 0 ... n - 1
    guidance        what the text must look like: JSON, a regular expression, ...; the request then brings its guide
    stop            strings that end the text; found by the detokenizer, not by the scheduler

    Raises InvalidRequestError, whose `field` is the name of the first field that is wrong.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    guidance: GuidanceSpec | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, None, "ask for at least one token, or leave it out")
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens, "ask for no more than max_tokens")
        _number("temperature", self.temperature, 0, 2, "use 0 for greedy sampling")
        _integer("top_k", self.top_k, 0, None, "use 0 for no limit")
        _number("top_p", self.top_p, 0, 1, "use 1 for no limit", above=True)
        _number("min_p", self.min_p, 0, 1, "use 0 for no limit")
        _number("presence_penalty", self.presence_penalty, -2, 2, "use 0 for none")
        _number("frequency_penalty", self.frequency_penalty, -2, 2, "use 0 for none")
        _number("repetition_penalty", self.repetition_penalty, 0, 10, "use 1 for none", above=True)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**63 - 1, "use a seed of 63 bits, or leave it out")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS, "ask for fewer alternatives, or leave it out")
        _integer("n", self.n, 1, MAX_N, "send further samples as requests of their own")
        if not isinstance(self.ignore_eos, bool):
            raise _wrong("ignore_eos", self.ignore_eos, "true or false", "send a boolean")
        if self.guidance is not None and not isinstance(self.guidance, GuidanceSpec):
            raise _wrong("guidance", self.guidance, "a GuidanceSpec", "make one with the functions of guidance_spec.py")
        _items("stop", self.stop, MAX_STOP, _is_stop_string, f"a string of 1 to {MAX_STOP_LENGTH} characters")
        _items("stop_token_ids", self.stop_token_ids, MAX_STOP, _is_token_id, "a token id, 0 or above")
        _items("logit_bias", self.logit_bias, MAX_LOGIT_BIAS, _is_bias, "a token id and a bias within [-100, 100]")

    @property
    def is_greedy(self) -> bool:
        """The most likely token is taken, without a draw."""
        return self.temperature < MIN_TEMPERATURE


def _wrong(field: str, value: object, needed: str, advice: str) -> InvalidRequestError:
    return InvalidRequestError(field, f"{field} must be {needed}, got {str(value)[:80]!r}; {advice}.")


def _integer(field: str, value: object, low: int, high: int | None, advice: str) -> None:
    if not _is_int(value) or value < low or (high is not None and value > high):  # type: ignore[operator]
        span = f"at least {low}" if high is None else f"within {low} and {high}"
        raise _wrong(field, value, f"an integer {span}", advice)


def _number(field: str, value: object, low: float, high: float, advice: str, above: bool = False) -> None:
    """`above`: the lower end itself is refused."""
    fits = _is_number(value) and low <= value <= high and not (above and value == low)  # type: ignore[operator]
    if not fits:
        span = f"above {low} and at most {high}" if above else f"within {low} and {high}"
        raise _wrong(field, value, f"a number {span}", advice)


def _items(field: str, values: object, limit: int, fits: Callable[[Any], bool], needed: str) -> None:
    if not isinstance(values, tuple):
        raise _wrong(field, values, "a tuple", "convert the list before making the parameters")
    if len(values) > limit:
        raise _wrong(field, f"{len(values)} items", f"at most {limit} items", "send fewer")
    for value in values:
        if not fits(value):
            raise _wrong(field, value, f"items that are each {needed}", "correct or drop this one")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_token_id(value: object) -> bool:
    return _is_int(value) and value >= 0  # type: ignore[operator]


def _is_stop_string(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_STOP_LENGTH


def _is_bias(value: object) -> bool:
    if not (isinstance(value, tuple) and len(value) == 2):
        return False
    return _is_token_id(value[0]) and _is_number(value[1]) and -100 <= value[1] <= 100
