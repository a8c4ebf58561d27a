"""Tokens to text, piece by piece: whole characters only, and nothing that a stop string may still take back.

What a token adds to a text depends on its neighbours: characters are split over tokens, and a decoder may drop the
space of a first "▁". There are two ways. A byte-level vocabulary (GPT-2, Llama 3, Qwen) is a sequence of bytes, so
bytes are decoded as they come. For any other, a window of recent tokens is decoded as a whole and compared with what
was shown of it; the window moves on with the text, so that a token costs the same late as early.

Text is what the tokenizer's own decoder makes of the tokens, without the clean-up of spaces before punctuation that
transformers applies for some models: a stream could not take back a space it has shown.
"""

import codecs
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from .stop_strings import StopStrings

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders make of bytes that are no character (yet)
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_CONTEXT = 6  # tokens before the new ones that a decoder sees
_WINDOW = 24  # tokens after which the window moves on
_PATIENCE = 256  # tokens that may wait for a character; a longer run of broken bytes is shown as it is


class TextStream:
    """The text of one sample's output tokens.

    tokenizer            a fast tokenizer of transformers
    prompt_token_ids     what stands before the output: after text, a first "▁" is a space
    stop                 strings that end the text
    skip_special_tokens  special tokens add nothing
    include_stop         the stop string that ends the text stays in it
    min_tokens           stop strings count only in the text of later tokens

    Joined, the pieces are what the tokenizer decodes the output to (after the prompt's end), cut at a stop string.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_token_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        vocabulary = vocabulary_of(tokenizer)
        self._special = vocabulary.special if skip_special_tokens else frozenset()
        self._decoder: _Bytes | _Window
        if vocabulary.is_byte_level:
            self._decoder = _Bytes(vocabulary)
        else:
            self._decoder = _Window(vocabulary, prompt_token_ids[-4 * _CONTEXT :])
        self._stop = StopStrings(stop, include_stop)
        self._unsearched = min_tokens if stop else 0

    def feed(self, token_ids: Sequence[int], finish: bool = False) -> tuple[str, str | None]:
        """(text to append, the stop string that ends it or None) for the next tokens.

        finish  no token follows: what was held back comes too
        After a stop string there is no more text.
        """
        free = ""
        if self._unsearched:
            early, token_ids = token_ids[: self._unsearched], token_ids[self._unsearched :]
            self._unsearched -= len(early)
            free = self._decode(early, finish and not token_ids)
            if not token_ids:
                return free, None
        text = self._stop.feed(self._decode(token_ids, finish))
        if finish:
            text += self._stop.flush()
        return free + text, self._stop.found

    def _decode(self, token_ids: Sequence[int], finish: bool) -> str:
        return self._decoder.feed([t for t in token_ids if t not in self._special], finish)


class Vocabulary:
    """What streams need to know of a tokenizer, looked up once."""

    def __init__(self, tokenizer: Any) -> None:
        rust = tokenizer.backend_tokenizer
        added = rust.get_added_tokens_decoder()
        self.special = frozenset(token for token, each in added.items() if each.special)
        self.is_byte_level = type(rust.decoder).__name__ == "ByteLevel"
        self.has_byte_tokens = "ByteFallback" in str(rust.decoder)
        self._rust = rust
        self.bytes_of = lru_cache(None)(self._bytes_of)
        self.is_byte = lru_cache(None)(self._is_byte)
        self.has = lru_cache(None)(self._has)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Special tokens are not dropped here."""
        text: str = self._rust.decode(token_ids, skip_special_tokens=False)
        return text

    def _bytes_of(self, token: int) -> bytes:
        """Of a byte-level vocabulary; nothing for ids beyond it."""
        text: str = self._rust.id_to_token(token) or ""
        table = byte_table()
        known = [table.get(c) for c in text]
        return text.encode() if None in known else bytes(b for b in known if b is not None)

    def _has(self, token: int) -> bool:
        return self._rust.id_to_token(token) is not None  # a model's vocabulary may be longer than its tokenizer's

    def _is_byte(self, token: int) -> bool:
        return _BYTE_TOKEN.fullmatch(self._rust.id_to_token(token) or "") is not None


_vocabularies: WeakKeyDictionary[Any, Vocabulary] = WeakKeyDictionary()


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """The tokenizer's Vocabulary, made at its first use."""
    known = _vocabularies.get(tokenizer)
    if known is None:
        known = _vocabularies[tokenizer] = Vocabulary(tokenizer)
    return known


class _Bytes:
    """Of a byte-level vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._bytes_of = vocabulary.bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_ids: Sequence[int], finish: bool) -> str:
        return self._decoder.decode(b"".join(map(self._bytes_of, token_ids)), finish)


class _Window:
    """Of any other vocabulary."""

    def __init__(self, vocabulary: Vocabulary, prompt: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        # a "▁" stands after text: special tokens are none, whether they are shown or not; a run of bytes is left out,
        # for its characters would depend on those to come
        before = [t for t in prompt if t not in vocabulary.special and vocabulary.has(t)]
        while before and vocabulary.is_byte(before[-1]):
            before.pop()
        self._tokens = before[-_CONTEXT:]
        self._shown = len(vocabulary.decode(self._tokens)) if before else 0  # characters of the window's text
        self._waiting = 0  # tokens since the window's text last ended with a character

    def feed(self, token_ids: Sequence[int], finish: bool) -> str:
        vocabulary = self._vocabulary
        known = [t for t in token_ids if vocabulary.has(t)]
        self._tokens += known
        self._waiting += len(known)
        if not self._waiting:
            return ""
        is_patient = not finish and self._waiting < _PATIENCE
        if is_patient and vocabulary.has_byte_tokens and vocabulary.is_byte(self._tokens[-1]):
            return ""  # one wrong byte makes the decoder refuse its whole run, so the run's end decides
        text = vocabulary.decode(self._tokens)
        if is_patient and not vocabulary.has_byte_tokens and text.endswith(_REPLACEMENT):
            return ""
        self._waiting = 0
        news = text[self._shown :]
        self._shown = len(text)
        if len(self._tokens) > _WINDOW:
            del self._tokens[:-_CONTEXT]
            self._shown = len(vocabulary.decode(self._tokens))
        return news


@lru_cache(1)
def byte_table() -> dict[str, int]:
    """The character by which a byte-level vocabulary writes each byte: itself if printable, else one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if byte not in printable)
    return table | {chr(256 + place): byte for place, byte in enumerate(rest)}
