"""A compiled specification of an output, and per sequence the tokens that may come next.

What meets a limit of the compiler while text is generated has an empty mask, which ends its sequence with an error.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)


def mask_words(vocab_size: int) -> int:
    """int32 words of a row of a mask."""
    return -(-vocab_size // 32)


class Guide:
    """A compiled specification, for one tokenizer. Immutable: sequences take matchers of it from any thread."""

    def __init__(self, template: Any, vocab_size: int, tokenizer_size: int) -> None:
        self._template = template
        self._words = mask_words(tokenizer_size)
        self.vocab_size = vocab_size

    def start(self, token_ids: Sequence[int] = ()) -> "Matcher":
        """A matcher for one sequence that has these output tokens already."""
        matcher = Matcher(self._template.deep_copy(), self._words)
        for token in token_ids:
            matcher.accept(token)
        return matcher


class Matcher:
    """How far one sequence has come. Used by one thread at a time.

    words  of a mask of the tokenizer, which may have more tokens than the model
    """

    def __init__(self, matcher: Any, words: int) -> None:
        self._matcher = matcher
        self._words = words

    @property
    def error(self) -> str:
        """Why nothing may follow; empty while something may."""
        return str(self._matcher.get_error()) if self._matcher.is_error() else ""

    @property
    def is_complete(self) -> bool:
        """The text fits as it is; EOS may come."""
        return bool(self._matcher.is_accepting())

    @property
    def is_stopped(self) -> bool:
        """Nothing but EOS may follow, or nothing at all after an error."""
        return bool(self._matcher.is_stopped())

    def accept(self, token: int) -> None:
        """Take the sequence's next token. After the end of the text tokens are ignored."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)

    def fill(self, row: NDArray[np.int32]) -> None:
        """Set the bits of the tokens that may come next, in a row of `mask_words` words; none after an error."""
        if not self._matcher.is_error():
            mask = row if len(row) == self._words else np.zeros(self._words, dtype=np.int32)
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            row[:] = mask[: len(row)]
        if self._matcher.is_error():
            logger.warning("structured output ends with an error: %s", self.error[:200])
            row[:] = 0
