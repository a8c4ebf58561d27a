"""Text to token ids, as calibration and evaluation both need it: a whole text at once, BOS kept apart."""

import warnings
from typing import Protocol


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    bos_token_id: int | None

    def __hash__(self) -> int: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...


def leading_bos(tokenizer: Tokenizer) -> int | None:
    """The BOS token if the tokenizer puts it before every text of its own accord, else None."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer.encode("a")[:1] == [bos] else None


def encode_plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of `text` without special tokens; it may be longer than the model's context, the caller cuts it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is longer
        return tokenizer.encode(text, add_special_tokens=False)
