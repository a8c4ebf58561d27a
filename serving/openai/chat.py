"""POST /v1/chat/completions: a conversation goes on, with tools if there are any."""

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..errors import InvalidRequestError
from ..frontend import new_id
from ..request import FinishReason
from ..result import TokenLogprobs
from ..stream import Chunk, Stream
from .answers import ErrorEvents, beside_others, respond
from .guidance import guidance_spec
from .logprobs import chat_logprobs, prompt_logprobs, told
from .messages import template_messages
from .protocol import ChatRequest
from .service import Service, usage
from .sse import DONE, event
from .tool_choice import ToolUse, choose_tools
from .tools import Piece, ToolReader


async def chat(service: Service, http: HttpRequest) -> Response:
    """The answer, as JSON or as events."""
    body = await service.read(http, ChatRequest)
    use = choose_tools(body, service.tool_parser)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs", "top_logprobs needs logprobs to be true; set it.")
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequestError(
            "prompt_logprobs", "prompt_logprobs do not come as a stream; leave out stream, or prompt_logprobs."
        )
    params = body.sampling_params(
        service.defaults,
        max_tokens=body.token_limit,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        guidance=use.guidance or guidance_spec(body),
    )
    text = await render(service, body, body.reasoning_effort)
    ids = await service.encode("messages", text, body.add_special_tokens)
    guide = await service.compile(params.guidance)
    request_id = new_id("chatcmpl")
    skip_special_tokens = body.skip_special_tokens and not use.reads_special_tokens
    stream = service.open(http, request_id, [ids], params, body, guide, skip_special_tokens)
    answer = Answer(service, request_id, body, use, stream)
    return await respond(http, answer, stream, in_events=body.stream)


async def render(service: Service, body: Any, reasoning_effort: str | None = None) -> str:
    """The conversation in the model's own form; `body` is a ChatRequest or a TokenizeRequest."""
    if body.continue_final_message and body.add_generation_prompt and "add_generation_prompt" in body.model_fields_set:
        raise InvalidRequestError(
            "continue_final_message", "continue_final_message needs add_generation_prompt to be false; set one of them."
        )
    variables = dict(body.chat_template_kwargs)
    if reasoning_effort is not None:
        variables["reasoning_effort"] = reasoning_effort
    is_without_tools = getattr(body, "tool_choice", None) == "none"
    return await service.frontend.tokenizer.render(
        template_messages(body.messages),
        None if is_without_tools else body.tools,
        body.add_generation_prompt and not body.continue_final_message,
        body.continue_final_message,
        variables,
    )


@dataclass
class Choice:
    """What one sample has said so far; `new` is what no event has told yet."""

    reader: ToolReader | None
    is_begun: bool = False
    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    new: list[Piece] = field(default_factory=list)
    last: Chunk | None = None

    def take(self, chunk: Chunk) -> None:
        self.last = chunk
        self.logprobs += chunk.logprobs or ()
        if self.reader is None:
            pieces = [Piece(chunk.text)] if chunk.text or chunk.finish_reason is None else []
        else:
            pieces = self.reader.feed(chunk.text)
            if chunk.finish_reason is not None:
                pieces += self.reader.finish()
        for piece in pieces:
            self._add(piece)
        self.new += pieces

    def _add(self, piece: Piece) -> None:
        if piece.call is None:
            self.content += piece.text
        elif piece.name is not None:
            function = {"name": piece.name, "arguments": piece.text}
            self.calls.append({"id": piece.id, "type": "function", "function": function})
        else:
            self.calls[piece.call]["function"]["arguments"] += piece.text


class Answer:
    """Makes the answer of a stream's chunks."""

    def __init__(self, service: Service, request_id: str, body: ChatRequest, use: ToolUse, stream: Stream) -> None:
        self.body = body
        self.use = use
        self.stream = stream
        self.tokenizer = service.frontend.tokenizer
        self.head = {"id": request_id, "created": int(time.time()), "model": service.names[0]}
        self.choices = [Choice(use.reader()) for _ in range(body.n)]
        self.of_prompt: tuple[TokenLogprobs, ...] | None = None
        self.cached_tokens = 0

    async def whole(self) -> dict[str, Any]:
        async for chunk in self.stream:
            self._take(chunk)
        count = told(self.of_prompt or ()) + sum(told(choice.logprobs) for choice in self.choices)
        return await beside_others(count, self._whole)

    def _whole(self) -> dict[str, Any]:
        answer: dict[str, Any] = {**self.head, "object": "chat.completion"}
        answer["choices"] = [self._whole_choice(index, choice) for index, choice in enumerate(self.choices)]
        answer["usage"] = self._usage()
        if self.of_prompt is not None:
            answer["prompt_logprobs"] = prompt_logprobs(self.tokenizer, self.of_prompt)
        return answer

    async def events(self) -> AsyncGenerator[bytes, None]:
        errors = ErrorEvents()
        async for chunk in errors.catch(self.stream):
            self._take(chunk)
            choice = self.choices[chunk.index]
            if not choice.is_begun:
                choice.is_begun = True
                yield self._event(chunk.index, {"role": "assistant", "content": ""})
            for piece in choice.new:
                yield self._event(chunk.index, self._delta(piece), choice)
            choice.new = []
            if chunk.finish_reason is not None:
                yield self._event(chunk.index, {}, choice, self._reason(choice), chunk.stop_reason)
        for data in errors.events():
            yield data
        if self._with_usage and not errors.found:
            yield event({**self.head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage()})
        yield DONE

    def _take(self, chunk: Chunk) -> None:
        self.choices[chunk.index].take(chunk)
        self.cached_tokens = chunk.cached_tokens if chunk.index == 0 else self.cached_tokens
        self.of_prompt = self.of_prompt or chunk.prompt_logprobs

    @property
    def _with_usage(self) -> bool:
        return self.body.stream_options is not None and self.body.stream_options.include_usage

    def _delta(self, piece: Piece) -> dict[str, Any]:
        if piece.call is None:
            return {"content": piece.text}
        call: dict[str, Any] = {"index": piece.call, "function": {"arguments": piece.text}}
        if piece.name is not None:
            call |= {"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": piece.text}}
        return {"tool_calls": [call]}

    def _event(
        self,
        index: int,
        delta: dict[str, Any],
        choice: Choice | None = None,
        reason: str | None = None,
        stop_reason: int | str | None = None,
    ) -> bytes:
        """One event; the first one of a choice that has logprobs to tell tells them."""
        logprobs = None
        if self.body.logprobs and choice is not None and choice.logprobs:
            logprobs, choice.logprobs = chat_logprobs(self.tokenizer, choice.logprobs), []
        made: dict[str, Any] = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        if reason is not None:
            made["stop_reason"] = stop_reason
        chunk: dict[str, Any] = {**self.head, "object": "chat.completion.chunk", "choices": [made]}
        if self._with_usage:
            options = self.body.stream_options
            chunk["usage"] = self._usage() if options and options.continuous_usage_stats else None
        return event(chunk)

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        assert choice.last is not None, "every sample has a last chunk"
        message: dict[str, Any] = {"role": "assistant", "content": choice.content, "refusal": None}
        if choice.calls:
            message["content"] = choice.content or None
            message["tool_calls"] = choice.calls
        return {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(self.tokenizer, choice.logprobs) if self.body.logprobs else None,
            "finish_reason": self._reason(choice),
            "stop_reason": choice.last.stop_reason,
        }

    def _reason(self, choice: Choice) -> str | None:
        reason = None if choice.last is None else choice.last.finish_reason
        return "tool_calls" if choice.calls and reason is FinishReason.STOP and not self.use.is_named else reason

    def _usage(self) -> dict[str, Any]:
        return usage(sum(self.stream.prompt_tokens), self.stream.completion_tokens, self.cached_tokens)
