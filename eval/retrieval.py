"""Long-context retrieval: numbers are hidden in a long text, and the model is asked for each of them.

A context holds KEYS sentences "The secret number of NAME is 48213." at even depths between sentences of noise; behind
it the same questions follow in an order of their own, each with its answer. A number counts as found where every one
of its tokens is the most likely one, which is what greedy decoding finds too; so a context takes one pass and no
generation. A question sees the answers to earlier ones, and learns their form from them, not its own number.

The sentences of noise are those of the passkey test (arXiv:2305.16300); several keys, of which one is asked for, are
RULER's (arXiv:2404.06654).
"""

import hashlib
import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from atom.models.generate import scheme_cache
from atom.models.model import Model
from atom.models.tokens import Tokenizer, encode_plain, leading_bos

from .forward import check_fits, hidden_states, logit_chunks
from .results import Metric, TaskResult

PIECE = 4096  # tokens that run at once
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
NAMES = (
    *("Ada", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo"),
    *("Irene", "Jonas", "Karla", "Leo", "Maria", "Nils", "Olga", "Paul"),
)
KEYS = len(NAMES)  # in a context


@dataclass(frozen=True)
class Haystack:
    """One context with its questions.

    tokens   int64 [length]
    answers  for each question where its number's tokens stand: (first, behind the last)
    """

    tokens: Tensor
    answers: tuple[tuple[int, int], ...]


def make_haystack(tokenizer: Tokenizer, length: int, seed: int) -> Haystack:
    """A context of at most `length` tokens, fewer by less than a sentence of noise.

    Raises ValueError if the keys and questions alone are longer.
    """
    draw = random.Random(seed)
    numbers = [str(draw.randrange(10000, 100000)) for _ in NAMES]
    names = draw.sample(NAMES, KEYS)
    keys = [encode_plain(tokenizer, f"The secret number of {n} is {x}.\n") for n, x in zip(names, numbers, strict=True)]
    noise = encode_plain(tokenizer, NOISE)
    tail: list[int] = []
    places: list[tuple[int, int]] = []
    for index in draw.sample(range(KEYS), KEYS):
        question = encode_plain(tokenizer, f"\nQuestion: what is the secret number of {names[index]}?\nAnswer:")
        answer = encode_plain(tokenizer, f" {numbers[index]}")
        places.append((len(tail) + len(question), len(tail) + len(question) + len(answer)))
        tail += question + answer
    bos = [] if leading_bos(tokenizer) is None or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room = length - len(bos) - len(tail) - sum(map(len, keys))
    if room < 0:
        raise ValueError(
            f"a retrieval context of {length} tokens is too short: its keys and questions take {length - room}; give "
            "--retrieval more, 4096 say"
        )
    pieces = [noise] * (room // len(noise))
    for number, key in enumerate(keys):  # the first at the beginning, the last at the end
        pieces.insert(round(number * (len(pieces) - number) / (KEYS - 1)) + number if pieces else number, key)
    body = bos + [token for piece in pieces for token in piece]
    answers = tuple((len(body) + first, len(body) + last) for first, last in places)
    return Haystack(torch.tensor(body + tail, dtype=torch.int64), answers)


@torch.inference_mode()
def measure_retrieval(model: Model, tokenizer: Tokenizer, length: int, contexts: int = 8, seed: int = 0) -> TaskResult:
    """The share of numbers found in `contexts` contexts of `length` tokens, KEYS in each, as a task's result.

    Raises ValueError if the model's context, or `length`, is too short.
    """
    check_fits(model, length, "a retrieval context")
    found: list[float] = []
    digest = hashlib.sha256()
    for number in range(contexts):
        haystack = make_haystack(tokenizer, length, seed + number)
        digest.update(haystack.tokens.numpy().tobytes())
        found += _answered(model, haystack)
    share = sum(found) / len(found)
    stderr = math.sqrt(share * (1 - share) / (len(found) - 1))
    metric = Metric(share, stderr, True, tuple(found))
    return TaskResult(f"retrieval-{length}", "1", 0, len(found), digest.hexdigest()[:16], {"found": metric})


def _answered(model: Model, haystack: Haystack) -> list[float]:
    """1.0 for each question whose number the model finds, else 0.0."""
    tokens = haystack.tokens
    cache = scheme_cache(model, 1, len(tokens))
    wanted = torch.cat([torch.arange(first, last) for first, last in haystack.answers])
    predicted: list[Tensor] = []
    for start in range(0, len(tokens), PIECE):
        hidden = hidden_states(model, tokens[None, start : start + PIECE], cache)[0]
        here = wanted[(wanted > start) & (wanted <= start + len(hidden))] - 1 - start  # a token is predicted one before
        predicted += [logits.argmax(-1).cpu() for _, logits in logit_chunks(model, hidden[here.to(hidden.device)])]
    is_right = dict(zip(wanted.tolist(), (torch.cat(predicted) == tokens[wanted]).tolist(), strict=True))
    return [float(all(is_right[place] for place in range(*answer))) for answer in haystack.answers]
