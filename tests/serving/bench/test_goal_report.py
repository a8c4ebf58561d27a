"""Goals in a report: met, or missed by how much, taken apart and beside the profiles."""

from pathlib import Path
from typing import Any

import pytest

from atom.kernels.bounds import GPUS
from atom.serving.bench.goal_report import goals_table, missed_goals
from atom.serving.bench.goals import offline_case, paper_case
from atom.serving.bench.report import gpu_of, report_parts
from atom.serving.bench.report_data import BenchData

H200 = GPUS["h200"]


def row(scheme: str, batch: int, rate: float, ms: float) -> dict[str, Any]:
    case = paper_case(100.0)
    return {**case.key(scheme), "workload": "paper:2048", "batch": batch, "out_tok_s": rate, "tpot_ms_p50": ms,
            "bound_tok_s": 2 * rate}  # fmt: skip


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [row("w4a4", 200, 20_000.0, 10.0), row("bf16", 25, 4_000.0, 6.25), row("w8a8+kv16", 40, 5_000.0, 8.0)]


def profile(**more: Any) -> dict[str, Any]:
    shares = dict.fromkeys(("prefill_attention", "append", "producers", "sampling", "torch", "copies", "other"), 0.01)
    found = {"shape": "llama-2-7b", "scheme": "w4a4", "kv": "int4", "memory_gb": 24, "workload": "paper", "batch": 192}
    return found | shares | {"gemm": 0.36, "decode_attention": 0.55, "idle": 0.02, "decode_ms": 9.06} | more


def test_goals_that_rows_answer(rows: list[dict[str, Any]]) -> None:
    _, lines = goals_table(rows, H200)
    assert [line[0].partition(":")[0] for line in lines] == ["w4a4 over bf16", "w4a4 over w8a8+kv16"]
    assert lines[0][3:] == [5.0, "missed by 35 %; beyond both at their bounds", "50 %", "50 %"]
    assert lines[1][3:5] == [4.0, "met"]
    rate = {**offline_case("512/256").key("w4a8"), "out_tok_s": 19_000.0, "bound_tok_s": 31_000.0, "batch": 512}
    assert goals_table([rate | {"workload": "512/256", "tpot_ms_p50": 16.0}], H200)[1][0][4:] == [
        "missed by 5 %",
        "61 %",
        None,
    ]
    assert goals_table([], H200)[1] == []


def test_what_a_report_says_of_a_missed_goal(rows: list[dict[str, Any]]) -> None:
    (text,) = missed_goals(rows, [profile(), profile(scheme="bf16", kv="bf16", workload="1000/1000")], H200)
    for words in (
        "5.00 of 7.73, missed by 35 %",
        "200 requests for 25 (8.00 times), each at 0.62 of the rate (a token takes 10.00 ms for 6.25)",
        "w4a4+kv4 at 50 % and bf16 at 50 % of its own",
        "profile of w4a4+kv4 with 192 requests: decode attention 55 %, gemm 36 %, nothing runs 2.0 %, a decode step",
    ):
        assert words in text
    assert "profile of bf16" not in text, "that one is of other lengths"


def test_goals_stand_in_the_report_of_one_known_gpu(rows: list[dict[str, Any]]) -> None:
    source = {"file": "throughput.json", "date": "2026-01-01", "commit": "c", "command": "run"}
    data = BenchData(profile=[profile(mixed_ms=None, mixed_time=None, host_ms=1.0, out_tok_s=20_000.0)])
    assert gpu_of(data) is None
    data.sources.append({**source, "machine": {"gpu": "NVIDIA H200"}})
    assert gpu_of(data) == H200
    data.rows.extend(rows)
    full = {"tpot_ms_p99": 1.0, "ttft_ms_p50": 1.0, "steady_tok_s": None, "errors": 0}
    data.rows[:] = [full | found for found in data.rows]
    parts = report_parts(data, None)
    assert any(name == "Goals" for kind, name, _ in parts if kind == "heading")
    assert any(kind == "text" and "missed by 35 %" in text for kind, _, text in parts)
    data.sources.append({**source, "machine": {"gpu": "NVIDIA H100"}})
    assert gpu_of(data) is None, "rows of two GPUs"


def test_profiles_without_rows_need_no_goals(tmp_path: Path) -> None:
    data = BenchData(profile=[profile(mixed_ms=None, mixed_time=None, host_ms=1.0, out_tok_s=1.0)])
    assert not any(name == "Goals" for _, name, _ in report_parts(data, None))
