"""What is served, how it is loaded, and what of the results stands in the record."""

import json
from pathlib import Path
from typing import Any

import pytest

from atom.records import check_rows
from atom.serving.bench.report import write_report
from atom.serving.bench.report_data import read_bench
from benchmarks.served import Join, Run, join, loads, row_of, serve_arguments

SPREAD = {"p50": 10.0, "p99": 20.0}


def result(label: str, workload: str) -> dict[str, Any]:
    summary = {"requests": 9, "errors": {"timeout": 1}, "out_tok_s": 123.45, "good_requests": 7}
    quality = {"perplexity": 21.6112, "text": "wiki.txt", "windows": 64, "window": 512}
    return {
        "kind": "atom-bench-serve",
        "date": "2026-01-01",
        "config": {"label": label, "workload": workload, "arrivals": "closed loop of 4", "slo": "ttft:500"},
        "summary": summary | {"ttft": SPREAD, "tpot": None},
        "server": {"perplexity": quality} if workload == "512/256" else {},
    }


def test_rows() -> None:
    row = row_of(result("smollm2 w8a8+kv16", "512/256"))
    check_rows("served", [row])
    assert (row["model"], row["scheme"], row["kv"], row["workload"]) == ("smollm2", "w8a8", "bf16", "512/256")
    assert row["errors"] == 1 and row["good"] == 7 and row["ttft_ms_p99"] == 20.0 and row["tpot_ms_p50"] is None
    assert row["ppl"] == 21.611 and row["windows"] == 64
    traced = row_of(result("llama-3-8b w4a8", "trace:/data/conv.csv.gz"))
    assert traced["workload"] == "trace:conv" and traced["ppl"] is None


def test_loads_and_servers(tmp_path: Path) -> None:
    shape = Run("llama-3-8b", tmp_path, scheme="w4a8", tokenizer=tmp_path / "t", trace=tmp_path / "conv.csv", speed=4.0)
    assert serve_arguments(shape)[-6:] == [
        "--load-format",
        "dummy",
        "--scheme",
        "w4a8",
        "--tokenizer",
        str(tmp_path / "t"),
    ]
    closed, traced = loads(shape, "x").values()
    assert closed.arrivals.is_closed and closed.token_ids == "5:30000" and closed.ppl is None
    assert traced.arrivals.from_trace and traced.speed == 4.0 and traced.seed != closed.seed
    real = Run("model", tmp_path, ppl=tmp_path / "wiki.txt", serve_args="--max-model-len 4096")
    assert "--scheme" not in serve_arguments(real) and serve_arguments(real)[-2:] == ["--max-model-len", "4096"]
    (closed,) = loads(real, "x").values()
    assert closed.ppl == tmp_path / "wiki.txt" and closed.token_ids is None
    with pytest.raises(ValueError, match="hold no result"):
        join(Join((tmp_path,)))


def test_in_the_report(tmp_path: Path) -> None:
    row = row_of(result("smollm2 w4a8", "512/256"))
    (tmp_path / "served.json").write_text(json.dumps({"name": "served", "rows": [row]}))
    parts = ("gemm", "decode_attention", "prefill_attention", "append", "producers", "sampling", "torch", "copies")
    profile: dict[str, Any] = dict.fromkeys((*parts, "other", "idle"), 0.1) | {"shape": "llama-3-8b", "scheme": "w4a8"}
    profile |= {"kv": "int4", "workload": "512/256", "memory_gb": 0, "batch": 256, "out_tok_s": 9.0, "host_ms": 1.5}
    profile |= {"decode_ms": 5.0, "mixed_ms": 20.0, "mixed_time": 0.25}
    (tmp_path / "profile.json").write_text(json.dumps({"name": "profile", "rows": [profile]}))
    data = read_bench([tmp_path / "served.json", tmp_path / "profile.json"])
    text = write_report(data, tmp_path / "report", "x", plots=False)[0].read_text()
    assert "| smollm2 | w4a8+kv4 | 512/256 | closed loop of 4 | 9 | 1 |" in text and "| 21.61 | wiki.txt |" in text
    assert "| 10.0 % | 5.00 | 20.00 | 25 % | 1.50 | 9.00 |" in text
