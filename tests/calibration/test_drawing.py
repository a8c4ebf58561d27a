"""The drawn report shows the numbers of the report."""

import io
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from atom.calibration.config import CalibrationConfig
from atom.calibration.drawing import draw_plots, report_table
from atom.calibration.report import Report
from atom.calibration.stream import quantize_model
from atom.errors import CheckpointError, UnsupportedError
from atom.quant.presets import get_scheme

Tiny = Callable[[str], Path]


def drawn(report: Report) -> str:
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=80)
    console.print(report_table(report))
    return str(console.file.getvalue())


def test_table_and_plots(tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    quantize_model(tiny("llama"), get_scheme("w4a4"), tmp_path / "out", quick)
    report = Report.read(tmp_path / "out")
    text = drawn(report)
    down = report.layers[2]["linears"]["mlp.down_proj"]
    assert f"{down['output_error']:.3f}" in text and f"{down['weight_error']:.3f}" in text
    assert "…" not in text and max(map(len, text.splitlines())) <= 80  # a terminal's usual width
    assert "10 x 48 tokens of words.txt" in text
    assert "seconds: stats" in text
    pytest.importorskip("matplotlib", reason="plots are drawn with matplotlib")
    for path in draw_plots(report, tmp_path / "plots"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(
    tiny: Tiny, quick: CalibrationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = quantize_model(tiny("llama"), get_scheme("w4a16"), tmp_path / "out", replace(quick, gptq=False))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r"matplotlib, which is not installed; pip install"):
        draw_plots(report, tmp_path / "plots")


def test_a_copy_has_nothing_to_draw(tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    report = quantize_model(tiny("llama"), get_scheme("bf16"), tmp_path / "out", quick)
    assert "copies" in drawn(report)
    assert draw_plots(report, tmp_path / "plots") == []


def test_no_report(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"atom_report\.json does not exist"):
        Report.read(tmp_path)
    (tmp_path / "atom_report.json").write_text('{"rows": []}')
    with pytest.raises(CheckpointError, match="is no calibration report"):
        Report.read(tmp_path)
