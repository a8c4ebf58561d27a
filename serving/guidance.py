"""Structured output: specifications compiled for a tokenizer.

The automata are llguidance's. A specification comes from a client, so compiling it is done with care: it is tried in a
process that can be killed (guidance_check.py), then compiled in a thread of its own, and what was compiled is kept for
the next request that asks for it. LIMITS bound the work and the memory of one token while text is generated.
"""

import asyncio
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from .checker import Checker
from .errors import InvalidRequestError, QueueFullError
from .guidance_spec import GuidanceSpec
from .guide import Guide, mask_words

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAX_GUIDES = 64  # compiled specifications that are kept
MAX_REFUSALS = 256  # reasons why others cannot be followed, kept so that trying again costs nothing ...
REFUSAL_S = 60.0  # ... for so long: a busy machine may have been the reason
MAX_WAITING = 32  # specifications that wait to be compiled, one after the other
COMPILE_S = 5.0  # a specification that takes longer to check is refused
FIRST_MASK_S = 0.5  # likewise one whose first mask takes longer
LIMITS = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 10_000,  # 1 to 2 KB each, for every sequence
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
# between the parts of a JSON text: without a bound, a model may write spaces for ever
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
_STACK_BYTES = 2**26  # four times that of the process in which specifications are tried
_PUNCTUATION = frozenset(r"\.+*?()|[]{}^$#&-~/")


class GuideCompiler:
    """Compiles specifications for a model's tokenizer; all of it may be used from any thread.

    tokenizer      a fast tokenizer of transformers
    vocab_size     of the model's logits; tokens beyond the tokenizer's are never allowed
    eos_token_ids  of which one ends a text
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self._hf = tokenizer
        self._eos = list(eos_token_ids)
        self._tokenizer: Any = None
        self._guides: OrderedDict[GuidanceSpec, Guide] = OrderedDict()
        self._refusals: OrderedDict[GuidanceSpec, tuple[str, float]] = OrderedDict()
        self._waiting = 0
        self._lock = threading.Lock()
        self._checker = Checker(COMPILE_S)
        self._executor = _executor()

    def compile(self, spec: GuidanceSpec) -> Guide:
        """The guide for a specification. May take seconds.

        Raises InvalidRequestError, with the specification's field, if there is none: it is malformed, uses what is not
        supported, cannot be satisfied, or takes too long. Raises QueueFullError if many others wait to be compiled.
        """
        return self._known(spec) or self._submit(spec).result()

    def prepare(self) -> None:
        """Do now what the first specification would otherwise wait for.

        It takes seconds for a large vocabulary, some of them with Python's lock: a server should not serve meanwhile.
        """
        try:
            self._executor.submit(self._tokens).result()
        except ImportError:
            logger.warning("structured output is off: llguidance is not installed")

    async def compile_async(self, spec: GuidanceSpec) -> Guide:
        """`compile`, while the event loop goes on."""
        known = self._known(spec)
        if known is not None:
            return known
        return await asyncio.wrap_future(self._submit(spec))

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._checker.close()

    def _known(self, spec: GuidanceSpec) -> Guide | None:
        with self._lock:
            guide = self._guides.get(spec)
            if guide is not None:
                self._guides.move_to_end(spec)
            reason, since = self._refusals.get(spec, ("", 0.0))
        if reason and time.monotonic() - since < REFUSAL_S:
            raise _refused(spec, reason)
        return guide

    def _submit(self, spec: GuidanceSpec) -> "Future[Guide]":
        with self._lock:
            if self._waiting >= MAX_WAITING:
                raise QueueFullError(f"{self._waiting} specifications of outputs wait to be compiled; try again later.")
            self._waiting += 1
        try:
            future = self._executor.submit(self._compile, spec)
        except RuntimeError:  # closed
            self._leave()
            raise
        future.add_done_callback(self._leave)
        return future

    def _leave(self, _: object = None) -> None:
        with self._lock:
            self._waiting -= 1

    def _compile(self, spec: GuidanceSpec) -> Guide:
        known = self._known(spec)
        if known is not None:
            return known
        guide = self._made(spec)
        if isinstance(guide, str):
            _keep(self._refusals, spec, (guide, time.monotonic()), self._lock, MAX_REFUSALS)
            raise _refused(spec, guide)
        _keep(self._guides, spec, guide, self._lock, MAX_GUIDES)
        return guide

    def _made(self, spec: GuidanceSpec) -> Guide | str:
        """The guide, or why there is none."""
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError:
            return "this server has no llguidance (pip install 'atom-serving[serving]')"
        if not self._eos:
            raise spec.wrong("left out for a model without EOS token, which could not end its text", spec.kind, "do so")
        grammar = grammar_of(spec)
        error = self._checker.check(grammar, LIMITS)
        if error is not None:
            return error
        tokenizer = self._tokens()
        template = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
        guide = Guide(template, self.vocab_size, tokenizer.vocab_size)
        row = np.zeros(mask_words(self.vocab_size), dtype=np.int32)
        start, first = time.monotonic(), guide.start()
        first.fill(row)
        if time.monotonic() - start > FIRST_MASK_S:
            return f"a mask of it takes {time.monotonic() - start:.1f} s"
        if template.is_error() or not row.any():
            return str(template.get_error() or first.error or "no text fits")
        return guide

    def _tokens(self) -> Any:
        """The tokenizer as llguidance knows it; in the compiler's own thread."""
        if self._tokenizer is None and self._eos:
            from llguidance.hf import from_tokenizer

            size = max(self.vocab_size, len(self._hf))
            self._tokenizer = from_tokenizer(self._hf, n_vocab=size, eos_token=self._eos)
        return self._tokenizer


def grammar_of(spec: GuidanceSpec) -> str:
    """The specification in llguidance's own terms. Raises InvalidRequestError if it cannot be read."""
    from llguidance import LLMatcher

    if spec.kind in ("json_schema", "json_object"):
        schema = json.loads(spec.value) if spec.kind == "json_schema" else {"type": "object"}
        if isinstance(schema, bool):  # true allows anything, false nothing
            schema = {} if schema else {"enum": []}
        return str(LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE}))
    if spec.kind == "regex":
        return str(LLMatcher.grammar_from_regex(spec.value))
    if spec.kind == "choice":
        return str(LLMatcher.grammar_from_regex("|".join(map(_escaped, spec.value.split("\0")))))
    if "::=" not in spec.value:
        return str(LLMatcher.grammar_from_lark(spec.value))
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return str(LLMatcher.grammar_from_lark(gbnf_to_lark(spec.value)))
    except Exception as error:  # the converter raises whatever its parser stumbles over
        raise _refused(spec, f"this GBNF cannot be read: {error}") from error


def _refused(spec: GuidanceSpec, reason: str) -> InvalidRequestError:
    what = {"json_schema": "this JSON schema", "json_object": "a JSON object", "regex": "this regular expression"}
    name = what.get(spec.kind, f"this {spec.kind}")
    reason = " ".join(reason.split("<state>")[0].split())[:300].rstrip(".")
    return InvalidRequestError(
        spec.field, f"{spec.field}: {name} cannot be followed: {reason}; correct or simplify it."
    )


def _keep(kept: OrderedDict[GuidanceSpec, T], spec: GuidanceSpec, value: T, lock: threading.Lock, most: int) -> None:
    """Add one to those that are kept, and drop the one that was used the longest ago."""
    with lock:
        kept[spec] = value
        while len(kept) > most:
            kept.popitem(last=False)


def _escaped(text: str) -> str:
    return "".join("\\" + c if c in _PUNCTUATION else c for c in text)


def _executor() -> ThreadPoolExecutor:
    """One thread with a stack for whatever passed the check."""
    before = threading.stack_size(_STACK_BYTES)
    try:
        executor = ThreadPoolExecutor(1, "guidance")
        executor.submit(int).result()  # the thread starts with its first work
    finally:
        threading.stack_size(before)
    return executor
