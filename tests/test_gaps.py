"""Intervals of a comparison of methods: standard errors from whole windows, paired."""

import math
import sys
from typing import Any

import pytest

from atom.circumstances import CHECKOUT

sys.path.insert(0, str(CHECKOUT / "benchmarks"))
from gaps import add_gaps, with_error


def row(method: str, losses: list[float] | None, **keys: Any) -> dict[str, Any]:
    found = {"model": "m", "text": "t", "windows": 2, "window": 8, "method": method, "scheme": "w4a4"}
    found |= {"path": "reference", **({} if losses is None else {"window_nll": losses})}
    return found | keys


def test_the_error_of_a_mean_is_the_usual_one() -> None:
    found = with_error("mean", lambda mean: mean, ([1.0, 2.0, 4.0, 5.0],))
    deviation = math.sqrt(sum((x - 3) ** 2 for x in (1, 2, 4, 5)) / 3)
    assert found == {"mean": 3.0, "mean:stderr": pytest.approx(deviation / 2, abs=1e-3)}


def test_what_windows_share_falls_out() -> None:
    rows = [row("fp", [1.0, 3.0]), row("atom", [1.2, 3.2]), row("ours", [1.1, 3.1])]
    add_gaps(rows)
    assert rows[1]["above_fp"] == pytest.approx(100 * math.expm1(0.2), abs=1e-3) and rows[1]["above_fp:stderr"] == 0
    expected = 100 * (math.exp(0.2) - math.exp(0.1)) / (math.exp(0.2) - 1)
    assert rows[2]["closed"] == pytest.approx(expected, abs=1e-3) and rows[2]["closed:stderr"] == 0
    assert not any("window_nll" in one for one in rows) and "closed" not in rows[1]


def test_methods_under_different_caches_are_not_compared() -> None:
    rows = [row("fp", [1.0, 2.0]), row("atom", [1.1, 2.2]), row("ours", [1.1, 2.3], kv_zero="mean")]
    add_gaps([*rows, row("atom", None, kv_zero="mean")])
    assert "closed" not in rows[2] and rows[2]["above_fp:stderr"] > 0


def test_windows_must_be_the_same() -> None:
    with pytest.raises(ValueError, match="2, 1 windows"):
        with_error("closed", lambda a, b: a - b, ([1.0, 2.0], [1.0]))
