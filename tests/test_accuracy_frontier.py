"""The comparison of methods, from a model to rows, on a tiny model: what is measured, in which order, once."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from atom.circumstances import CHECKOUT
from atom.records import check_rows

sys.path.insert(0, str(CHECKOUT / "benchmarks"))
from accuracy_frontier import RECORD, Measure, fill_in_full_precision, finish, in_turn, measure


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())[RECORD]
    return rows


def test_rows_of_a_tiny_model(tiny_run: dict[str, Any]) -> None:
    options = Measure(
        **tiny_run,
        methods=("fp", "ours", "atom", "rtn"),
        schemes=("w4a4", "kv4"),
        batch_tokens=64,
        distill_tokens=64,
        distill_steps=3,
    )
    measure(options)
    rows = rows_of(options.output)
    found = [(row["method"], row["scheme"]) for row in rows]
    ways = ["ours", "atom"]
    assert found == [
        ("fp", "w4a4"),
        *((way, bits) for bits in ("w4a4", "kv4") for way in ways),
        ("rtn", "w4a4"),
        ("rtn", "kv4"),
    ]
    measure(options)  # a second run finds all of it done
    assert rows_of(options.output) == rows
    assert all(len(row["window_nll"]) == row["windows"] for row in rows)
    finish(rows)
    check_rows(RECORD, rows)
    assert {row["ppl_fp"] for row in rows} == {rows[0]["ppl"]}
    ours = {row["scheme"]: row for row in rows if row["method"] == "ours"}
    assert ours["w4a4"]["distill_steps"] == 3 and ours["w4a4"]["kl"] > 0
    assert ours["kv4"]["bits_weight"] == 16 and ours["kv4"]["bits_kv"] < 9


def test_ours_is_read_once_more_with_its_newest_tokens_exact(tiny_run: dict[str, Any]) -> None:
    asked = {"methods": ("fp", "rtn", "ours"), "schemes": ("kv4",), "batch_tokens": 64, "distill_steps": 0}
    measure(Measure(**tiny_run, **asked, recent=16))
    rows = rows_of(tiny_run["output"])
    found = [(row["method"], row.get("kv_recent")) for row in rows]
    assert found == [("fp", None), ("ours", None), ("ours", 16), ("rtn", None)]
    assert rows[2]["bits_kv"] - rows[1]["bits_kv"] == pytest.approx(16 * 16 / 2048)
    assert 0 < rows[2]["kl"] < rows[1]["kl"]
    finish(rows)
    check_rows(RECORD, rows)
    assert [row.get("kv_recent") for row in rows if row["method"] == "ours"] == [None, 16]


def test_what_a_stopped_run_needs_most_comes_first() -> None:
    found = in_turn(("flatquant", "rtn", "fp", "ours"), ("w4a4", "w4a8"))
    assert found == [
        ("fp", "w4a4"),
        ("ours", "w4a4"),
        ("fp", "w4a8"),
        ("ours", "w4a8"),
        ("rtn", "w4a4"),
        ("rtn", "w4a8"),
        ("flatquant", "w4a4"),
        ("flatquant", "w4a8"),
    ]


def test_a_model_without_full_precision_is_an_error() -> None:
    with pytest.raises(KeyError):
        fill_in_full_precision([{"model": "m", "text": "t", "windows": 1, "method": "ours"}])


def test_the_first_of_several_rows_stays_and_full_precision_stands_beside_every_scheme() -> None:
    row = {"model": "m", "text": "t", "windows": 1, "method": "fp", "scheme": "w4a4", "path": "reference"}
    row |= {"dtype": "float32", "ppl": 10.0}
    ours = {**row, "method": "ours", "ppl": 12.0}
    tasks = {**row, "scheme": "w4a8", "task:piqa": 0.7, "ppl": 10.1}
    rows = [{**ours, "scheme": "kv4"}, row, tasks, ours, {**ours, "ppl": 13.0}]
    finish(rows)
    found = [(row["scheme"], row["method"], row["ppl"], row["ppl_fp"]) for row in rows]
    assert [row.get("task:piqa") for row in rows] == [0.7, None, 0.7, 0.7, None]
    assert found == [
        ("w4a4", "fp", 10.0, 10.0),
        ("w4a4", "ours", 12.0, 10.0),
        ("w4a8", "fp", 10.0, 10.0),
        ("kv4", "fp", 10.0, 10.0),
        ("kv4", "ours", 12.0, 10.0),
    ]


def test_an_earlier_run_stays_for_its_tasks() -> None:
    row = {"model": "m", "text": "t", "windows": 1, "method": "fp", "scheme": "w4a8", "path": "reference"}
    row |= {"dtype": "float32", "ppl": 10.0}
    ours = {**row, "method": "ours", "ppl": 12.0}
    rows = [row, ours, {**ours, "ppl": 11.0, "recovery": 98.0}, {**ours, "ppl": 13.0, "recovery": 97.0}]
    for _ in range(2):  # joined again, it is what it was
        finish(rows)
        assert [(row["ppl"], row.get("recovery"), row.get("earlier")) for row in rows] == [
            (10.0, None, None),
            (12.0, None, None),
            (11.0, 98.0, True),
        ]
