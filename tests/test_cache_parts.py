"""A 4-bit cache of which parts are exact, from a model to rows, on a tiny model."""

import json
import sys
from typing import Any

import torch

from atom.circumstances import CHECKOUT
from atom.kernels.dense_attention import AttentionSpec, attend_dense
from atom.records import check_rows

sys.path.insert(0, str(CHECKOUT / "benchmarks"))
from cache_parts import PARTS, RECORD, CachePart, Measure, attend_apart, measure


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


def test_rows_that_were_asked_for(tiny_run: dict[str, Any]) -> None:
    names = ("kv4", CachePart(recent=4).name)
    measure(Measure(**tiny_run, parts=names))
    assert tuple(row["part"] for row in json.loads(tiny_run["output"].read_text())[RECORD]) == names


def test_only_the_last_tokens_before_a_query_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 50, 16, generator=generator)
    k, v, exact_k, exact_v = (torch.randn(2, 2, 50, 16, generator=generator) for _ in range(4))
    for window in (None, 7):
        spec = AttentionSpec(0.25, window)
        torch.testing.assert_close(attend_apart(q, k, v, exact_k, exact_v, spec, 0), attend_dense(q, k, v, spec))
        all_of_it = attend_apart(q, k, v, exact_k, exact_v, spec, 50)
        torch.testing.assert_close(all_of_it, attend_dense(q, exact_k, exact_v, spec))
    found = attend_apart(q, k, v, exact_k, exact_v, AttentionSpec(0.25), 5)[1, 3, 30]
    keys, values = (torch.cat((x[1, 1, :26], y[1, 1, 26:31])) for x, y in ((k, exact_k), (v, exact_v)))
    torch.testing.assert_close(found, (q[1, 3, 30] @ keys.T * 0.25).softmax(-1) @ values)
