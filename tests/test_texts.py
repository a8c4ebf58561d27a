"""Rows of local text files: every format, and what is wrong with a bad one."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from atom.errors import UnsupportedError
from atom.texts import read_rows

ROWS = ["first row", "second\u2028row \x0c with odd breaks", "third"]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet", "parquet.gz"])
def test_records(tmp_path: Path, ending: str) -> None:
    if ending.startswith("jsonl"):
        data = "\n".join(json.dumps({"text": row, "url": "x"}, ensure_ascii=False) for row in ROWS).encode()
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        sink = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.table({"text": ROWS, "url": ["x"] * 3}), sink)
        data = sink.getvalue().to_pybytes()
    assert read_rows(write(tmp_path / f"rows.{ending}", data)) == ROWS


@pytest.mark.parametrize("ending", ["txt", "txt.gz"])
def test_lines_are_cut_as_the_hub_cuts_them(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"wiki.{ending}", b" \n = Title = \n \n One line .\nAnother .")
    assert read_rows(path) == ["", " = Title = \n", "", " One line .\n", "Another ."]


def test_the_only_string_of_a_row_is_its_text(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path / "a.jsonl", b'{"sentence": "hello", "id": 3}\n\n"bare"\n')) == ["hello", "bare"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "holds no text; give a file with running text"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.txt", b"caf\xe9", "is not UTF-8 .byte 0xe9 at 3.; convert it, for example with iconv"),
        ("a.txt.gz", b"", "holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'{"a": "x", "b": "y"}', "line 1 has no field 'text'; name the column"),
        ("a.parquet", b"PAR1 but not really", "is not a readable parquet file"),
        ("a.csv", b"x", "it must end in .txt, .jsonl, .parquet"),
    ],
)
def test_refusals(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_rows(write(tmp_path / name, data))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UnsupportedError, match=r"a\.parquet is read with the package pyarrow.*pip install pyarrow, or"):
        read_rows(write(tmp_path / "a.parquet", b"PAR1"))


def test_truncated_gzip_and_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"some text " * 100)[:-9])
    with pytest.raises(ValueError, match="not a whole gzip file"):
        read_rows(path)
    with pytest.raises(FileNotFoundError, match="does not exist; give the path of a"):
        read_rows(tmp_path / "none.txt")
