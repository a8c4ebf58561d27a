"""What the front end keeps of a request: its samples, whose tokens become text, and the stream that is read."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from .request import FinishReason, Request
from .result import TokenLogprobs
from .sequence import Output
from .text import TextStream


class Chunk(NamedTuple):  # made for every token: a named tuple takes a third of a frozen dataclass's time
    """News of one sample.

    index            of the sample: those of the stream's first request, then those of the second, ...
    text             to append; what could be the beginning of a stop string or of a character waits
    token_ids        new tokens, the one that ended the sequence included
    logprobs         beside token_ids, None if not asked for
    prompt_logprobs  with the first tokens of a request's first sample, if asked for
    finish_reason    None while it runs
    stop_reason      the stop string, or the stop token id that the client gave, that ended it
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    cached_tokens: int = 0

    def then(self, later: "Chunk") -> "Chunk":
        """Both chunks of a sample as one; an abort's has no tokens, and no logprobs of them."""
        logprobs = None
        if self.logprobs is not None or later.logprobs is not None:
            logprobs = (self.logprobs or ()) + (later.logprobs or ())
        return later._replace(
            text=self.text + later.text,
            token_ids=self.token_ids + later.token_ids,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs or later.prompt_logprobs,
        )


class Sample:
    """One sequence as its stream sees it.

    text        None for a model without a tokenizer
    keeps_stop  the stop token that ends the text stays in it
    interval    tokens that become text at once; the first token, the last ones and stop strings wait for none
    """

    def __init__(self, request: Request, text: TextStream | None, keeps_stop: bool, interval: int) -> None:
        self.request = request
        self.text = text
        self.keeps_stop = keeps_stop
        self.interval = 1 if request.params.stop else interval
        self._held: list[Output] = []
        self.started = self.last = time.monotonic()
        self.ttft = 0.0
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def hold(self, output: Output) -> Output | None:
        """What is to be read now, earlier outputs included; None if this one waits for others."""
        if self.interval > 1:
            self._held.append(output)
            tokens = sum(len(each.token_ids) for each in self._held)
            if self.num_tokens and output.finish_reason is None and tokens < self.interval:
                return None
            output = joined(self._held)
            self._held = []
        return output

    def read(self, output: Output, index: int) -> Chunk:
        """The output as text; sets `finish_reason`."""
        reason = output.finish_reason
        shown = output.token_ids
        if output.stop_token is not None and not self.keeps_stop:
            shown = shown[:-1]  # EOS is no special token to every tokenizer
        text, found = ("", None) if self.text is None else self.text.feed(shown, reason is not None)
        stop: int | str | None = found
        if found is not None:
            reason = FinishReason.STOP
        elif output.stop_token in self.request.params.stop_token_ids:
            stop = output.stop_token
        self.num_tokens += len(output.token_ids)
        self.finish_reason = reason
        return Chunk(
            index,
            text,
            output.token_ids,
            output.logprobs,
            output.prompt_logprobs,
            reason,
            stop,
            output.cached_tokens,
        )


class Stream:
    """Chunks of one or more requests' samples, in the order of their coming; `async for`, then `close`.

    Iteration raises StepFailedError or EngineDeadError when the requests cannot be finished.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        samples: list[Sample],
        names: tuple[str, ...],
        on_close: Callable[["Stream"], None],
    ) -> None:
        self.request_ids = [r.request_id for r in requests]
        self.names = names or tuple(self.request_ids)
        self.prompt_tokens = [len(r.prompt_token_ids) for r in requests]
        self.samples = samples
        self._on_close = on_close
        self._unread: dict[int, Chunk] = {}
        self._open = len(samples)
        self._news = asyncio.Event()
        self._error: Exception | None = None

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        while not self._unread:
            if self._error is not None:
                raise self._error
            if not self._open:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._unread.pop(next(iter(self._unread)))

    def close(self) -> None:
        """Abort what has not ended; may be called again."""
        self._on_close(self)

    @property
    def completion_tokens(self) -> int:
        return sum(s.num_tokens for s in self.samples)

    def finish_reasons(self) -> str:
        """Of the samples, each once; "left" for those whose reader did not wait for it."""
        return ",".join(sorted({str(s.finish_reason or "left") for s in self.samples}))

    def put(self, chunk: Chunk) -> None:
        before = self._unread.get(chunk.index)
        self._unread[chunk.index] = chunk if before is None else before.then(chunk)
        self._open -= chunk.finish_reason is not None
        self._news.set()

    def fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._news.set()


def joined(outputs: Sequence[Output]) -> Output:
    """Outputs of one sample as one."""
    if len(outputs) == 1:
        return outputs[0]
    has_logprobs = any(each.logprobs is not None for each in outputs)
    return outputs[-1]._replace(
        token_ids=tuple(token for each in outputs for token in each.token_ids),
        logprobs=tuple(found for each in outputs for found in each.logprobs or ()) if has_logprobs else None,
        prompt_logprobs=next((each.prompt_logprobs for each in outputs if each.prompt_logprobs is not None), None),
    )
