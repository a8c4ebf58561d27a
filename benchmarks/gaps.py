"""How far above full precision perplexities lie, what part of another method's gap one closes, and how sure that is.

Standard errors are of the windows drawn, from the losses of whole windows with one left out at a time (the jackknife):
all methods saw the same windows, so that what windows have in common falls out.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from atom.records import Row

WINDOW_LOSSES = "window_nll"  # of a row of a part: the mean loss of each window, in nats
BASELINE, COMPARED = "atom", "ours"
Key = tuple[Any, ...]


def add_gaps(rows: Sequence[Row]) -> None:
    """Take the windows' losses out of `rows` and write what follows from them.

    above_fp   how much perplexity lies above full precision's on the same windows, in percent
    closed     in rows of `ours`: the part of Atom's gap in perplexity to full precision that is not there any more, at
               the same scheme, cache and path, in percent
    and the standard error of each under the same key with `:stderr`.
    Rows without losses stay as they are, and so do those whose full precision has none.
    """
    losses = [row.pop(WINDOW_LOSSES, None) for row in rows]
    full = {_text(row): own for row, own in zip(rows, losses, strict=True) if row["method"] == "fp" and own}
    baseline = {_scheme(row): own for row, own in zip(rows, losses, strict=True) if row["method"] == BASELINE and own}
    for row, own in zip(rows, losses, strict=True):
        whole, other = full.get(_text(row)), baseline.get(_scheme(row))
        if not own or not whole or row["method"] == "fp":
            continue
        row |= with_error("above_fp", lambda own, whole: 100 * math.expm1(own - whole), (own, whole))
        if row["method"] == COMPARED and other:
            row |= with_error("closed", _closed, (own, other, whole))


def with_error(name: str, value: Callable[..., float], losses: Sequence[Sequence[float]]) -> dict[str, float]:
    """`value` of the means of several methods' losses on the same windows, and its standard error."""
    n = len(losses[0])
    if any(len(own) != n for own in losses):
        raise ValueError(f"{name}: {', '.join(str(len(own)) for own in losses)} windows; measure all on the same")
    sums = [math.fsum(own) for own in losses]
    found = {name: round(value(*(total / n for total in sums)), 3)}
    if n == 1:
        return found
    left = [value(*((total - own[i]) / (n - 1) for total, own in zip(sums, losses, strict=True))) for i in range(n)]
    mean = math.fsum(left) / n
    error = math.sqrt((n - 1) / n * math.fsum((one - mean) ** 2 for one in left))
    return {**found, f"{name}:stderr": round(error, 3)}


def _closed(ours: float, other: float, full: float) -> float:
    gap = math.exp(other) - math.exp(full)
    return 100 * (math.exp(other) - math.exp(ours)) / gap


def _text(row: Row) -> Key:
    return row["model"], row["text"], row["windows"], row.get("window")


def _scheme(row: Row) -> Key:
    return (*_text(row), row["scheme"], row.get("kv_zero"), row["path"])
