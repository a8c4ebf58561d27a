"""The record of throughput is joined from parts: the latest of each measurement, and the best batches of those."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.throughput import Run, joined, sweeps


def row(scheme: str, batch: int, rate: float, **more: Any) -> dict[str, Any]:
    kv = "int4" if scheme.startswith("w4") else "bf16"
    found = {"experiment": "paper", "shape": "llama-2-7b", "scheme": scheme, "kv": kv, "memory_gb": 24}
    found |= {"batch_mode": "equal", "batch": batch, "out_tok_s": rate, "tpot_target_ms": None, "rate": None}
    return found | {"tpot_ms_p50": batch / 10, "workload": "paper:2048"} | more


def part(commit: str, *rows: dict[str, Any]) -> dict[str, Any]:
    return {"commit": commit, "rows": list(rows)}


def test_the_latest_counts() -> None:
    old = part("old", row("bf16", 8, 90.0), row("bf16", 16, 150.0), row("bf16", 16, 150.0, batch_mode="best"))
    whole = row("w4a8", 512, 20_000.0, experiment="offline", shape="llama-3-8b", memory_gb=0, workload="512/256")
    new = part("new", row("w4a4", 64, 900.0), row("w4a4", 40, 700.0), row("bf16", 16, 100.0), whole)
    rows = joined([old, new])
    equal = [r for r in rows if r["batch_mode"] == "equal"]
    assert [(r["scheme"], r["batch"], r["out_tok_s"]) for r in equal] == [
        ("w4a8", 512, 20_000.0),
        ("bf16", 8, 90.0),
        ("bf16", 16, 100.0),
        ("w4a4", 40, 700.0),
        ("w4a4", 64, 900.0),
    ]
    assert [r.get("source") for r in equal] == [None, "commit old", None, None, None]
    best = {(r["scheme"], r["tpot_target_ms"]): r["out_tok_s"] for r in rows if r["batch_mode"] == "best"}
    assert best == {
        ("bf16", 100.0): 100.0,
        ("w4a4", 100.0): 900.0,
        ("bf16", 5.0): 100.0,
        ("w4a4", 5.0): 700.0,
        ("w4a8", None): 20_000.0,
    }


def test_of_runs_that_came_to_one_batch_the_faster_counts() -> None:
    """More were asked for than memory held: in a short window those that ended had no successors yet."""
    rows = joined([part("old", row("bf16", 40, 900.0)), part("new", row("bf16", 40, 650.0), row("bf16", 40, 590.0))])
    assert [r["out_tok_s"] for r in rows if r["batch_mode"] == "equal"] == [650.0]


def test_all_is_the_three_experiments_with_few_engines(tmp_path: Path) -> None:
    found = sweeps(Run("all", tmp_path, data=tmp_path))
    runs = {
        (sweep.model[0], scheme, sweep.memory_gb[0], work.rpartition("/")[2] if "trace" in work else work)
        for sweep in found
        for scheme in sweep.schemes
        for work in sweep.workload
    }
    wanted = {
        (sweep.model[0], scheme, sweep.memory_gb[0], work.rpartition("/")[2] if "trace" in work else work)
        for name in ("paper", "today", "traces")
        for sweep in sweeps(Run(name, tmp_path, data=tmp_path))
        for scheme in sweep.schemes
        for work in sweep.workload
    }
    left_out = wanted - runs
    assert runs <= wanted and {(run[0], run[2]) for run in left_out} == {("llama-2-7b", 0.0)}
    assert len({sweep.output for sweep in found}) == len(found), "a folder each"
    halves = [sweeps(Run("all", tmp_path, shapes=(shape,), data=tmp_path)) for shape in ("llama-3-8b", "llama-2-7b")]
    assert sorted(str(x.output) for half in halves for x in half) == sorted(str(x.output) for x in found)
    with pytest.raises(ValueError, match="name their folder with --data"):
        sweeps(Run("all", tmp_path))


def test_parts_of_all_by_their_folders(tmp_path: Path) -> None:
    found = sweeps(Run("all", tmp_path, data=tmp_path, parts=("8b-long", "paper-main")))
    assert {sweep.output.relative_to(tmp_path).parts[0] for sweep in found} == {"8b-long", "paper-main"}
    assert [sweep.output.name for sweep in found] == ["24", "whole", "8b-long"]
