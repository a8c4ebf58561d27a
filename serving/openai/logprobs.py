"""Logprobs in the three forms in which the API's answers hold them."""

from collections.abc import Sequence
from typing import Any

from ..result import TokenLogprobs
from ..tokenizer import Tokenizer

LOWEST = -9999.0  # what the API writes for a probability of zero: JSON has no infinity


def told(found: Sequence[TokenLogprobs | None]) -> int:
    """Tokens that are told of, alternatives included."""
    return sum(1 + len(each.top) for each in found if each is not None)


def finite(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST  # also for what is no number, which JSON has not either


def completion_logprobs(
    tokenizer: Tokenizer, found: Sequence[TokenLogprobs | None], token_ids: Sequence[int], offset: int
) -> dict[str, Any]:
    """The legacy form: parallel lists. None in `found` (a prompt's first token) is null.

    offset  characters of the answer's text before these tokens
    """
    texts = [tokenizer.token_text(token) for token in token_ids]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [None if each is None else finite(each.logprob) for each in found],
        "top_logprobs": [None if each is None else _alternatives(tokenizer, each) for each in found],
        "text_offset": offsets,
    }


def _alternatives(tokenizer: Tokenizer, found: TokenLogprobs) -> dict[str, float]:
    """The likeliest tokens, and the chosen one if it is none of them."""
    # Of several ids with one text (halves of characters), the likelier stays: the best come first.
    texts: dict[str, float] = {}
    for token, logprob in (*found.top, (found.token_id, found.logprob)):
        texts.setdefault(tokenizer.token_text(token), finite(logprob))
    return texts


def chat_logprobs(tokenizer: Tokenizer, found: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The chat form: one object a token, with its bytes."""
    return {
        "content": [
            _token(tokenizer, each.token_id, each.logprob)
            | {"top_logprobs": [_token(tokenizer, token, logprob) for token, logprob in each.top]}
            for each in found
        ],
        "refusal": None,
    }


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {"token": data.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(data)}


def prompt_logprobs(tokenizer: Tokenizer, found: Sequence[TokenLogprobs]) -> list[dict[str, Any] | None]:
    """vLLM's form, by token id; null for the prompt's first token, and for a rank below the best ones."""
    answer: list[dict[str, Any] | None] = [None]
    for each in found:
        ranked: dict[int, tuple[float, int | None]] = {t: (lp, rank) for rank, (t, lp) in enumerate(each.top, 1)}
        ranked.setdefault(each.token_id, (each.logprob, None))
        answer.append(
            {
                str(token): {"logprob": finite(lp), "rank": rank, "decoded_token": tokenizer.token_text(token)}
                for token, (lp, rank) in ranked.items()
            }
        )
    return answer
