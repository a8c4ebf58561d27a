"""The server under load: request bodies, and one request sent and timed over HTTP."""

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from .answer import Endpoint, MalformedAnswerError, ServerSaidError, read_event
from .http_stream import ConnectFailedError, StreamClient
from .sample import Sample
from .sse import EventReader

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
PromptFormat = Literal["ids", "text"]


@dataclass(frozen=True)
class Target:
    """Where and how to ask.

    base_url    scheme, host and port; a trailing /v1 is taken off
    timeout_s   of a whole request
    extra_body  fields that are merged into every body
    """

    base_url: str
    model: str
    endpoint: Endpoint = "completions"
    temperature: float = 0.0
    ignore_eos: bool = True
    timeout_s: float = 600.0
    extra_body: dict[str, Any] = field(default_factory=dict)

    def body(self, prompt: list[int] | str, output_tokens: int) -> bytes:
        """The JSON of one request. `ignore_eos` is vLLM's extension, which SGLang and Atom know too."""
        fields: dict[str, Any] = {"model": self.model}
        if self.endpoint == "chat":
            fields["messages"] = [{"role": "user", "content": prompt}]
            fields["max_completion_tokens"] = output_tokens
        else:
            fields["prompt"] = prompt
            fields["max_tokens"] = output_tokens
        fields |= {"temperature": self.temperature, "stream": True, "stream_options": {"include_usage": True}}
        if self.ignore_eos:
            fields["ignore_eos"] = True
        return json.dumps(fields | self.extra_body, separators=(",", ":")).encode()


def normalize_url(url: str) -> str:
    """http://host:port of what a user typed; ValueError if it is no such address."""
    text = url if "://" in url else f"http://{url}"
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise ValueError(f"--url must be the server's address, http://localhost:8000 say, got {url!r}")
    return text.rstrip("/").removesuffix("/v1")


def key_headers() -> dict[str, str]:
    """The header with the key in OPENAI_API_KEY, if there is one."""
    key = os.environ.get("OPENAI_API_KEY")
    return {"authorization": f"Bearer {key}"} if key else {}


async def send(client: StreamClient, target: Target, body: bytes, sample: Sample, clock: Callable[[], float]) -> None:
    """Send one request and fill in `sample`; whatever goes wrong is written there as its error, and never raised.

    Only being cancelled is passed on, after it was noted. Nothing is retried.
    """
    sample.sent_s = clock()
    try:
        async with asyncio.timeout(target.timeout_s):
            await _stream(client, target, body, sample, clock)
    except asyncio.CancelledError:
        _fail(sample, "interrupted", "the run was stopped")
        raise
    except TimeoutError:
        _fail(sample, "timeout", f"no complete answer within {target.timeout_s:g} s")
    except ConnectFailedError as error:
        _fail(sample, "connect", error)
    except OSError as error:
        _fail(sample, "disconnect", error)
    except MalformedAnswerError as error:
        _fail(sample, "malformed", error)
    except ServerSaidError as error:
        _fail(sample, "server error", error)
    except Exception as error:
        _fail(sample, type(error).__name__, error)
    finally:
        sample.end_s = clock()


def _fail(sample: Sample, kind: str, message: object) -> None:
    sample.error, sample.message = kind, str(message)


async def _stream(
    client: StreamClient, target: Target, body: bytes, sample: Sample, clock: Callable[[], float]
) -> None:
    answer = _Answer(sample, clock)
    await client.post(PATHS[target.endpoint], body, answer.on_head, answer.on_body)
    answer.end()


class _Answer:
    """What arrives, entered into a sample."""

    def __init__(self, sample: Sample, clock: Callable[[], float]) -> None:
        self._sample = sample
        self._clock = clock
        self._reader = EventReader()
        self._status, self._type = 0, ""
        self._refusal = b""
        self._is_done = False

    def on_head(self, status: int, headers: Mapping[str, str]) -> None:
        self._status, self._type = status, headers.get("content-type", "")
        if status == 200 and not self._type.startswith("text/event-stream"):
            raise MalformedAnswerError(f"the answer is {self._type or 'of no type'}, not an event stream")

    def on_body(self, data: bytes) -> None:
        if self._status != 200:
            self._refusal += data[:1000]
            return
        now = self._clock()
        for event in self._reader.feed(data):
            self._is_done = read_event(event, self._sample, now) or self._is_done

    def end(self) -> None:
        """The answer is whole: note what it lacks."""
        sample = self._sample
        if self._status != 200:
            _fail(sample, f"http {self._status}", self._refusal[:500].decode(errors="replace"))
        elif not self._is_done and (sample.finish_reason is None or not self._reader.is_between_events):
            _fail(sample, "disconnect", "the stream ended before the answer did")
        elif not sample.tokens:
            _fail(sample, "empty", "the answer has no tokens")
