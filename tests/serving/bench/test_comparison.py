"""4 bits against bf16 and FP8: only like with like is compared, and what is slower is found."""

import json
from pathlib import Path
from typing import Any

import pytest

from atom.serving.bench.comparison import compare_all, comparison_table
from atom.serving.bench.report import write_report
from atom.serving.bench.report_data import read_bench


def step(scheme: str, batch: int, ms: float, **more: Any) -> dict[str, Any]:
    kv = {"bf16": "bf16", "fp8": "fp8", "w4a16": "bf16"}.get(scheme, "int4")
    row = {"shape": "llama-3-8b", "scheme": scheme, "kv": kv, "batch": batch, "context": 512, "ms": ms}
    return row | {"ms_p99": ms, "prefill_ms": 1.0, "sol_ms": 1.0} | more


def speed(scheme: str, mode: str, batch: int, rate: float, memory: int = 24) -> dict[str, Any]:
    found = step(scheme, batch, 1.0)
    keys = {"experiment": "paper", "memory_gb": memory, "batch_mode": mode, "out_tok_s": rate, "tpot_target_ms": None}
    return {"shape": "llama-2-7b", "scheme": scheme, "kv": found["kv"], "batch": batch, "workload": "paper:2048"} | keys


def test_decode_steps() -> None:
    rows = [step("bf16", 1, 4.0), step("fp8", 1, 2.0), step("w4a8", 1, 1.0), step("w4a8", 16, 1.0)]
    rows += [step("w4a4", 1, 2.01), step("w4a16", 1, 2.5), step("w4a8", 1, 0.5, head="int8")]
    found = {(c.label, c.over): c for c in compare_all([], rows)}
    assert found["w4a8+kv4", "bf16"].ratio == 4.0 and not found["w4a8+kv4", "bf16"].is_slower
    assert not found["w4a4+kv4", "fp8+kvfp8"].is_slower, "within 1 %"
    assert found["w4a16", "fp8+kvfp8"].is_slower and len(found) == 6, "batch 16 has no baseline, INT8 heads no equal"


def test_batches_and_best() -> None:
    """At an equal batch the baseline may have all the memory it wants; at the best batch it has the same."""
    rows = [speed("bf16", "equal", 32, 90.0), speed("bf16", "equal", 32, 100.0, memory=0)]
    rows += [speed("w4a4", "equal", 32, 95.0), speed("bf16", "best", 24, 80.0), speed("w4a4", "best", 192, 400.0)]
    rows += [speed("bf16", "best", 128, 500.0, memory=0)]
    batch, best = compare_all(rows, [])
    assert batch.ratio == 0.95 and batch.is_slower and batch.setting == "llama-2-7b, paper:2048, batch 32"
    assert best.ratio == 5.0 and best.setting == "llama-2-7b, paper:2048, 24 GiB"
    _, body = comparison_table([batch, best])
    assert body[0] == ["w4a4+kv4 over bf16", "equal batch", 1, 0, 1, "0.95", "0.95", batch.setting]


def test_of_one_commit_if_there_are_two() -> None:
    old = {"source": "commit old"}
    rows = [speed("bf16", "equal", 32, 100.0, memory=0), speed("bf16", "equal", 32, 90.0) | old]
    rows += [speed("w4a4", "equal", 32, 200.0) | old, speed("w4a8", "equal", 32, 300.0) | {"source": "commit older"}]
    found = {each.label: each for each in compare_all(rows, [])}
    assert found["w4a4+kv4"].ratio == pytest.approx(200 / 90) and not found["w4a4+kv4"].is_across
    assert found["w4a8+kv4"].ratio == 3.0 and found["w4a8+kv4"].is_across


def test_in_the_report(tmp_path: Path) -> None:
    rows = [step("bf16", 1, 4.0), step("w4a8", 1, 2.0)]
    file = tmp_path / "latency.json"
    file.write_text(json.dumps({"name": "latency", "rows": rows}))
    text = write_report(read_bench([file]), tmp_path / "report", "x", plots=False)[0].read_text()
    assert "| llama-3-8b | 1 | 512 | w4a8+kv4 | 2.00 | 1.00 | 50 % | 500.00 |" in text
    assert "| w4a8+kv4 over bf16 | decode step | 1 | 0 | 0 | 2.00 | 2.00 | llama-3-8b, batch 1, context 512 |" in text
    file.write_text(json.dumps({"name": "latency", "rows": [rows[0] | {"kv": "int5"}]}))
    with pytest.raises(ValueError, match="kv is 'int5'"):
        read_bench([file])
