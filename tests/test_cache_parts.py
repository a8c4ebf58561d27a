"""A 4-bit cache of which parts are exact, from a model to rows, on a tiny model."""

import json
import sys
from typing import Any

from atom.circumstances import CHECKOUT
from atom.records import check_rows

sys.path.insert(0, str(CHECKOUT / "benchmarks"))
from cache_parts import PARTS, RECORD, CachePart, Measure, measure


def test_rows_of_a_tiny_model(tiny_run: dict[str, Any]) -> None:
    options = Measure(**tiny_run, by_layer=True, batch_tokens=64)
    measure(options)
    rows = json.loads(options.output.read_text())[RECORD]
    check_rows(RECORD, rows)
    layers = max(row["layer"] for row in rows if row["layer"] is not None) + 1
    assert len(rows) == len(PARTS) + 2 * layers
    loss = {row["part"]: row["kl"] for row in rows}
    assert len(loss) == len(rows)
    all_of_it = loss["kv4"]
    for part in (CachePart(keys="kv8"), CachePart(values="kv8"), CachePart(paid=32), CachePart(recent=128)):
        assert 0 <= loss[part.name] < all_of_it, part.name
    assert loss[CachePart(recent=128).name] < 1e-6  # no window is longer
    assert loss["kv3"] > all_of_it
    assert loss["keys kv4, values kv16, layer 0 alone"] < loss["keys kv4, values kv16"]
