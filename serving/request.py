"""A request, and the sequences it becomes: one for each of its n samples."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from .config import MAX_PRIORITY, SchedulerConfig
from .errors import InvalidRequestError
from .guide import Guide
from .sampling_params import SamplingParams


class FinishReason(StrEnum):
    """Why a sequence ended; STOP and LENGTH are the API's words."""

    STOP = "stop"  # EOS, a stop token id, or a stop string
    LENGTH = "length"  # max_tokens, or the end of the context or the cache
    ABORT = "abort"  # the client left or asked for it
    ERROR = "error"  # the step that computed it failed


@dataclass(frozen=True)
class Request:
    """A prompt and what to do with it, as the front end hands it over.

    priority    lower is sooner, within [-100, 100]; it shifts a request in the queue and never starves another
    cache_salt  requests share cached prefixes only with those of the same salt
    guide       params.guidance, compiled for this model's tokenizer
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: tuple[int, ...] = ()
    priority: int = 0
    cache_salt: str | None = None
    guide: Guide | None = None

    def max_tokens(self, config: SchedulerConfig) -> int:
        """Tokens to generate at most, of each sample.

        Raises InvalidRequestError (`field`: prompt, max_tokens, min_tokens, priority, stop_token_ids, logit_bias) if
        the request cannot be served under these limits, however long it waits.
        """
        length, room = len(self.prompt_token_ids), config.max_sequence_tokens - len(self.prompt_token_ids)
        if not length:
            raise InvalidRequestError(
                "prompt", "prompt must have at least one token, got none; send text, or a BOS token."
            )
        _check_vocabulary("prompt", self.prompt_token_ids, config.vocab_size)
        _check_vocabulary("stop_token_ids", self.params.stop_token_ids, config.vocab_size)
        _check_vocabulary("logit_bias", (token for token, _ in self.params.logit_bias), config.vocab_size)
        if self.params.guidance is not None and self.guide is None:
            raise self.params.guidance.wrong("compiled", "no guide", "give the request a guide of GuideCompiler")
        if not -MAX_PRIORITY <= self.priority <= MAX_PRIORITY:
            span = f"within {-MAX_PRIORITY} and {MAX_PRIORITY}"
            raise InvalidRequestError("priority", f"priority must be {span}, got {self.priority}; use 0.")
        if room < 1:
            raise InvalidRequestError(
                "prompt",
                f"prompt has {length} tokens, at most {config.max_sequence_tokens - 1} leave room for an answer "
                f"({_limit(config)}); shorten it, or serve with a larger {_limit_name(config)}.",
            )
        wanted = self.params.max_tokens
        if wanted is not None and wanted > room:
            raise InvalidRequestError(
                "max_tokens",
                f"max_tokens must be at most {room} after a prompt of {length} tokens ({_limit(config)}), "
                f"got {wanted}; lower it, shorten the prompt, or leave max_tokens out.",
            )
        if self.params.min_tokens > room:
            raise InvalidRequestError(
                "min_tokens",
                f"min_tokens must be at most {room} after a prompt of {length} tokens ({_limit(config)}), "
                f"got {self.params.min_tokens}; lower it or shorten the prompt.",
            )
        return room if wanted is None else wanted


def _limit(config: SchedulerConfig) -> str:
    if config.max_sequence_tokens == config.max_model_len:
        return f"max_model_len is {config.max_model_len}"
    return f"the KV cache holds {config.cache_tokens} tokens"


def _limit_name(config: SchedulerConfig) -> str:
    return "max_model_len" if config.max_sequence_tokens == config.max_model_len else "KV cache"


def _check_vocabulary(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token in token_ids:
        if not 0 <= token < vocab_size:
            raise InvalidRequestError(
                name,
                f"{name} holds token id {token}, the vocabulary ends at {vocab_size - 1}; use this model's tokenizer.",
            )
