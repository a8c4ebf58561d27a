"""Reading a streamed answer of the OpenAI API: which chunks carry tokens, what the server counted, and what failed."""

import json
from typing import Any, Literal

from .sample import Sample
from .sse import DONE

Endpoint = Literal["completions", "chat"]


class MalformedAnswerError(ValueError):
    """The server sent something that is no chunk of a streamed answer."""


class ServerSaidError(RuntimeError):
    """The server reported an error within the stream."""


def read_event(data: bytes, sample: Sample, now_s: float) -> bool:
    """Enter one event into the sample; True if it was the last, `[DONE]`.

    A completion's chunk carries tokens if it has text, or none but also no finish reason (a token that ends within a
    character). A chat's chunk does if its delta has content, reasoning or a tool call: the opening one, which names the
    role alone, has not.
    Raises MalformedAnswerError and ServerSaidError.
    """
    if data == DONE:
        return True
    try:
        chunk = json.loads(str(data, "utf-8"))  # from bytes it would guess the encoding of every chunk
    except ValueError:
        raise MalformedAnswerError(f"an event is not JSON: {data[:80]!r}") from None
    if not isinstance(chunk, dict):
        raise MalformedAnswerError(f"an event is no JSON object: {data[:80]!r}")
    if chunk.get("error"):
        raise ServerSaidError(_error_text(chunk["error"]))
    try:
        if choices := chunk.get("choices"):
            if _has_tokens(choices[0]):
                sample.token_s.append(now_s)
            sample.finish_reason = choices[0].get("finish_reason") or sample.finish_reason
        if usage := chunk.get("usage"):
            sample.prompt_tokens = int(usage["prompt_tokens"])
            sample.output_tokens = int(usage.get("completion_tokens") or 0)
            details = usage.get("prompt_tokens_details") or {}
            sample.cached_tokens = details.get("cached_tokens", sample.cached_tokens)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise MalformedAnswerError(f"a chunk has an unknown shape ({error}): {data[:80]!r}") from None
    return False


def _has_tokens(choice: dict[str, Any]) -> bool:
    if (delta := choice.get("delta")) is not None:
        return bool(
            delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or delta.get("tool_calls")
        )
    return bool(choice["text"]) or choice.get("finish_reason") is None


def _error_text(error: Any) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
