"""What all endpoints share: the served model's names and limits, and the way from a body to the engine's requests."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from ..errors import InvalidRequestError
from ..frontend import Frontend
from ..guidance import GuideCompiler
from ..guidance_spec import GuidanceSpec
from ..guide import Guide
from ..request import Request
from ..sampling_params import SamplingParams
from ..stream import Stream
from .body import Bodies, read_json
from .errors import ApiError
from .protocol import Body, Sampling, SamplingDefaults

B = TypeVar("B", bound=Body)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of the HTTP side; the engine has its own."""

    max_body_bytes: int = 32 * 2**20
    body_timeout_s: float = 60.0
    max_bodies_bytes: int = 2**30  # of all bodies that are being read
    max_prompts: int = 1024
    max_samples: int = 4096  # of all prompts together
    max_prompt_logprobs: int = 2**20  # of all prompts together, alternatives included: 70 MB of JSON


@dataclass(frozen=True)
class Service:
    """The served model.

    names       what clients may call it; the first is what answers say
    root        where its weights came from
    tool_parser how its tool calls are written (tools.PARSERS), or None if it makes none
    compiler    of structured output; None for a model without a tokenizer
    """

    frontend: Frontend
    names: tuple[str, ...]
    root: str = ""
    eos_token_ids: tuple[int, ...] = ()
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    limits: Limits = field(default_factory=Limits)
    tool_parser: str | None = None
    compiler: GuideCompiler | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def bodies(self) -> Bodies:
        return Bodies(self.limits.max_bodies_bytes)

    @property
    def max_model_len(self) -> int:
        return self.frontend.engine.config.max_sequence_tokens

    async def read(self, http: HttpRequest, model: type[B]) -> B:
        """The request's body, checked, for a model that is served here. ApiError or pydantic's ValidationError."""
        value = await read_json(http, self.limits.max_body_bytes, self.limits.body_timeout_s, self.bodies)
        body = model.model_validate(value)
        name = getattr(body, "model", None)
        if name is not None and name not in self.names:
            served = ", ".join(self.names)
            raise ApiError(
                400, f"model {name[:200]!r} does not exist here; use {served}.", "model", code="model_not_found"
            )
        return body

    async def close(self) -> None:
        """Stop the engine, and the threads and processes that help it."""
        await self.frontend.close()
        if self.compiler is not None:
            self.compiler.close()

    async def encode(self, field: str, text: str, add_special_tokens: bool) -> list[int]:
        return await self.frontend.tokenizer.encode(field, text, add_special_tokens, self.max_model_len)

    async def compile(self, spec: GuidanceSpec | None) -> Guide | None:
        """The guide for a specification; InvalidRequestError if it has none."""
        if spec is None:
            return None
        if self.compiler is None:
            raise spec.wrong("left out for a model without a tokenizer", spec.kind, "do so")
        return await self.compiler.compile_async(spec)

    def open(
        self,
        http: HttpRequest,
        prefix: str,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        body: Sampling,
        guide: Guide | None,
        skip_special_tokens: bool,
    ) -> Stream:
        """Hand the prompts to the engine as one stream. Notes in the request's log line what it is about."""
        if len(prompts) > self.limits.max_prompts:
            raise InvalidRequestError(
                "prompt",
                f"prompt must have at most {self.limits.max_prompts} texts, got {len(prompts)}; send several requests.",
            )
        most, samples = self.limits.max_samples, len(prompts) * params.n
        if (
            samples > most
        ):  # 1024 texts and n = 128 would hold the event loop for a second before the queue refuses them
            raise InvalidRequestError(
                "prompt",
                f"prompt asks for {samples} samples ({len(prompts)} texts, n = {params.n}), at most {most} are "
                "served; send several requests.",
            )
        told = 0 if params.prompt_logprobs is None else sum(map(len, prompts)) * (1 + params.prompt_logprobs)
        if told > self.limits.max_prompt_logprobs:
            field = "logprobs" if body.prompt_logprobs is None else "prompt_logprobs"
            raise InvalidRequestError(
                field,
                f"{field} asks for {told} logprobs of the prompt, at most {self.limits.max_prompt_logprobs} are told; "
                "ask for fewer alternatives, or send several requests.",
            )
        log: dict[str, Any] = http.state.log
        requests = [
            Request(
                request_id=f"{prefix}-{place}" if len(prompts) > 1 else prefix,
                prompt_token_ids=tuple(ids),
                params=params,
                eos_token_ids=self.eos_token_ids,
                priority=body.priority,
                cache_salt=body.cache_salt,
                guide=guide,
            )
            for place, ids in enumerate(prompts)
        ]
        names = (prefix, http.state.request_id)
        stream = self.frontend.open(requests, skip_special_tokens, body.include_stop_str_in_output, names)
        log |= {"id": prefix, "prompt_tokens": sum(map(len, prompts)), "n": len(prompts) * params.n}
        log["stream"] = stream
        return stream


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
