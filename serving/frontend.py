"""The asyncio side of the engine: requests in, text out piece by piece, and an abort for every client that leaves.

The engine calls once a step, from its thread, with the news of all sequences; one `call_soon_threadsafe` brings them to
the event loop. There they become text (stop strings are found here and end the sequence in the engine) and wait for
their reader. What a slow reader has not fetched is merged, so that a stream holds at most one chunk a sample, and is no
longer than the answer itself.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from uuid import uuid4

from .engine import Engine
from .errors import EngineDeadError, EngineDrainingError, InvalidRequestError, StepFailedError
from .metrics import Metrics
from .request import FinishReason, Request
from .sequence import Output
from .stream import Chunk, Sample, Stream
from .text import TextStream
from .tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def new_id(prefix: str) -> str:
    """A request id that nobody can guess, as the OpenAI API writes them: `cmpl-...`."""
    return f"{prefix}-{uuid4().hex}"


class Frontend:
    """Streams over an engine; everything but `_receive` and `_died` runs on the event loop.

    interval  tokens of a sample that are sent at once; more cost less, and come in larger pieces
    on_death  called on the event loop when the engine gives up, with the reason
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, metrics: Metrics, interval: int = 1) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.interval = interval
        self.on_death: Callable[[str], None] | None = None
        self.is_draining = False
        self._streams: dict[str, tuple[Stream, int]] = {}  # by request id, with the index of its first sample
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def start(self) -> None:
        """Start the engine; call it from the event loop."""
        self._loop = asyncio.get_running_loop()
        self.engine.start(self._receive, self._died)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop it was started on."""
        assert self._loop is not None, "the front end has not been started"
        return self._loop

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    def open(
        self,
        requests: Sequence[Request],
        skip_special_tokens: bool = True,
        keep_stop: bool = False,
        names: tuple[str, ...] = (),
    ) -> Stream:
        """Hand requests to the engine, all or none of them.

        names      by which `abort` knows the stream; the requests' ids without
        keep_stop  the stop string or token that ends a text stays in it
        Raises InvalidRequestError, QueueFullError, EngineDrainingError, EngineDeadError.
        """
        if self.is_draining:
            raise EngineDrainingError("the server is shutting down and takes no requests; send it to another one.")
        samples = [self._sample(r, skip_special_tokens, keep_stop) for r in requests for _ in range(r.params.n)]
        stream, first = Stream(requests, samples, names, self.close_stream), 0
        try:
            for request in requests:
                self.engine.submit(request)
                self._streams[request.request_id] = stream, first
                first += request.params.n
                self._idle.clear()
        except Exception:
            self.close_stream(stream)
            raise
        return stream

    def _sample(self, request: Request, skip_special_tokens: bool, keep_stop: bool) -> Sample:
        params = request.params
        if self.tokenizer.hf is None:
            if params.stop:
                raise InvalidRequestError("stop", "stop has texts and this model has no tokenizer; use stop_token_ids.")
            return Sample(request, None, keep_stop, self.interval)
        text = TextStream(
            self.tokenizer.hf, request.prompt_token_ids, params.stop, skip_special_tokens, keep_stop, params.min_tokens
        )
        return Sample(request, text, keep_stop, self.interval)

    async def generate(self, request: Request) -> AsyncIterator[Chunk]:
        """One request's chunks; leaving the loop early aborts it."""
        stream = self.open([request])
        try:
            async for chunk in stream:
                yield chunk
        finally:
            stream.close()

    def abort(self, name: str) -> bool:
        """End a stream's requests from outside, with FinishReason.ABORT; False if no stream has that name."""
        found = {id(stream): stream for stream, _ in self._streams.values() if name in stream.names}
        for stream in found.values():
            for request_id in stream.request_ids:
                self.engine.abort(request_id)
        return bool(found)

    def close_stream(self, stream: Stream) -> None:
        for request_id in stream.request_ids:
            if self._streams.pop(request_id, None) is not None:
                self.engine.abort(request_id)
                for sample in stream.samples:
                    if sample.request.request_id == request_id and not sample.is_finished:
                        self._observe_end(sample, FinishReason.ABORT, time.monotonic())
        self._rest()

    async def drain(self, deadline_s: float) -> bool:
        """Take nothing new, wait for what is there, abort it after the deadline; whether all ended by itself."""
        self.is_draining = True
        try:
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("%d requests have not ended after %g s and are aborted", len(self._streams), deadline_s)
            for request_id in list(self._streams):
                self.engine.abort(request_id)
            return False
        return True

    async def close(self) -> None:
        """Stop the engine."""
        self.is_draining = True
        await asyncio.get_running_loop().run_in_executor(None, self.engine.shutdown)
        self.tokenizer.close()

    def _receive(self, outputs: Sequence[Output]) -> None:  # on the engine's thread
        self._call(lambda: self._deliver(outputs))

    def _died(self, reason: str) -> None:  # on the engine's or the watchdog's thread
        self._call(lambda: self._fail_all(reason))

    def _call(self, function: Callable[[], None]) -> None:
        try:
            self.loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop has been closed: nobody is left to read
            logger.debug("outputs came after the event loop's end")

    def _deliver(self, outputs: Sequence[Output]) -> None:
        now = time.monotonic()
        for output in outputs:
            found = self._streams.get(output.request_id)
            if found is None:  # its reader has left
                continue
            stream, first = found
            sample = stream.samples[first + output.index]
            if sample.is_finished:  # by a stop string
                continue
            try:
                self._take(stream, sample, output, first + output.index, now)
            except Exception as error:  # one request's text must not stop the others'
                logger.exception("request %s cannot be delivered", output.request_id)
                stream.fail(error)
                self.close_stream(stream)

    def _take(self, stream: Stream, sample: Sample, output: Output, index: int, now: float) -> None:
        if output.finish_reason is FinishReason.ERROR:
            reason = self.engine.error
            sample.finish_reason = FinishReason.ERROR
            self._observe_end(sample, FinishReason.ERROR, now)
            if reason is not None:
                stream.fail(EngineDeadError(f"the engine is dead: {reason}; send it to another server."))
            else:
                stream.fail(StepFailedError("the step that computed this request failed; send it again."))
            self.close_stream(stream)
            return
        if output.token_ids:
            self.metrics.tokens(len(output.token_ids), now - sample.last, is_first=not sample.ttft)
            sample.last = now
            sample.ttft = sample.ttft or now - sample.started
        ready = sample.hold(output)
        if ready is None:
            return
        chunk = sample.read(ready, index)
        if chunk.finish_reason is not None:
            if output.finish_reason is None:
                self.engine.stop(output.request_id, output.index)
            self._observe_end(sample, chunk.finish_reason, now)
            first = self._streams[output.request_id][1]
            if all(s.is_finished for s in stream.samples[first : first + sample.request.params.n]):
                del self._streams[output.request_id]
                self._rest()
        stream.put(chunk)

    def _fail_all(self, reason: str) -> None:
        error = EngineDeadError(f"the engine is dead: {reason}; send it to another server.")
        for stream, _ in list(self._streams.values()):
            stream.fail(error)
        self._streams.clear()
        self._rest()
        if self.on_death is not None:
            self.on_death(reason)

    def _observe_end(self, sample: Sample, reason: FinishReason, now: float) -> None:
        self.metrics.finished(reason, now - sample.started, sample.ttft, sample.request, sample.num_tokens)

    def _rest(self) -> None:
        if not self._streams:
            self._idle.set()
