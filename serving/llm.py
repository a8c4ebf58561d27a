"""Offline generation: `LLM(model).generate(prompts)`, on the engine that also serves.

with LLM("smollm2-w4a4") as llm:
    for completion in llm.generate(["The capital of France is"], SamplingParams(max_tokens=16)):
        print(completion.text)
"""

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

from atom.closing import Closes

from .engine_config import EngineConfig
from .errors import EngineDeadError, InvalidRequestError, QueueFullError, StepFailedError
from .guidance import GuideCompiler
from .guidance_spec import GuidanceSpec
from .guide import Guide
from .request import FinishReason, Request
from .result import TokenLogprobs
from .sampling_params import SamplingParams
from .sequence import Output
from .startup import Ready, start_up
from .text import TextStream

Prompt = str | SequenceOf[int]
Message = Mapping[str, Any]
Progress = Callable[[int, int], None]
_Unread = list[SequenceOf[Output]]  # the outputs of one step after the other

FULL_S = 0.05  # between two looks at a queue that other threads have filled


@dataclass(frozen=True)
class Sample:
    """One sample of a prompt.

    stop_reason  the stop string, or the stop token id of the parameters, that ended it
    logprobs     beside token_ids, if they were asked for
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True)
class Completion:
    """A prompt and its samples, params.n of them.

    prompt           as it was given; None for token ids
    prompt_logprobs  of the prompt's tokens but the first, if they were asked for
    cached_tokens    of the prompt, taken from the prefix cache
    """

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    samples: tuple[Sample, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    cached_tokens: int = 0

    @property
    def text(self) -> str:
        """Of the first sample, as the following ones."""
        return self.samples[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.samples[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.samples[0].finish_reason


class LLM(Closes):
    """A model and its engine, for programs. Close it, or use it as a context manager.

    model    Atom checkpoint, directory, GGUF file, hub id or alias
    options  fields of EngineConfig
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._take(start_up(model, EngineConfig(**options)))

    @classmethod
    def from_ready(cls, ready: Ready) -> "LLM":
        """Over an engine that was made and not started."""
        llm = cls.__new__(cls)
        llm._take(ready)
        return llm

    def _take(self, ready: Ready) -> None:
        self.ready = ready
        self.engine = ready.engine
        self.tokenizer = ready.tokenizer
        self._numbers = itertools.count()
        self._guides: GuideCompiler | None = None  # made for the first request that needs it
        self._news = threading.Condition()
        self._calls: list[_Unread] = []  # of the threads that wait for outputs; each gets all
        heard = weakref.WeakMethod(self._listen)  # else the engine's thread would keep this alive, and the weights

        def listen(outputs: SequenceOf[Output]) -> None:
            if (hears := heard()) is not None:
                hears(outputs)

        self.engine.start(listen)
        # once, then nothing of the engine is held: by `close`, when this is dropped, or at the program's end
        self._shut_down = weakref.finalize(self, self.engine.shutdown)

    def close(self) -> None:
        """Stop the engine; may be called again. The weights and the cache are freed with the last name for this."""
        self._shut_down()
        if self._guides is not None:
            self._guides.close()

    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """Complete each prompt, all of them batched as the engine sees fit; in the order of the prompts.

        prompts   one or more, each a text or a list of token ids
        params    for all prompts, or one for each
        progress  called with (samples done, samples in all)
        Raises InvalidRequestError before anything runs if one of them cannot be served; StepFailedError or
        EngineDeadError if the engine fails. Several threads may call at once; their prompts are batched together.
        """
        asked: list[Any] = [prompts] if _is_one(prompts) else list(prompts)
        texts = [prompt if isinstance(prompt, str) else None for prompt in asked]
        tokens = [self._encode(prompt) if isinstance(prompt, str) else prompt for prompt in asked]
        return self._run(texts, tokens, _spread(params, len(asked)), progress)

    def chat(
        self,
        messages: SequenceOf[Message] | SequenceOf[SequenceOf[Message]],
        params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """The next turn of one or more conversations, through the model's chat template; otherwise as `generate`."""
        if not messages:
            raise InvalidRequestError("messages", "messages must not be empty; begin with a message of the user.")
        several: Any = [messages] if isinstance(messages[0], Mapping) else messages
        tokenizer = self._tokenizer()
        if not tokenizer.chat_template:
            raise InvalidRequestError(
                "messages", "the model's tokenizer has no chat template; use generate with a text prompt."
            )
        rendered = [
            tokenizer.apply_chat_template(list(each), tokenize=False, add_generation_prompt=True) for each in several
        ]
        tokens = [tokenizer.encode(text, add_special_tokens=False) for text in rendered]
        return self._run(rendered, tokens, _spread(params, len(rendered)), progress)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer().encode(text)
        return ids

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError("a text prompt came and the model has no tokenizer; pass token ids, or tokenizer=DIR.")
        return self.tokenizer

    def _run(
        self,
        texts: SequenceOf[str | None],
        prompts: SequenceOf[SequenceOf[int]],
        params: SequenceOf[SamplingParams],
        progress: Progress | None,
    ) -> list[Completion]:
        runs = [
            _Run(text, self._request(tokens, each), self.tokenizer)
            for text, tokens, each in zip(texts, prompts, params, strict=True)
        ]
        for run in runs:
            run.request.max_tokens(self.ready.limits)
        total, waiting, open_ = sum(len(run.samples) for run in runs), deque(runs), dict[str, _Run]()
        unread: _Unread = []
        with self._news:
            self._calls.append(unread)
        try:
            while waiting or open_:
                self._feed(waiting, open_)
                for output in self._wait(unread, None if open_ else FULL_S):
                    self._deliver(output, open_)
                if progress is not None:
                    progress(sum(sample.is_finished for run in runs for sample in run.samples), total)
        finally:  # an error, or the user's Ctrl-C
            with self._news:
                self._calls = [each for each in self._calls if each is not unread]
            for request_id in open_:
                self.engine.abort(request_id)
        return [run.completion() for run in runs]

    def _request(self, tokens: SequenceOf[int], params: SamplingParams) -> Request:
        eos = self.ready.eos_token_ids
        guide = None if params.guidance is None else self._guide(params.guidance)
        return Request(f"llm-{next(self._numbers)}", tuple(tokens), params, eos_token_ids=eos, guide=guide)

    def _guide(self, spec: GuidanceSpec) -> Guide:
        if self.tokenizer is None:
            raise spec.wrong("left out for a model without a tokenizer", spec.kind, "add the tokenizer's files")
        if self._guides is None:
            self._guides = GuideCompiler(self.tokenizer, self.ready.limits.vocab_size, self.ready.eos_token_ids)
        return self._guides.compile(spec)

    def _feed(self, waiting: "deque[_Run]", open_: dict[str, "_Run"]) -> None:
        """Submit what the engine's queue has room for; it always has for the first, but where other threads fill it."""
        while waiting:
            run = waiting[0]
            try:
                self.engine.submit(run.request)
            except QueueFullError:
                if open_ or len(self._calls) > 1:
                    return
                raise
            open_[waiting.popleft().request.request_id] = run

    def _listen(self, outputs: SequenceOf[Output]) -> None:  # on the engine's thread
        with self._news:
            for unread in self._calls:
                unread.append(outputs)
            self._news.notify_all()

    def _wait(self, unread: _Unread, timeout_s: float | None) -> Iterator[Output]:
        with self._news:
            self._news.wait_for(lambda: unread, timeout_s)
            found = unread[:]
            unread.clear()
        return itertools.chain.from_iterable(found)

    def _deliver(self, output: Output, open_: dict[str, "_Run"]) -> None:
        run = open_.get(output.request_id)
        if run is None:  # of another thread's call, or of an earlier one that was left
            return
        if output.finish_reason is FinishReason.ERROR:
            if self.engine.error is not None:
                raise EngineDeadError(f"the engine is dead: {self.engine.error}; make a new LLM.")
            raise StepFailedError(
                f"the step that computed request {output.request_id} failed; the log says why; try again."
            )
        if run.take(output):
            self.engine.stop(output.request_id, output.index)
        if all(sample.is_finished for sample in run.samples):
            del open_[output.request_id]


@dataclass
class _Sample:
    """A sample that grows."""

    stream: TextStream | None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None


class _Run:
    """A request on its way."""

    def __init__(self, text: str | None, request: Request, tokenizer: Any) -> None:
        self.text = text
        self.request = request
        self.samples = [_Sample(_stream(request, tokenizer)) for _ in range(request.params.n)]
        self.prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
        self.cached_tokens = 0

    def take(self, output: Output) -> bool:
        """Append news; True if a stop string in the text ended the sample just now."""
        sample = self.samples[output.index]
        if sample.is_finished:
            return False
        self.prompt_logprobs = self.prompt_logprobs or output.prompt_logprobs
        self.cached_tokens = output.cached_tokens if output.index == 0 else self.cached_tokens
        sample.token_ids += output.token_ids
        sample.logprobs += output.logprobs or ()
        sample.finish_reason = output.finish_reason
        if output.stop_token in self.request.params.stop_token_ids:
            sample.stop_reason = output.stop_token
        if sample.stream is None:
            return False
        shown = output.token_ids if output.stop_token is None else output.token_ids[:-1]
        text, found = sample.stream.feed(shown, output.finish_reason is not None)
        sample.text += text
        if found is None:
            return False
        is_early = sample.finish_reason is None
        sample.finish_reason, sample.stop_reason = FinishReason.STOP, found
        return is_early

    def completion(self) -> Completion:
        prompt_logprobs = self.prompt_logprobs
        samples = tuple(self._finished(sample) for sample in self.samples)
        return Completion(self.text, self.request.prompt_token_ids, samples, prompt_logprobs, self.cached_tokens)

    def _finished(self, sample: _Sample) -> Sample:
        assert sample.finish_reason is not None
        has_logprobs = self.request.params.logprobs is not None
        logprobs = tuple(sample.logprobs) if has_logprobs else None
        return Sample(sample.text, tuple(sample.token_ids), sample.finish_reason, sample.stop_reason, logprobs)


def _stream(request: Request, tokenizer: Any) -> TextStream | None:
    if tokenizer is None:
        if request.params.stop:
            raise InvalidRequestError("stop", "stop strings came and the model has no tokenizer; use stop_token_ids.")
        return None
    params = request.params
    return TextStream(tokenizer, request.prompt_token_ids, params.stop, min_tokens=params.min_tokens)


def _is_one(prompts: Prompt | SequenceOf[Prompt]) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))


def _spread(params: SamplingParams | SequenceOf[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """One for each prompt."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams(max_tokens=16)] * count
    if len(params) != count:
        raise ValueError(f"{len(params)} sampling parameters came for {count} prompts; give one for each, or one.")
    return list(params)
