"""Sweeps go on where they stopped and keep failures apart; reports hold every number and need nothing beside them."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atom.errors import UnsupportedError
from atom.records import check_rows
from atom.serving.bench.engine_process import EngineProcesses
from atom.serving.bench.overview import overview_groups
from atom.serving.bench.plots import draw_group, equal_ratios, in_order, label_of
from atom.serving.bench.report import speedup_rows, write_report
from atom.serving.bench.report_data import BenchData, read_bench, write_rows
from atom.serving.bench.result import ServeResult
from atom.serving.bench.sample import Sample
from atom.serving.bench.shares import shares_table
from atom.serving.bench.side_by_side import quality_tables
from atom.serving.bench.summary import summarize
from atom.serving.bench.sweep import SweepConfig, pending_jobs, read_points, run_sweep, throughput_rows

SPEED = {"bf16": 1.0, "w8a8": 2.0, "w4a8": 4.0}


def option(command: list[str], name: str) -> list[str]:
    """The values after an option."""
    if name not in command:
        return []
    rest = command[command.index(name) + 1 :]
    return rest[: next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))]


class FakeRuns:
    """Stands for the processes: writes points as `atom bench throughput` does; some schemes fail after their first."""

    def __init__(self, failing: tuple[str, ...] = ()) -> None:
        self.commands: list[list[str]] = []
        self.failing = failing

    def __call__(self, command: list[str]) -> tuple[int, str]:
        self.commands.append(command)
        (scheme,), (memory,) = option(command, "--scheme"), option(command, "--memory-gb") or ["0"]
        runs = [(int(c), None) for c in option(command, "--concurrency")]
        runs += [(0, float(r)) for r in option(command, "--rate")]
        lengths = option(command, "--workload")
        lines = [json.dumps(point(scheme, float(memory), c, r, w)) for w in lengths for c, r in runs]
        if scheme in self.failing:
            lines = [lines[0], lines[0][:40]]  # it died while it wrote
        with Path(option(command, "--points")[0]).open("a") as file:
            file.write("\n".join(lines) + "\n")
        return int(scheme in self.failing), "CUDA out of memory\n"


def point(scheme: str, memory: float, concurrency: int, rate: float | None, workload: str) -> dict[str, Any]:
    name, batch = scheme.partition("+")[0], concurrency or 100
    tokens = SPEED[name] * 100 * batch / (1 + batch / 64)
    spread = {"p50": 1e3 * batch / tokens, "p99": 1.5e3 * batch / tokens}
    return {
        "scheme": name, "kv": "int4", "memory_gb": memory, "workload": workload, "concurrency": concurrency,
        "asked_workload": workload,
        "rate": rate, "requests": 64, "too_long": 0, "batch": batch, "is_memory_bound": False,
        "input": 24.0, "output": 980.5,
        "bound_tok_s": 2 * tokens, "steady_tok_s": tokens, "weight_bytes": int(8e9 / SPEED[name]), "seconds": 1.0,
        "summary": {"out_tok_s": tokens * 0.9, "tpot": spread, "ttft": spread, "errors": {}},
        "engine": {"kv_cache_bytes": 9_000_000_000, "kv_cache_tokens": 70_000},
    }  # fmt: skip


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    fake = FakeRuns()
    monkeypatch.setattr(EngineProcesses, "run", lambda self, command: fake(command))
    return fake


def config(folder: Path, **options: Any) -> SweepConfig:
    chosen: dict[str, Any] = {"schemes": ("bf16", "w8a8+kv16", "w8a8", "w4a8"), "concurrency": (8, 64, 0)} | options
    return SweepConfig(("llama-2-7b",), folder, **chosen)


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path, runs: FakeRuns) -> None:
    sweep = config(tmp_path / "sweep", memory_gb=(24.0, 0.0), tpot_ms=(100.0, 12.0))
    runs.failing = ("w8a8",)
    entries = run_sweep(sweep)
    assert len(runs.commands) == 8
    failures = [entry for entry in entries if "error" in entry]
    assert [f["scheme"] for f in failures] == ["w8a8", "w8a8"] and "out of memory" in failures[0]["error"]
    assert len(read_points(sweep.points_file)) == 3 * 6 + 2, "what was measured before the failure is kept"

    runs.commands, runs.failing = [], ()
    assert [job.concurrency for job in pending_jobs(sweep, read_points(sweep.points_file))] == [(64, 0)] * 2
    entries = run_sweep(sweep)
    assert len(runs.commands) == 2 and option(runs.commands[0], "--concurrency") == ["64", "0"]
    assert not [entry for entry in entries if "error" in entry]
    assert option(runs.commands[0], "--memory-gb") == ["24"] and not option(runs.commands[1], "--memory-gb")
    assert run_sweep(sweep) == entries and len(runs.commands) == 2, "nothing is left to do"


def test_a_killed_sweep_keeps_what_its_last_process_wrote(tmp_path: Path, runs: FakeRuns) -> None:
    sweep = config(tmp_path, schemes=("bf16",))
    asked = {"model": "llama-2-7b", "asked_scheme": "bf16", "asked_memory_gb": 24.0}
    lines = [asked, point("bf16", 24.0, 8, None, "512/256")]
    (tmp_path / "running.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_sweep(sweep)
    assert [option(command, "--concurrency") for command in runs.commands] == [["64", "0"]]
    assert "--max-num-seqs" not in runs.commands[0]
    run_sweep(replace(sweep, concurrency=(512,)))
    assert option(runs.commands[1], "--max-num-seqs") == ["512"]


def test_rows_of_the_record(tmp_path: Path, runs: FakeRuns) -> None:
    sweep = config(tmp_path, tpot_ms=(100.0, 12.0), workload=("paper", "512/256"))
    rows = throughput_rows(sweep, run_sweep(sweep))
    check_rows("throughput", rows)
    equal = [row for row in rows if row["batch_mode"] == "equal"]
    assert len(equal) == 4 * 3 * 2 and {row["experiment"] for row in equal} == {"paper", "offline"}
    assert {row["kv"] for row in equal if row["scheme"] == "w8a8"} == {"bf16", "int8"}
    paper = next(row for row in equal if row["experiment"] == "paper")
    offline = next(row for row in equal if row["experiment"] == "offline")
    assert paper["out_tok_s"] == paper["steady_tok_s"] and paper["workload"] == "paper:2048"
    assert offline["out_tok_s"] == offline["overall_tok_s"] == round(0.9 * offline["steady_tok_s"], 1)
    best = {
        (row["tpot_target_ms"], row["scheme"], row["kv"]): row["batch"]
        for row in rows
        if row["batch_mode"] == "best" and row["experiment"] == "paper"
    }
    assert best[100.0, "bf16", "bf16"] == 100
    assert (12.0, "bf16", "bf16") in best and best[12.0, "bf16", "bf16"] == 8, "the largest within the target"
    assert best[12.0, "w4a8", "int4"] == 100


def test_a_batch_that_did_not_fit_is_not_called_one(tmp_path: Path, runs: FakeRuns) -> None:
    sweep = config(tmp_path, schemes=("bf16",), concurrency=(8, 64, 128))
    bound = point("bf16", 24.0, 64, None, "512/256") | {"batch": 33, "is_memory_bound": True}
    asked = {"model": "llama-2-7b", "asked_scheme": "bf16", "asked_memory_gb": 24.0}
    skipped = {"asked_workload": "512/256", "concurrency": 128, "rate": None, "skipped": "the cache holds 33"}
    tmp_path.joinpath("points.jsonl").write_text(json.dumps(asked | bound) + "\n" + json.dumps(asked | skipped) + "\n")
    rows = throughput_rows(sweep, run_sweep(sweep))
    assert [option(command, "--concurrency") for command in runs.commands] == [["8"]], "the skipped one is done"
    assert sorted(row["batch"] for row in rows if row["batch_mode"] == "equal") == [8, 33]


@pytest.mark.parametrize(("largest", "called"), [(512, 512), (508, 512), (480, 480)])
def test_all_at_once_is_what_the_engine_takes(largest: int, called: int, tmp_path: Path) -> None:
    """Of 512 under way some are in their prompts; 480 are all that memory holds."""
    found = point("bf16", 0.0, 0, None, "128/128") | {"batch": largest, "asked_scheme": "bf16", "model": "llama-2-7b"}
    found["engine"] = {**found["engine"], "max_num_seqs": 512}
    (row, _) = throughput_rows(config(tmp_path), [found])
    assert row["batch"] == called


def test_rates_are_swept_too(tmp_path: Path, runs: FakeRuns) -> None:
    sweep = config(tmp_path, schemes=("bf16",), rate=(1.0, 2.5))
    entries = run_sweep(sweep)
    assert [entry["rate"] for entry in entries] == [1.0, 2.5] and "--concurrency" not in runs.commands[0]
    assert not list(pending_jobs(sweep, entries)) and list(pending_jobs(replace(sweep, rate=(4.0,)), entries))


def test_options(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name a shape"):
        SweepConfig((), tmp_path)
    with pytest.raises(ValueError, match="paper, offline or trace:NAME"):
        config(tmp_path, experiment="mine")


@pytest.fixture
def measured(tmp_path: Path, runs: FakeRuns) -> Path:
    """A finished sweep's folder."""
    sweep = config(tmp_path / "sweep", tpot_ms=(100.0, 12.0), memory_gb=(24.0, 0.0), workload=("paper",))
    rows = throughput_rows(sweep, run_sweep(sweep))
    write_rows(sweep.output / "throughput.json", rows)
    return sweep.output


def load_result(path: Path) -> Path:
    samples = [Sample(i, 10, 2, 0.0, 0.0, 0.001, [0.1, 0.2], 0.2) for i in range(3)]
    options = {"model": "m<1>", "workload": "10/2", "arrivals": "closed loop of 3", "slo": None}
    provenance = {
        "date": "2026-01-01T00:00:00",
        "command": "atom bench serve",
        "commit": "abc",
        "machine": {"cpu": "x"},
    }
    result = ServeResult(False, options, summarize(samples), {}, provenance, ("2 requests were not sent",), [])
    assert "INCOMPLETE" in result.table() and "closed loop of 3" in result.table()
    result.write(path)
    return path


def test_report_holds_the_numbers(tmp_path: Path, measured: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots are drawn with matplotlib")
    data = read_bench([measured, load_result(tmp_path / "load.json")])
    paths = write_report(data, tmp_path / "report", "A & B")
    text, page, raw, *plots = paths
    assert len(plots) == 5 and all(path.stat().st_size > 10_000 for path in plots)
    markdown, html = text.read_text(), page.read_text()
    best = next(r for r in data.rows if r["batch_mode"] == "best" and r["scheme"] == "w4a8")
    number = f"{best['out_tok_s']:,.0f}"
    assert number in markdown and number in html
    assert "| w8a8+kv16 |" in markdown and "no, stopped" in markdown and "2 requests were not sent" in markdown
    assert all(f"({path.name})" in markdown for path in plots)
    assert html.count("data:image/png;base64,") == 5 and "A &amp; B" in html and "m&lt;1&gt;" in html
    assert not re.search(r'(src|href)="(?!data:)', html), "nothing is fetched from elsewhere"
    found = json.loads(raw.read_text())
    assert len(found["rows"]) == len(data.rows) and found["loads"][0]["summary"]["requests"] == 3
    assert {row["speedup"] for row in found["speedups"] if row["scheme"] == "bf16"} == {1.0}


def test_load_runs_of_several_servers_become_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots are drawn with matplotlib")
    files = []
    for number, label in enumerate(("ours", "ours", "theirs")):
        files.append(load_result(tmp_path / f"{number}.json"))
        found = json.loads(files[-1].read_text())
        found["config"]["label"] = label
        files[-1].write_text(json.dumps(found))
    paths = write_report(read_bench(files), tmp_path / "report", "x")
    assert [path.name for path in paths[3:]] == ["http-10-2.png"]
    text = paths[0].read_text()
    assert "| theirs |" in text and "(http-10-2.png)" in text


def test_speedups_compare_like_with_like(measured: Path) -> None:
    rows = read_bench([measured]).rows
    found = {(r["memory_gb"], r["tpot_target_ms"], r["label"]): r["speedup"] for r in speedup_rows(rows)}
    assert found[24, 100.0, "w4a8+kv4"] == 4.0 and found[0, 12.0, "bf16"] == 1.0
    tight = {(r["tpot_target_ms"], r["label"]): r for r in speedup_rows(rows)}
    assert found[24, 12.0, "w4a8+kv4"] == pytest.approx(
        tight[12.0, "w4a8+kv4"]["out_tok_s"] / tight[12.0, "bf16"]["out_tok_s"], rel=1e-3
    )
    assert in_order(rows) == ["bf16", "w8a8+kv16", "w8a8+kv8", "w4a8+kv4"]
    without = [row for row in rows if row["scheme"] != "bf16" or row["tpot_target_ms"] != 12.0]
    missing = {(r["tpot_target_ms"], r["label"]): r["speedup"] for r in speedup_rows(without)}
    assert missing[12.0, "w4a8+kv4"] is None, "no ratio to something that was not measured"


def test_ratios_at_equal_batches(measured: Path) -> None:
    """A baseline that a small memory cannot hold at that batch is taken from the whole GPU's rows."""
    rows = read_bench([measured]).rows
    small = [r for r in rows if not (r["scheme"] == "bf16" and r["memory_gb"] == 24 and r["batch"] == 64)]
    for found in (equal_ratios(rows), equal_ratios(small)):
        assert list(found) == [8, 64, 100] and found[64]["bf16"].value == 1.0
        assert found[64]["w4a8+kv4"].value == pytest.approx(4.0) and found[64]["w4a8+kv4"].text(1) == "4.0"
    assert equal_ratios([row for row in rows if row["scheme"] == "bf16"]) == {}


def test_rows_of_several_commits_are_told_apart(tmp_path: Path, measured: Path) -> None:
    """A star at a ratio across commits, a word about them, the rows' notes; and the figures can be drawn."""
    pytest.importorskip("matplotlib", reason="plots are drawn with matplotlib")
    data = read_bench([measured])
    for row in data.rows:
        if row["scheme"] == "w4a8":
            row |= {"source": "commit old", "note": "too slow"}
    assert equal_ratios(data.rows)[64]["w4a8+kv4"].text() == "4.00*"
    text = write_report(data, tmp_path / "report", "x")[0].read_text()
    assert "Rows are of the record's commit, commit old; *: across commits" in text and "w4a8+kv4: too slow." in text
    assert "| 4.00* |" in text and "| 2.00 |" in text


def test_quality_beside_speed(tmp_path: Path, measured: Path) -> None:
    """One line for each scheme and way of making it, both paths in it; speed of one setting for all schemes."""
    row = {"model": "m", "text": "t", "scheme": "w4a8", "kv": "int4", "ppl": 11.0, "ppl_fp": 10.0, "windows": 1}
    row |= {"path": "kernels", "bits_weight": 4.13, "bits_activation": 8, "bits_kv": 4.25, "calibration": "9 x 9, GPTQ"}
    rows = [row, row | {"path": "reference", "ppl": 10.5}, row | {"distill_steps": 50, "ppl": 10.2}]
    rows.append(row | {"scheme": "fp8", "kv": "fp8", "ppl": None, "calibration": "rounded to nearest"})
    file = tmp_path / "q.json"
    file.write_text(json.dumps({"name": "quality-presets", "rows": rows}))
    data = read_bench([measured, file])
    ((name, (titles, body)),) = quality_tables(data)
    target = max(r["tpot_target_ms"] for r in data.rows if r["batch_mode"] == "best")
    best = {r["scheme"]: r for r in data.rows if r["batch_mode"] == "best" and r["tpot_target_ms"] == target}
    assert name == f"m on t; speed and memory of llama-2-7b, paper:2048, TPOT at most {target:g} ms"
    assert [line[:2] for line in body] == [["fp8+kvfp8", "rounding"], ["w4a8+kv4", "GPTQ"], ["w4a8+kv4", "training"]]
    rounded, gptq, trained = (dict(zip(titles, line, strict=True)) for line in body)
    assert (gptq["perplexity"], gptq["through kernels"], gptq["loss"]) == (10.5, 11.0, "10.0 %")
    assert (trained["perplexity"], trained["through kernels"], trained["loss"]) == (None, 10.2, "2.0 %")
    assert gptq["output tok/s, 24 GiB"] == best["w4a8"]["out_tok_s"] and gptq["weights GB"] == best["w4a8"]["weight_gb"]
    assert rounded["loss"] is None and rounded["output tok/s, 24 GiB"] is None, "not measured is not zero"


def test_speed_beside_quality_is_of_one_setting(tmp_path: Path, runs: FakeRuns) -> None:
    """A scheme that was also run where it is faster stands there with what all others ran."""
    most = config(tmp_path / "a", workload=("512/256",), memory_gb=(0.0,), concurrency=(0,))
    more = config(tmp_path / "b", workload=("128/128",), memory_gb=(0.0,), concurrency=(0,), schemes=("w4a8",))
    rows = [row for sweep in (most, more) for row in throughput_rows(sweep, run_sweep(sweep))]
    for row in rows:
        row["out_tok_s"] *= 10 if row["workload"] == "128/128" else 1
    quality = {"model": "m", "text": "t", "scheme": "w4a8", "kv": "int4", "ppl": 11.0, "ppl_fp": 10.0, "windows": 1}
    quality |= {"path": "kernels", "bits_weight": 4.13, "bits_activation": 8, "bits_kv": 4.25}
    ((name, (titles, (line,))),) = quality_tables(BenchData(rows=rows, quality=[quality]))
    slower = next(r for r in rows if r["scheme"] == "w4a8" and r["workload"] == "512/256")
    assert name.endswith("of llama-2-7b, 512/256")
    assert dict(zip(titles, line, strict=True))["output tok/s, whole GPU"] == slower["out_tok_s"]


def test_each_scheme_against_its_own_floor(tmp_path: Path, measured: Path) -> None:
    step = {"shape": "s", "scheme": "bf16", "kv": "bf16", "batch": 1, "context": 512, "ms": 4.0, "sol_ms": 3.0}
    steps = [step, step | {"batch": 64, "ms": 5.0}, step | {"batch": 2, "head": "int8", "ms": 9.0}]
    steps.append(step | {"scheme": "fp8", "kv": "fp8", "sol_ms": None})
    titles, body = shares_table(read_bench([measured]).rows, steps)
    found = {line[0]: dict(zip(titles, line, strict=True)) for line in body}
    assert list(found) == ["bf16", "w8a8+kv16", "w8a8+kv8", "w4a8+kv4"]
    assert list(found["bf16"].values())[1:5] == [2, "60 %", "75 %", "s, batch 64, context 512"]
    assert found["w8a8+kv8"]["decode steps"] is None and found["w8a8+kv8"]["most "] == "50 %"
    assert shares_table([], []) == (titles, [])


def test_without_matplotlib(tmp_path: Path, measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    data = read_bench([measured])
    with pytest.raises(UnsupportedError, match="matplotlib, which is not installed"):
        draw_group(data.rows, "x", tmp_path, "x")
    assert len(write_report(data, tmp_path / "plain", "x", plots=False)) == 3


def test_files_that_are_no_measurement(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    for text, message in (
        ("{", "is not JSON"),
        ('{"name": "gemm"}', "neither a record `throughput`"),
        ("[]", "neither"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_bench([file])
    with pytest.raises(ValueError, match="hold no measurement"):
        write_report(read_bench([]), tmp_path, "x")


def test_labels() -> None:
    assert label_of({"scheme": "bf16", "kv": "bf16"}) == "bf16"
    assert label_of({"scheme": "bf16", "kv": "int4"}) == "bf16+kv4"
    assert label_of({"scheme": "fp8", "kv": "fp8"}) == "fp8+kvfp8"


def test_one_figure_over_all_lengths(tmp_path: Path, runs: FakeRuns) -> None:
    pytest.importorskip("matplotlib", reason="plots are drawn with matplotlib")
    sweep = config(tmp_path, workload=("512/256", "128/128"), memory_gb=(0.0,), concurrency=(0,))
    rows = throughput_rows(sweep, run_sweep(sweep))
    assert {name: sorted(found) for name, found in overview_groups(rows)["llama-2-7b", 0].items()} == {
        lengths: ["bf16", "w4a8+kv4", "w8a8+kv16", "w8a8+kv8"] for lengths in ("512/256", "128/128")
    }
    assert overview_groups([row for row in rows if row["workload"] == "512/256"]) == {}
    (sweep.output / "throughput.json").write_text(json.dumps({"name": "throughput", "rows": rows}))
    paths = write_report(read_bench([sweep.output]), tmp_path / "report", "x")
    names = [path.name for path in paths]
    assert "overview-llama-2-7b-whole-gpu.png" in names and not [name for name in names if "frontier" in name]
