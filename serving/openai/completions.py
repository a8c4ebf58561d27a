"""POST /v1/completions: texts or token ids go on."""

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..errors import InvalidRequestError
from ..frontend import new_id
from ..result import TokenLogprobs
from ..stream import Chunk, Stream
from ..tokenizer import Tokenizer
from .answers import ErrorEvents, beside_others, respond
from .guidance import guidance_spec
from .logprobs import completion_logprobs, prompt_logprobs, told
from .protocol import CompletionRequest
from .service import Service, usage
from .sse import DONE, event


@dataclass(frozen=True)
class Prompt:
    text: str
    token_ids: list[int]


async def complete(service: Service, http: HttpRequest) -> Response:
    """The answer, as JSON or as events."""
    body = await service.read(http, CompletionRequest)
    prompts = await _prompts(service, body)
    is_echo_only = body.echo and body.max_tokens == 0  # the engine makes at least one token: it is dropped below
    wanted = [k for k in (body.prompt_logprobs, body.logprobs if body.echo else None) if k is not None]
    params = body.sampling_params(
        service.defaults,
        max_tokens=1 if is_echo_only else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=max(wanted, default=None),
        guidance=guidance_spec(body),
    )
    _check_stream(body)
    guide = await service.compile(params.guidance)
    request_id = new_id("cmpl")
    ids = [prompt.token_ids for prompt in prompts]
    stream = service.open(http, request_id, ids, params, body, guide, body.skip_special_tokens)
    answer = Answer(service, request_id, body, prompts, stream, is_echo_only)
    return await respond(http, answer, stream, in_events=body.stream)


async def _prompts(service: Service, body: CompletionRequest) -> list[Prompt]:
    """Every prompt as text and tokens; InvalidRequestError if it is neither."""
    prompt = body.prompt
    several = prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else [prompt]
    if len(several) > service.limits.max_prompts:
        limit = service.limits.max_prompts
        raise InvalidRequestError("prompt", f"prompt must have at most {limit} texts, got {len(several)}; send fewer.")
    made = []
    for one in several:
        made.append(await _prompt(service, body, one))
        await asyncio.sleep(0)  # short texts are encoded here, a millisecond each; others are served in between
    return made


async def _prompt(service: Service, body: CompletionRequest, prompt: Any) -> Prompt:
    tokenizer = service.frontend.tokenizer
    if isinstance(prompt, str):
        return Prompt(prompt, await service.encode("prompt", prompt, body.add_special_tokens))
    if isinstance(prompt, list) and all(type(token) is int and 0 <= token < 2**31 for token in prompt):
        text = tokenizer.decode(prompt) if body.echo and len(prompt) <= service.max_model_len else ""
        return Prompt(text, prompt)
    raise InvalidRequestError(
        "prompt", f"prompt must be a text, token ids, or a list of one of the two, got {str(prompt)[:80]!r}; send that."
    )


def _check_stream(body: CompletionRequest) -> None:
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequestError(
            "prompt_logprobs", "prompt_logprobs do not come as a stream; leave out stream, or prompt_logprobs."
        )
    if body.stream and body.echo and body.logprobs is not None and body.n > 1:
        raise InvalidRequestError("n", f"n must be 1 for a stream with echo and logprobs, got {body.n}; lower it.")


@dataclass
class Choice:
    """What one sample has said so far, and what of the prompt goes before it."""

    shown: int = 0  # characters
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    is_begun: bool = False
    last: Chunk | None = None


class Answer:
    """Makes the answer of a stream's chunks."""

    def __init__(
        self,
        service: Service,
        request_id: str,
        body: CompletionRequest,
        prompts: list[Prompt],
        stream: Stream,
        is_echo_only: bool,
    ) -> None:
        self.body = body
        self.prompts = prompts
        self.stream = stream
        self.is_echo_only = is_echo_only
        self.tokenizer: Tokenizer = service.frontend.tokenizer
        self.head = {"id": request_id, "created": int(time.time()), "model": service.names[0]}
        self.choices = [Choice() for _ in range(len(prompts) * body.n)]
        self.of_prompts: dict[int, tuple[TokenLogprobs, ...]] = {}
        self.cached = [0] * len(prompts)

    async def whole(self) -> dict[str, Any]:
        async for chunk in self.stream:
            self._take(chunk)
        count = sum(map(told, (*self.of_prompts.values(), *(choice.logprobs for choice in self.choices))))
        return await beside_others(count, self._whole)

    def _whole(self) -> dict[str, Any]:
        choices = []
        for index, choice in enumerate(self.choices):
            self._begin(index, choice)
            made = self._choice(index, choice)
            if self.body.prompt_logprobs is not None:
                found = self.of_prompts.get(index // self.body.n, ())
                made["prompt_logprobs"] = prompt_logprobs(self.tokenizer, found)
            choices.append(made)
        return {**self.head, "object": "text_completion", "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        options = self.body.stream_options
        with_usage = options is not None and options.include_usage
        errors = ErrorEvents()
        async for chunk in errors.catch(self.stream):
            choice = self.choices[chunk.index]
            self._take(chunk)
            self._begin(chunk.index, choice)
            choices = [await beside_others(told(choice.logprobs), partial(self._choice, chunk.index, choice))]
            made = {**self.head, "object": "text_completion", "choices": choices}
            if with_usage:
                made["usage"] = self._usage() if options and options.continuous_usage_stats else None
            yield event(made)
            choice.shown += len(choice.text)
            choice.text, choice.token_ids, choice.logprobs = "", [], []
        for data in errors.events():
            yield data
        if with_usage and not errors.found:
            yield event({**self.head, "object": "text_completion", "choices": [], "usage": self._usage()})
        yield DONE

    def _take(self, chunk: Chunk) -> None:
        choice = self.choices[chunk.index]
        choice.last = chunk
        self.cached[chunk.index // self.body.n] = chunk.cached_tokens
        if chunk.prompt_logprobs is not None:
            self.of_prompts[chunk.index // self.body.n] = chunk.prompt_logprobs
        if not self.is_echo_only:
            choice.text += chunk.text
            choice.token_ids += chunk.token_ids
            choice.logprobs += chunk.logprobs or ()

    def _begin(self, index: int, choice: Choice) -> None:
        """Put the prompt before the first piece of text, if it was asked for."""
        if choice.is_begun or not self.body.echo:
            return
        choice.is_begun = True
        prompt = self.prompts[index // self.body.n]
        choice.text = prompt.text + choice.text
        choice.token_ids = [*prompt.token_ids, *choice.token_ids]
        if self.body.logprobs is not None:
            k = self.body.logprobs
            found = self.of_prompts.get(index // self.body.n, ())
            choice.logprobs = [None, *(each._replace(top=each.top[:k]) for each in found), *choice.logprobs]

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        logprobs, last = None, choice.last
        if self.body.logprobs is not None:
            logprobs = completion_logprobs(self.tokenizer, choice.logprobs, choice.token_ids, choice.shown)
        assert last is not None, "every sample has a last chunk"
        reason = last.finish_reason
        return {
            "index": index,
            "text": choice.text,
            "logprobs": logprobs,
            "finish_reason": "length" if self.is_echo_only and reason else reason,
            "stop_reason": None if self.is_echo_only else last.stop_reason,
        }

    def _usage(self) -> dict[str, Any]:
        made = 0 if self.is_echo_only else self.stream.completion_tokens
        return usage(sum(self.stream.prompt_tokens), made, sum(self.cached))
