"""What a client may send: the OpenAI API's fields, and vLLM's extensions under vLLM's names.

null is the same as leaving a field out. Types are strict ("5" is no number), unknown fields are refused by name, and a
few that change nothing here are accepted and ignored. Ranges are checked where the values are used (SamplingParams).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import InvalidRequestError
from ..sampling_params import SamplingParams

IGNORED = "Accepted and ignored."
MAX_FIELDS = 256
MAX_ITEMS = 4096  # of a field, before each is looked at
MAX_MESSAGES = 2**16
MAX_TOKENS = 2**20  # of /tokenize and /detokenize
LONG = ("prompt", "tokens", "messages")  # fields with limits of their own


class Body(BaseModel):
    """A request's JSON object."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _bound(cls, value: Any) -> Any:
        """Without what is null. What is far too much is refused as a whole: to tell each item's fault takes seconds."""
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_FIELDS:
            raise InvalidRequestError(
                "body", f"body must have at most {MAX_FIELDS} fields, got {len(value)}; leave out what is unknown."
            )
        for name, field in value.items():
            if isinstance(field, list | dict) and len(field) > MAX_ITEMS and name not in LONG:
                raise InvalidRequestError(
                    name[:80], f"{name[:80]} must have at most {MAX_ITEMS} items, got {len(field)}; send fewer."
                )
        return {k: v for k, v in value.items() if v is not None}


class StreamOptions(Body):
    include_usage: bool = False
    """A last event with the usage, and no choices."""
    continuous_usage_stats: bool = False
    """Usage so far in every event."""
    include_obfuscation: bool = Field(False, description=IGNORED)


class StructuredOutputs(Body):
    """vLLM's way to say what the text must look like; exactly one of them."""

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="A JSON schema.")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


@dataclass(frozen=True)
class SamplingDefaults:
    """The model's own wishes (generation_config.json), used where a request says nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def read(cls, generation_config: Mapping[str, Any]) -> "SamplingDefaults":
        """What a generation_config.json sets. ValueError (InvalidRequestError) for what cannot be sampled with."""
        wishes = {f.name: generation_config[f.name] for f in fields(cls) if generation_config.get(f.name) is not None}
        SamplingParams(**wishes)
        return cls(**wishes)


class Sampling(Body):
    """Fields that completions and chat have in common."""

    model: str | None = Field(None, description="One of /v1/models; the served one if left out.")
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, description="0 or -1: off.")
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] = Field(default_factory=dict, description="Biases by token id.")
    seed: int | None = None
    n: int = 1
    stop: str | list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    prompt_logprobs: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: int = 0
    cache_salt: str | None = Field(None, max_length=1024)
    response_format: dict[str, Any] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    user: str | None = Field(None, description=IGNORED)
    metadata: dict[str, Any] | None = Field(None, description=IGNORED)
    store: bool | None = Field(None, description=IGNORED)
    service_tier: str | None = Field(None, description=IGNORED)
    safety_identifier: str | None = Field(None, description=IGNORED)
    prompt_cache_key: str | None = Field(None, description=IGNORED)
    spaces_between_special_tokens: bool | None = Field(None, description=IGNORED)

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "stream_options", "stream_options needs stream to be true; set it, or leave stream_options out."
            )
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling_params(self, defaults: SamplingDefaults, **special: Any) -> SamplingParams:
        """The engine's parameters; `special` are those that the two APIs spell differently. InvalidRequestError."""
        top_k = defaults.top_k if self.top_k is None else self.top_k
        params: dict[str, Any] = {
            "max_tokens": self.max_tokens,
            "min_tokens": self.min_tokens,
            "temperature": defaults.temperature if self.temperature is None else self.temperature,
            "top_p": defaults.top_p if self.top_p is None else self.top_p,
            "top_k": 0 if top_k == -1 else top_k,
            "min_p": defaults.min_p if self.min_p is None else self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": (
                defaults.repetition_penalty if self.repetition_penalty is None else self.repetition_penalty
            ),
            "logit_bias": _logit_bias(self.logit_bias),
            "seed": self.seed,
            "n": self.n,
            "stop": self.stops,
            "stop_token_ids": tuple(self.stop_token_ids),
            "ignore_eos": self.ignore_eos,
            "prompt_logprobs": self.prompt_logprobs,
        }
        return SamplingParams(**(params | special))


def _logit_bias(biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    wrong = next((key for key in biases if not (key.isascii() and key.isdigit() and len(key) < 10)), None)
    if wrong is not None:
        raise InvalidRequestError(
            "logit_bias", f"logit_bias must have token ids as its keys, got {wrong[:80]!r}; use /tokenize to find them."
        )
    return tuple((int(key), bias) for key, bias in biases.items())


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Any = Field(
        json_schema_extra={
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        },
        description="A text, token ids, or a list of one of the two.",
    )
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool = Field(False, description="Repeat the prompt before the answer, with its logprobs if asked for.")
    add_special_tokens: bool = Field(True, description="Begin the prompt with what the tokenizer begins texts with.")
    suffix: str | None = Field(None, description="Refused: no model here fills in the middle.")
    best_of: int | None = Field(None, description="Refused unless equal to n.")

    @model_validator(mode="after")
    def _refuse(self) -> "CompletionRequest":
        if self.suffix:
            raise InvalidRequestError("suffix", "suffix is not supported: no model here fills in; leave it out.")
        if self.best_of not in (None, self.n):
            raise InvalidRequestError(
                "best_of", f"best_of must equal n = {self.n}, got {self.best_of}: all samples are returned; set n."
            )
        return self


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(
        max_length=MAX_MESSAGES, description="The conversation: role, content, tool_calls, tool_call_id."
    )
    max_completion_tokens: int | None = Field(None, description="The newer name of max_tokens.")
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] | None = Field(None, description="none, auto, required, or a function to call.")
    parallel_tool_calls: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = Field(False, description="Go on with the last message instead of answering it.")
    add_special_tokens: bool = Field(False, description="Templates write them already.")
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, description="Variables for the chat template.")
    reasoning_effort: str | None = Field(None, description="A variable for the chat template.")
    modalities: list[Literal["text"]] | None = Field(None, description="Text is all there is.")
    prediction: dict[str, Any] | None = Field(None, description=IGNORED)
    verbosity: str | None = Field(None, description=IGNORED)

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeRequest(Body):
    """POST /tokenize: the tokens of a text, or of a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(None, max_length=MAX_MESSAGES)
    tools: list[dict[str, Any]] = Field(default_factory=list)
    add_special_tokens: bool | None = Field(None, description="Default: true for a prompt, false for messages.")
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    """POST /detokenize: the text of tokens."""

    model: str | None = None
    tokens: list[int] = Field(max_length=MAX_TOKENS)


class AbortRequest(Body):
    """POST /v1/abort: end a request by the id of its answer, or by its x-request-id."""

    request_id: str = Field(min_length=1, max_length=256)
