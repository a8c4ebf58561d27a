"""Perplexity: the text is tokenised once, cut into windows that do not overlap, and every window is scored alone.

The mean is over tokens, its exponential the perplexity; a last window that is not full is left out, as in published
tables. Where the tokenizer begins a text with BOS, every window begins with it (`bos`); published Llama tables have it
only before the first ("text"), which some models (Gemma) do not survive.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from atom.models.model import Model
from atom.models.tokens import Tokenizer, encode_plain, leading_bos

from .forward import check_fits, default_batch, hidden_states, logit_chunks
from .texts import Text

Bos = Literal["auto", "window", "text", "none"]
DEFAULT_WINDOW = 2048


@dataclass(frozen=True)
class Windows:
    """Windows of equal length.

    tokens    [num_windows, window]   int64
    bos       where BOS stands: in every "window", before the whole "text", or "none"
    left_out  tokens of the text in no window: the rest that fills none, and what `limit` cut off
    """

    tokens: Tensor
    bos: Bos
    left_out: int


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of one text, and what it was measured on.

    nll, nll_stderr     mean over tokens, in nats; its standard error from the spread between windows
    tokens              predicted tokens: one less than the window's length, per window
    window_nll          mean of each window, for paired comparison of two models
    kl, top1            to the reference model, where one was given: mean KL(reference || model) in nats a token, and
                        the share of tokens where both find the same next token most likely
    """

    text: str
    source: str
    sha256: str
    perplexity: float
    nll: float
    nll_stderr: float | None
    tokens: int
    windows: int
    window: int
    bos: str
    left_out: int
    tokenizer: str
    seconds: float
    window_nll: tuple[float, ...]
    kl: float | None = None
    top1: float | None = None
    reference: str | None = None


def make_windows(
    tokenizer: Tokenizer, text: Text, window: int = DEFAULT_WINDOW, bos: Bos = "auto", limit: int | None = None
) -> Windows:
    """Tokenise `text` and cut it into full windows, at most `limit`; a text shorter than one makes one short window.

    Raises ValueError if the text has fewer than two tokens, the window is too short to predict anything, or BOS is
    asked for and the tokenizer has none.
    """
    if window < 2 or (limit is not None and limit < 1):
        raise ValueError(f"window={window}, limit={limit}: a window takes at least 2 tokens, a limit at least 1 window")
    if bos == "auto":
        bos = "none" if leading_bos(tokenizer) is None else "window"
    if bos != "none" and tokenizer.bos_token_id is None:
        raise ValueError(f"the tokenizer has no BOS token, so bos={bos!r} cannot be; use bos='none'")
    start = [] if bos == "none" or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = encode_plain(tokenizer, text.text)
    each = start if bos == "window" else []
    ids = (start if bos == "text" else []) + ids
    body = min(window - len(each), len(ids))
    if body + len(each) < 2:
        raise ValueError(
            f"{text.source} has {len(ids)} tokens; perplexity predicts from a context, so it needs at least 2"
        )
    count = len(ids) // body if limit is None else min(limit, len(ids) // body)
    rows = [each + ids[i * body : (i + 1) * body] for i in range(count)]
    return Windows(torch.tensor(rows, dtype=torch.int64), bos, len(ids) - count * body)


class Reference:
    """A model that others are compared with. What it makes of tokens is kept on its device, so that a second
    comparison on the same windows does not run it: 4 bytes times hidden_size a token."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._hidden: dict[bytes, Tensor] = {}

    def hidden(self, tokens: Tensor) -> Tensor:
        """Its final hidden states [batch, seq, hidden_size] of tokens [batch, seq]."""
        key = tokens.cpu().numpy().tobytes()
        if key not in self._hidden:
            self._hidden[key] = hidden_states(self.model, tokens)
        return self._hidden[key]


def measure_perplexity(
    model: Model,
    tokenizer: Tokenizer,
    text: Text,
    *,
    window: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    bos: Bos = "auto",
    reference: Model | Reference | None = None,
    reference_name: str | None = None,
    windows: Windows | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Perplexity:
    """The perplexity of `text` under `model`, on the path that the model was loaded for.

    window      tokens; default 2048, or the model's context where that is shorter
    limit       score only the first windows
    batch_size  windows that go through the model at once; changes the speed, not the result
    reference   a model with the same vocabulary to measure the KL divergence to; as a Reference it remembers
    windows     of `text`, from make_windows, for several models with one tokenizer; `limit` and `bos` are then theirs
    progress    called with (windows done, windows in all, perplexity so far)
    """
    if window is None:
        window = min(DEFAULT_WINDOW, model.config.max_position_embeddings)
    check_fits(model, window, "a window")
    known = Reference(reference) if isinstance(reference, Model) else reference
    if known is not None and known.model.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the reference model's vocabulary has {known.model.config.vocab_size:,} tokens, the model's "
            f"{model.config.vocab_size:,}; the KL divergence needs the same tokenizer: name the model it was made from"
        )
    began = time.perf_counter()
    windows = make_windows(tokenizer, text, window, bos, limit) if windows is None else windows
    count, length = windows.tokens.shape
    batch_size = batch_size or default_batch(model, length)
    means: list[float] = []
    kl = agree = 0.0
    with torch.inference_mode():
        for start in range(0, count, batch_size):
            tokens = windows.tokens[start : start + batch_size]
            scores = _score(model, tokens, known)
            means += scores.nll.double().mean(1).tolist()
            kl, agree = kl + scores.kl, agree + scores.agree
            if progress is not None:
                progress(len(means), count, math.exp(statistics.fmean(means)))
    nll, predicted = statistics.fmean(means), count * (length - 1)
    return Perplexity(
        text=text.name,
        source=text.source,
        sha256=text.sha256,
        perplexity=_exp(nll, text),
        nll=nll,
        nll_stderr=statistics.stdev(means) / math.sqrt(count) if count > 1 else None,
        tokens=predicted,
        windows=count,
        window=length,
        bos=windows.bos,
        left_out=windows.left_out,
        tokenizer=tokenizer_name(tokenizer),
        seconds=round(time.perf_counter() - began, 3),
        window_nll=tuple(means),
        kl=None if known is None else kl / predicted,
        top1=None if known is None else agree / predicted,
        reference=reference_name,
    )


def tokenizer_name(tokenizer: Any) -> str:
    """The tokenizer's class and size, which decide what a token is (its path says where it lay)."""
    return f"{type(tokenizer).__name__}/{len(tokenizer)}"


def _exp(nll: float, text: Text) -> float:
    if not math.isfinite(nll) or nll > 700:
        raise ValueError(
            f"the mean negative log likelihood on {text.name} is {nll}; the model is broken: check its weights"
        )
    return math.exp(nll)


@dataclass(frozen=True)
class _Scores:
    nll: Tensor  # [batch, window - 1] float32
    kl: float  # sums over all tokens
    agree: float


def _score(model: Model, tokens: Tensor, reference: Reference | None) -> _Scores:
    """Score tokens [batch, window], all but the first of each window being predicted.

    Sums stay on the device until all chunks of logits are enqueued: asking for each would leave a GPU idle between.
    """
    targets = tokens[:, 1:].to(model.device).flatten()
    hidden = hidden_states(model, tokens)[:, :-1].flatten(0, 1)  # [batch * (window - 1), hidden_size]
    other = None if reference is None else reference.hidden(tokens)[:, :-1].flatten(0, 1)
    nll = torch.empty(targets.shape, dtype=torch.float32, device=model.device)
    kl, agree = (torch.zeros((), dtype=torch.float64, device=model.device) for _ in range(2))
    for rows, logits in logit_chunks(model, hidden):
        nll[rows] = F.cross_entropy(logits, targets[rows], reduction="none")
        if reference is not None and other is not None:
            expected = reference.model.logits(other[rows]).float().to(logits.device)
            kl += F.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), reduction="sum", log_target=True)
            agree += (logits.argmax(-1) == expected.argmax(-1)).sum()
    return _Scores(nll.unflatten(0, (tokens.shape[0], -1)).cpu(), float(kl), float(agree))
