"""Rows of text from a local file (.txt, .jsonl or .parquet, each also gzipped as .gz) or a dataset on the hub.

The rows of a .txt file are its lines with their line ends, blank lines being empty rows, exactly as the WikiText
dataset on the hub cuts them: joined, they give the same tokens as the hub's copy.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from .errors import UnsupportedError

SUFFIXES = (".txt", ".jsonl", ".parquet")


def is_text_file(name: str) -> bool:
    """Whether `name` ends as a file that read_rows can read."""
    return name.removesuffix(".gz").endswith(SUFFIXES)


def read_rows(path: Path) -> list[str]:
    """The rows of text of the file at `path`.

    Raises FileNotFoundError if there is none, and ValueError if its name does not say what it is, it is not UTF-8,
    it is damaged, a row has no text, or no row holds any; UnsupportedError for parquet where pyarrow is not installed.
    """
    if not is_text_file(path.name):
        raise ValueError(
            f"{path} is no text file by its name; it must end in {', '.join(SUFFIXES)} (or these with .gz)"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the path of a {', '.join(SUFFIXES)} file")
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = _gunzip(raw, path)
    stem = path.name.removesuffix(".gz")
    rows = _parquet_rows(raw, path) if stem.endswith(".parquet") else _text_rows(raw, path, stem.endswith(".jsonl"))
    if not any(row.strip() for row in rows):
        raise ValueError(f"{path} holds no text; give a file with running text")
    return rows


def read_text(path: Path) -> str:
    """The text of the file at `path`: a .txt file as it stands, the rows of other files joined by a blank line.

    Raises as read_rows.
    """
    rows = read_rows(path)
    if path.name.removesuffix(".gz").endswith(".txt"):
        return "".join(row or "\n" for row in rows)  # a blank line was read as an empty row
    return "\n\n".join(rows)


def read_hub_rows(name: str, dataset: Mapping[str, Any], max_rows: int | None = None) -> list[str]:
    """The rows of text of a dataset on the hub: of a very large one the first `max_rows`, without fetching the rest.

    name     what the user called it; dataset is what datasets.load_dataset takes
    Raises UnsupportedError where `datasets` is not installed, or the dataset is out of reach.
    """
    try:
        import datasets
    except ImportError:
        raise UnsupportedError(
            f"{name} is loaded with the package datasets, which is not installed; pip install datasets, or give a "
            f"local copy as {name}=FILE"
        ) from None
    try:
        rows = islice(datasets.load_dataset(**dataset, streaming=max_rows is not None), max_rows)
        return [text_of(row, f"{name}, row {number}") for number, row in enumerate(rows, 1)]
    except Exception as error:  # datasets raises whatever its transport does
        raise UnsupportedError(
            f"{name} could not be loaded from the hub ({type(error).__name__}: {error}); check the network, or give a "
            f"local copy as {name}=FILE"
        ) from error


def _gunzip(raw: bytes, path: Path) -> bytes:
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} ends in .gz but is not a whole gzip file ({error}); compress it again") from None


def _text_rows(raw: bytes, path: Path, is_jsonl: bool) -> list[str]:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte {raw[error.start]:#04x} at {error.start:,}"
        raise ValueError(
            f"{path} is not UTF-8 ({found}); convert it, for example with iconv -f latin1 -t utf-8"
        ) from None
    lines = io.StringIO(text, newline=None)  # only \n ends a line; str.splitlines would also cut at U+2028 and \f
    if is_jsonl:
        return list(_jsonl_rows(lines, path))
    return [line if line.strip() else "" for line in lines]


def _jsonl_rows(lines: io.StringIO, path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error.msg}); write one object a line") from None
        yield text_of(row, f"{path}, line {number}")


def _parquet_rows(raw: bytes, path: Path) -> list[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UnsupportedError(
            f"{path} is read with the package pyarrow, which is not installed; pip install pyarrow, or give the text "
            "as .txt or .jsonl"
        ) from None
    try:
        rows = parquet.read_table(io.BytesIO(raw)).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file ({error}); write it again") from None
    return [text_of(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def text_of(row: Any, where: str) -> str:
    """The text of a row: the row itself, its field `text`, or its only field that holds a string."""
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return str(row["text"])
        strings = [value for value in row.values() if isinstance(value, str)]
        if len(strings) == 1:
            return strings[0]
    raise ValueError(f"{where} has no field 'text'; name the column that holds the text 'text'")
