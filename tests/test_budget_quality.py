"""What a budget buys, from a model to rows, on a tiny model."""

import json
import sys
from typing import Any

from atom.circumstances import CHECKOUT
from atom.records import check_rows

sys.path.insert(0, str(CHECKOUT / "benchmarks"))
from budget_quality import RECORD, Measure, measure


def test_rows_of_a_tiny_model(tiny_run: dict[str, Any]) -> None:
    options = Measure(
        **tiny_run, budgets=(6.0, 1.0), max_losses=(0.5,), uniform=("w8a8+kv4",), budget_windows=2, budget_length=16
    )
    measure(options)
    rows = json.loads(options.output.read_text())[RECORD]
    check_rows(RECORD, rows)
    assert [(row["choice"], row["limit"]) for row in rows] == [
        ("budget", 6.0),
        ("w8a8+kv4", None),
        ("max-loss", 0.5),
    ]  # 1.0 bits cannot be met
    budget, uniform, most = rows
    assert budget["bits"] <= 6.0 < uniform["bits_weight"] and most["predicted"] <= 0.5
    assert uniform["predicted"] < budget["predicted"] and uniform["kl"] < budget["kl"]
    measured = len(rows)
    measure(options)  # what the part holds is not measured again
    assert len(json.loads(options.output.read_text())[RECORD]) == measured
