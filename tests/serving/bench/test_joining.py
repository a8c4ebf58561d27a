"""Records joined from several runs: order of time, the latest of each measurement, one machine."""

import json
from pathlib import Path

import pytest

from atom.serving.bench.joining import latest, read_parts, rows_of, write_joined


def test_parts_are_in_order_of_time(tmp_path: Path) -> None:
    files = []
    for name, part in {
        "a.json": {"kind": "load", "date": "2026-02-02", "rows": [1]},
        "b.json": {"kind": "load", "date": "2026-01-01", "rows": [2]},
        "c.json": {"notes": "neither kind nor date"},
    }.items():
        (tmp_path / name).write_text(json.dumps(part))
        files.append(tmp_path / name)
    assert [part["rows"] for part in read_parts(files, "load")] == [[2], [1]]
    assert [part["rows"] for part in read_parts(files[:2])] == [[2], [1]]


def test_the_last_of_rows_alike_counts() -> None:
    rows = [{"batch": 1, "ms": 3.0}, {"batch": 2, "ms": 4.0}, {"batch": 1, "ms": 2.0}]
    assert latest(rows, ["batch"]) == [{"batch": 1, "ms": 2.0}, {"batch": 2, "ms": 4.0}]


def test_rows_of_other_commits_say_so() -> None:
    rows: list[dict[str, object]] = [{"ms": 1}, {"ms": 2, "source": "commit z"}]
    parts = [{"commit": "a", "rows": rows}, {"commit": "b", "rows": [{"ms": 3}]}]
    assert rows_of(parts) == [{"ms": 1, "source": "commit a"}, {"ms": 2, "source": "commit z"}, {"ms": 3}]


def test_one_machine_a_record() -> None:
    parts = [{"machine": {"name": name}, "date": "2026-01-01"} for name in ("h200", "h100")]
    with pytest.raises(ValueError, match=r"come from h100, h200; a record is of one machine"):
        write_joined("latency", parts, [])
