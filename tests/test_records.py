"""Records: the schema refuses what other tools could not read; a file survives a round trip."""

import json
from pathlib import Path

import pytest

from atom.circumstances import CHECKOUT, current_commit
from atom.records import RESULTS, SCHEMAS, check_rows, read_record, write_record

LADDER = {"model": "m", "text": "t", "step": "fp", "outliers": 0, "ppl": 9.5, "windows": 8, "path": "reference"}
PRESET = {
    **{key: value for key, value in LADDER.items() if key not in ("step", "outliers")},
    **dict.fromkeys(("bits_weight", "bits_activation", "bits_kv"), 4.25),
    "scheme": "w4a4",
    "kv": "int4",
    "ppl_fp": 9.0,
}


def test_round_trip(tmp_path: Path) -> None:
    rows = [LADDER, {**LADDER, "step": "rtn", "ppl": None, "note": "collapsed", "bits_weight": 4.1}]
    path = write_record("quality-ladder", rows, command="atom measure", results=tmp_path)
    assert path == tmp_path / "cpu" / "quality-ladder.json"
    record = read_record("quality-ladder", results=tmp_path)
    assert record.rows == rows
    assert record.command == "atom measure"
    assert record.commit == current_commit()
    assert record.machine["name"] == "cpu" and record.machine["cores"] >= 1
    assert "torch" in record.versions
    assert len(path.read_text().splitlines()) > len(rows), "one row a line, for readable diffs"


def test_overwrites_the_earlier_run(tmp_path: Path) -> None:
    for step in ("fp", "rtn"):
        write_record("quality-ladder", [{**LADDER, "step": step}], results=tmp_path)
    assert [row["step"] for row in read_record("quality-ladder", results=tmp_path).rows] == ["rtn"]
    assert not list(tmp_path.rglob("*.partial"))


def test_alternatives_and_prefixes() -> None:
    check_rows("quality-presets", [{**PRESET, "task:piqa": 0.7, "task:piqa:stderr": 0.01}])
    method = {key: value for key, value in PRESET.items() if key != "scheme"} | {"method": "quarot"}
    check_rows("accuracy-frontier", [method, {**method, "scheme": "w4a8"}])


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("quality-ladder", {"model": "m"}, "row 0: needs text, got only model"),
        ("quality-ladder", {**LADDER, "perplexity": 1.0}, "unknown key 'perplexity'; the keys are model"),
        ("quality-ladder", {**LADDER, "step": "rtn2"}, "step is 'rtn2'; it must be one of fp, rtn"),
        ("quality-ladder", {**LADDER, "ppl": float("inf")}, "ppl is inf, which JSON cannot hold; write null"),
        ("quality-presets", {**PRESET, "scheme": "w4a4+kv8"}, "write the preset's bare name"),
        ("quality-presets", {**PRESET, "kv": "kv4"}, "kv is 'kv4'; it must be one of int4"),
        ("quality-presets", {**PRESET, "method": "x"}, "unknown key 'method'"),
        ("accuracy-frontier", PRESET, "needs method, got only model"),
        ("speed", LADDER, "unknown record 'speed'; the records are quality-ladder"),
    ],
)
def test_refusals(name: str, row: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_rows(name, [row])


@pytest.mark.parametrize(
    "text,message",
    [
        ("no", r"gemm\.json is not JSON \(Expecting value"),
        ("[]", "fields of record gemm"),
        ("{}", "fields of record gemm"),
    ],
)
def test_a_file_that_is_no_record(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "gemm.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_record("gemm", results=tmp_path)


def test_no_rows_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no rows"):
        write_record("gemm", [], results=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"h200/gemm\.json; check the path, or run the command"):
        read_record("gemm", "h200", results=tmp_path)


def test_foreign_file(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "gemm.json").write_text(json.dumps({"name": "gemm", "rows": []}))
    with pytest.raises(ValueError, match="these differ: command, commit"):
        read_record("gemm", results=tmp_path)


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_committed_records_are_valid(path: Path) -> None:
    if path.stem not in SCHEMAS:
        pytest.fail(f"{path} has no schema in atom/records.py")
    read_record(path.stem, path.parent.name)
