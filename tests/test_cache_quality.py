"""The comparison of caches, from a model to rows, on a tiny model."""

import json
import sys
from typing import Any

from atom.circumstances import CHECKOUT
from atom.records import check_rows

sys.path.insert(0, str(CHECKOUT / "benchmarks"))
from cache_quality import RECORD, Measure, finish, measure


def test_rows_of_a_tiny_model(tiny_run: dict[str, Any]) -> None:
    options = Measure(
        **tiny_run,
        schemes=("bf16", "bf16+kv4", "bf16+kv2", "bf16+kv8", "bf16+kv8r16", "w8a8+kv4"),
        train=("bf16+kv4", "w8a8+kv4"),
        batch_tokens=64,
        distill_steps=3,
    )
    measure(options)
    rows = json.loads(options.output.read_text())[RECORD]
    assert [(row["scheme"], row["kv"], row["step"], row["cache"]) for row in rows] == [
        ("bf16", "bf16", "fp", "bf16"),
        ("bf16", "int4", "calibrated", "int4"),
        ("bf16", "int4", "trained", "int4"),
        ("bf16", "int4", "trained", "bf16"),
        ("bf16", "int2", "calibrated", "int2"),
        ("bf16", "int8", "calibrated", "int8"),
        ("bf16", "int8r16", "calibrated", "int8r16"),
        ("w8a8", "int4", "calibrated", "int4"),
        ("w8a8", "int4", "trained", "int4"),
    ]
    measure(options)  # a second run finds all of it done
    assert json.loads(options.output.read_text())[RECORD] == rows
    finish(rows)
    check_rows(RECORD, rows)
    assert rows[0]["percent"] == 0 and "kl" not in rows[0]
    assert rows[1]["kl"] < rows[4]["kl"] and rows[6]["kl"] < rows[5]["kl"] and rows[3]["kl"] < rows[2]["kl"]
