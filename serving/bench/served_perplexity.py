"""Perplexity through a server: the same windows as `atom eval`'s, scored by what the server says of its prompts.

Speed and quality then come from one process: the kernels, the cache and the batching that were timed are those that
scored. It takes `prompt_logprobs`, which Atom and vLLM have.
"""

import asyncio
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from atom.models.tokens import Tokenizer, encode_plain, leading_bos
from atom.texts import read_text

AT_ONCE = 16  # windows under way


@dataclass(frozen=True)
class ServedPerplexity:
    """What a server found of a text.

    nll     mean over the predicted tokens, in nats
    tokens  predicted tokens
    """

    text: str
    perplexity: float
    nll: float
    tokens: int
    windows: int
    window: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def cut_windows(tokenizer: Tokenizer, text: str, window: int, limit: int) -> list[list[int]]:
    """The first `limit` full windows, each beginning with BOS where the tokenizer begins a text so: as `atom eval`.

    Raises ValueError if the text does not fill one.
    """
    bos = leading_bos(tokenizer)
    start = [] if bos is None else [bos]
    ids, body = encode_plain(tokenizer, text), window - len(start)
    count = min(limit, len(ids) // body)
    if count < 1:
        raise ValueError(f"the text has {len(ids)} tokens and a window {window}; give a longer one, or --ppl-window")
    return [start + ids[i * body : (i + 1) * body] for i in range(count)]


async def served_perplexity(
    client: httpx.AsyncClient, base_url: str, model: str, tokenizer: Tokenizer, file: Path, window: int, limit: int
) -> ServedPerplexity:
    """Score a text file on the server. Raises ValueError if the server refuses, or does not know prompt_logprobs."""
    windows = cut_windows(tokenizer, read_text(file), window, limit)
    room = asyncio.Semaphore(AT_ONCE)

    async def score(ids: list[int]) -> float:
        body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        async with room:
            answer = await client.post(f"{base_url}/v1/completions", json=body, timeout=600)
        if answer.status_code != 200:
            raise ValueError(f"the server does not score a prompt: {answer.status_code} {answer.text[:200]}")
        found = answer.json()["choices"][0].get("prompt_logprobs")
        if not found or len(found) != len(ids):
            raise ValueError("the server's answer has no prompt_logprobs; leave out --ppl for this one")
        return -float(sum(each[str(token)]["logprob"] for token, each in zip(ids[1:], found[1:], strict=True)))

    total = sum(await asyncio.gather(*(score(ids) for ids in windows)))
    tokens = len(windows) * (window - 1)
    name = file.name.removesuffix(".gz").removesuffix(".txt")
    return ServedPerplexity(name, math.exp(total / tokens), total / tokens, tokens, len(windows), window)
