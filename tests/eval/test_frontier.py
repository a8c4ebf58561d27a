"""Loss against bits: recovery and its interval by hand, one point a way, and a plot that is drawn."""

import math
from pathlib import Path
from typing import Any

import pytest

from atom.commands.report import Accuracy, run
from atom.eval.accuracy_report import write_report
from atom.eval.frontier import Point, read_points, recovery_table, task_recovery
from atom.eval.frontier_plot import best_of, series_of
from atom.records import write_record

FULL = {"bits_weight": 16.0, "bits_activation": 16.0, "bits_kv": 16.0}
LOW = {"bits_weight": 4.0, "bits_activation": 8.0, "bits_kv": 4.5}


def row(method: str, ppl: float, bits: dict[str, float], **more: Any) -> dict[str, Any]:
    known: dict[str, Any] = {
        "model": "m",
        "text": "t",
        "method": method,
        "scheme": "w4a8",
        "kv": "int4",
        "ppl": ppl,
        "ppl_fp": 10.0,
    }
    return {**known, "windows": 2, "path": "reference", **bits, **more}


def written(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    return write_record("accuracy-frontier", rows, command="x", results=tmp_path)


def test_one_point_a_way(tmp_path: Path) -> None:
    rows = [row("fp", 10.0, FULL), row("ours", 12.5, LOW), row("ours", 99.0, LOW, path="kernels")]
    rows.append(row("ours", 50.0, LOW, text="another"))
    (point,) = read_points([written(tmp_path, rows)])
    assert (point.model, point.way, point.bits, point.bits_kv) == ("m", "ours w4a8", 6.0, 4.5)
    assert point.loss == pytest.approx(math.log(1.25)) and point.recovery == pytest.approx(80.0)
    assert point.tasks is None
    assert recovery_table([point]).splitlines()[-1].split() == ["ours", "w4a8", "80.0"]


def test_an_earlier_run_is_a_way_of_its_own(tmp_path: Path) -> None:
    rows = [row("fp", 10.0, FULL), row("ours", 12.5, LOW), row("ours", 11.0, LOW, earlier=True)]
    found = read_points([written(tmp_path, rows)])
    assert [point.way for point in found] == ["ours w4a8", "ours w4a8, an earlier run"]


def test_what_a_budget_chose_is_a_way(tmp_path: Path) -> None:
    common = {"model": "m", "text": "t", "base": "w4a4", "kv": "int4", "bits": 4.5, "predicted": 0.1, "ppl_fp": 10.0}
    common |= {"windows": 2, "path": "reference", **LOW}
    rows = [
        {**common, "choice": "budget", "limit": 4.5, "ppl": 12.0},
        {**common, "choice": "w4a4", "limit": None, "ppl": 13.0},
    ]
    path = write_record("quality-budget", rows, command="x", results=tmp_path)
    assert [point.way for point in read_points([path])] == ["w4a4 --budget 4.5", "w4a4+int4, GPTQ alone"]
    assert series_of("w4a4 --budget 4.5") == series_of("w4a4 --max-loss 0.1") == "w4a4, chosen by place"
    assert series_of("w4a4+int4") == "w4a4+int4"


def test_recovery_of_tasks_has_an_interval() -> None:
    full = {"task:a": 0.8, "task:a:stderr": 0.02, "task:b": 0.5, "task:b:stderr": 0.0}
    found = task_recovery({"task:a": 0.76, "task:a:stderr": 0.019, "task:b": 0.5, "task:b:stderr": 0.0}, full)
    assert found is not None
    mean, low, high = found
    assert mean == pytest.approx(97.5)
    spread = 1.959964 * 0.95 * math.sqrt(2 * 0.025**2) / 2  # of a's ratio 0.95, half of the mean
    assert (low, high) == (pytest.approx(97.5 - 100 * spread), pytest.approx(97.5 + 100 * spread))
    assert task_recovery({"ppl": 3.0}, full) is None
    assert task_recovery({"task:a": 0.7, "recovery": 98.0, "recovery:95": 1.5}, full) == (98.0, 96.5, 99.5)


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = written(tmp_path, [row("fp", 10.0, FULL), row("atom", 12.5, LOW), row("ours", 11.0, LOW)])
    found = run(Accuracy((path,), tmp_path / "out"))
    page, plot = (Path(file) for file in found["files"])
    assert plot.stat().st_size > 5000 and len(found["points"]) == 2
    assert "90.9" in capsys.readouterr().out
    assert f"]({plot.name})" in page.read_text()


def test_the_page_puts_rows_of_one_way_together(tmp_path: Path) -> None:
    rows = [
        row("fp", 10.0, FULL, **{"task:a": 0.8, "task:a:stderr": 0.02}),
        row("ours", 11.0, LOW, kl=0.0625, dtype="float32"),
        row("ours", 21.0, LOW, text="c4", ppl_fp=20.0, dtype="float32"),
        row("ours", 11.1, LOW, path="kernels", **{"retrieval:2048": 0.5, "retrieval:2048:stderr": None}),
        row("other", 12.0, LOW, model="n"),
    ]
    path = written(tmp_path, rows)
    page = write_report([path], read_points([path]), tmp_path / "out").read_text().split("## ")
    assert page[1].splitlines() == [
        "m, accuracy-frontier",
        "",
        "|  | path | W / A / KV bits | ppl t | ppl c4 | KL t, nats | a | retrieval:2048 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| full precision | reference | 16.00 / 16.00 / 16.00 | 10.00 |  |  | 0.800 ± 0.020 |  |",
        "| ours w4a8 | reference float32 | 4.00 / 8.00 / 4.50 | 11.00 (+10.0 %) | 21.00 (+5.0 %) | 0.0625 |  |  |",
        "| ours w4a8 | kernels | 4.00 / 8.00 / 4.50 | 11.10 (+11.0 %) |  |  |  | 0.500 |",
        "",
    ]
    assert "| other w4a8 | reference | 4.00 / 8.00 / 4.50 | 12.00 (+20.0 %) |" in page[2]


def test_the_line_joins_what_no_other_beats() -> None:
    def point(bits: float, loss: float) -> Point:
        return Point("m", f"{bits} {loss}", bits, 4.0, loss, 0.0)

    best = best_of([point(6, 0.1), point(4, 0.5), point(8, 0.2), point(4, 0.4), point(5, 0.4)])
    assert [(p.bits, p.loss) for p in best] == [(4, 0.4), (6, 0.1)]


def test_full_precision_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="accuracy-frontier"):
        read_points([written(tmp_path, [row("fp", 10.0, FULL)])])
