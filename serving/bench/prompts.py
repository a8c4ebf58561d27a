"""Prompts of exact token counts: synthetic ids from a tokenizer's plain vocabulary, and text that encodes to as many.

Tokens are drawn by (seed, segment's key), so the same request has the same prompt in every run and on every machine,
and segments of equal keys are equal. A server that takes token ids gets them; for one that takes text alone, only
tokens are drawn that stand for themselves wherever they are put (" word"), and the count is checked by encoding.
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from atom.errors import UnsupportedError

from .workload import Segment, WorkItem

MIN_WORDS = 32  # fewer would make prompts of few distinct tokens
CHECKED_WORDS = 4096


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    @property
    def all_special_ids(self) -> list[int]: ...

    def get_vocab(self) -> dict[str, int]: ...

    def get_added_vocab(self) -> dict[str, int]: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> Any: ...


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Token ids to draw from, ascending, and the tokenizer where there is one.

    `words` are those whose text encodes to themselves alone and one after another; empty without a tokenizer.
    """

    ids: np.ndarray
    words: np.ndarray
    tokenizer: Tokenizer | None = None

    @classmethod
    def of_range(cls, low: int, high: int) -> "Vocabulary":
        """The ids low ... high - 1, for a server whose tokenizer is not at hand; only good for prompts of ids."""
        if not 0 <= low < high:
            raise ValueError(f"token ids {low}:{high} are no range; write LOW:HIGH, 100:30000 say")
        return cls(np.arange(low, high), np.empty(0, dtype=np.int64))

    @classmethod
    def of_tokenizer(cls, tokenizer: Tokenizer) -> "Vocabulary":
        """All of a tokenizer's ids but special and added ones; the words among them are tried out."""
        unfit = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        ids = np.array(sorted(set(tokenizer.get_vocab().values()) - unfit), dtype=np.int64)
        return cls(ids, _find_words(tokenizer, ids), tokenizer)

    def token_ids(self, item: WorkItem, seed: int) -> list[int]:
        """The prompt of `item`: exactly item.prompt_tokens ids."""
        return _draw(item.segments, self.ids, seed)

    def text(self, item: WorkItem, seed: int) -> str:
        """Text that the tokenizer encodes to exactly item.prompt_tokens tokens, special ones (BOS) not counted.

        Raises UnsupportedError for a tokenizer without enough words, or whose words change when joined.
        """
        if self.tokenizer is None or len(self.words) < MIN_WORDS:
            raise UnsupportedError(
                f"prompts as text are made of tokens that stand for themselves; found are {len(self.words)}, needed "
                f"{MIN_WORDS}; name the model's tokenizer with --tokenizer, or send token ids (--prompt-format ids)"
            )
        ids = _draw(item.segments, self.words, seed)
        text = str(self.tokenizer.decode(ids))
        if (got := len(_encode(self.tokenizer, text))) != len(ids):
            raise UnsupportedError(
                f"a text of {len(ids)} words encodes to {got} tokens with this tokenizer, so that lengths would be "
                "wrong; send token ids (--prompt-format ids)"
            )
        return text


def _draw(segments: Sequence[Segment], ids: np.ndarray, seed: int) -> list[int]:
    tokens: list[int] = []
    for segment in segments:
        digest = hashlib.blake2b(segment.key.encode(), digest_size=8).digest()
        rng = np.random.default_rng([seed, 2, int.from_bytes(digest, "little")])
        tokens += ids[(rng.random(segment.length) * len(ids)).astype(np.int64)].tolist()
    return tokens


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is longer than the model's context
        return tokenizer.encode(text, add_special_tokens=False)


def _find_words(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """Ids of " word"s that survive decoding and encoding, or, if there are too few, of any letters that do.

    At most CHECKED_WORDS of the vocabulary, evenly spread, are tried.
    """
    texts = {int(i): str(tokenizer.decode([int(i)])) for i in ids[:: max(1, len(ids) // (8 * CHECKED_WORDS))]}
    starts = [i for i, text in texts.items() if text[:1] == " " and text[1:].isascii() and text[1:].isalpha()]
    letters = [i for i, text in texts.items() if text.isascii() and text.isalpha()]
    for candidates in (starts, letters):
        found = [i for i in candidates[:: max(1, len(candidates) // CHECKED_WORDS)] if _is_stable(tokenizer, i)]
        if len(found) >= MIN_WORDS:
            break
    return np.array(found, dtype=np.int64)


def _is_stable(tokenizer: Tokenizer, token: int) -> bool:
    return _encode(tokenizer, str(tokenizer.decode([token, token]))) == [token, token]
