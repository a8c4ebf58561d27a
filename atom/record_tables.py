"""Tables in Markdown files, drawn from records, so that no quoted number is typed by hand.

A table stands between two comments and is rewritten by `python -m atom.record_tables README.md docs/*.md`
(with --check it is only compared, and the exit code is 1 where a file disagrees with the records):

    <!-- record:quality-presets machine=cpu columns="model,scheme,ppl=perplexity" where=text=wikitext2 -->
    <!-- record:quality-ladder rows=model columns=step value=ppl digits=2 -->
    ...
    <!-- /record -->

The first form lists rows; `key=Title` renames a column, and a key whose `key:stderr` is in the row shows both.
The second crosses two keys, numbers across in order; `rows=scheme+kv` names its lines by two. Markers start at the
first column: indented ones, as here, are examples. `where` keeps rows (key=value,key=value; a value that ends in ":"
is a beginning, one|other is either, !value is any other), `digits` rounds, `machine` defaults to cpu.
"""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .records import RESULTS, Record, Row, read_record

MARKER = re.compile(
    r"^(<!-- record:(?P<name>[\w-]+)(?P<options>[^>]*?)-->\n)(?P<body>.*?)^(<!-- /record -->)", re.DOTALL | re.MULTILINE
)
OPTIONS = ("machine", "columns", "rows", "value", "where", "digits")


@dataclass(frozen=True)
class TableSpec:
    """What one marker asks for; see the module's docstring."""

    name: str
    columns: tuple[tuple[str, str], ...]  # (row key, title)
    machine: str = "cpu"
    rows: str | None = None
    value: str | None = None
    where: tuple[tuple[str, str], ...] = ()
    digits: int = 2

    @classmethod
    def parse(cls, name: str, options: str) -> "TableSpec":
        """Read a marker's options; ValueError says what is wrong with them."""
        given: dict[str, str] = {}
        for word in shlex.split(options):
            key, _, value = word.partition("=")
            if key not in OPTIONS or not value:
                raise ValueError(
                    f"record:{name}: cannot read {word!r}; the options are {', '.join(OPTIONS)}, as key=value"
                )
            given[key] = value
        if "columns" not in given or ("rows" in given) != ("value" in given):
            raise ValueError(
                f"record:{name}: give columns=a,b,c for a list, or rows=, columns= and value= for a cross table"
            )
        return cls(
            name=name,
            columns=tuple(_split_pair(part) for part in given["columns"].split(",")),
            machine=given.get("machine", "cpu"),
            rows=given.get("rows"),
            value=given.get("value"),
            where=tuple(_split_pair(part) for part in given.get("where", "").split(",") if part),
            digits=int(given.get("digits", "2")),
        )


def _split_pair(part: str) -> tuple[str, str]:
    key, _, title = part.partition("=")
    return key, title or key


def render(spec: TableSpec, record: Record) -> str:
    """The Markdown table of `spec`, with a line below it that names the record, its commit and its command."""
    rows = [row for row in record.rows if all(_fits(str(row.get(key)), value) for key, value in spec.where)]
    if not rows:
        raise ValueError(
            f"record:{spec.name}: no row of {spec.machine} matches {dict(spec.where)}; change the marker's where="
        )
    lines = _cross(spec, rows) if spec.rows else _list(spec, rows)
    widths = [len(line) for line in lines]
    assert len(set(widths)) == 1, "a table's lines have equally many cells"
    body = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in body)
    source = f"benchmarks/results/{spec.machine}/{spec.name}.json"
    return f"{table}\n\n`{source}`, {record.date[:10]}, commit {record.commit}: `{record.command}`\n"


def _fits(found: str, wanted: str) -> bool:
    if wanted.startswith("!"):
        return not _fits(found, wanted[1:])
    return any(found.startswith(one) if one.endswith(":") else found == one for one in wanted.split("|"))


def _list(spec: TableSpec, rows: Sequence[Row]) -> list[list[str]]:
    for key, _ in spec.columns:
        if not any(key in row for row in rows):
            raise ValueError(f"record:{spec.name}: no row has the key {key!r}; the first has {', '.join(rows[0])}")
    return [[title for _, title in spec.columns]] + [
        [_cell(row, key, spec.digits) for key, _ in spec.columns] for row in rows
    ]


def _cross(spec: TableSpec, rows: Sequence[Row]) -> list[list[str]]:
    assert spec.rows is not None and spec.value is not None
    if len(spec.columns) != 1:
        raise ValueError(f"record:{spec.name}: a cross table has one key in columns=, got {len(spec.columns)}")
    across = spec.columns[0][0]
    heads, tops = ([*dict.fromkeys(_name(row, key) for row in rows)] for key in (spec.rows, across))
    if all(isinstance(row.get(across), int) for row in rows):
        tops.sort(key=int)
    cells: dict[tuple[str, str], str] = {}
    for row in rows:
        place = _name(row, spec.rows), _name(row, across)
        if place in cells:
            raise ValueError(
                f"record:{spec.name}: two rows for {spec.rows}={place[0]}, {across}={place[1]}; narrow where="
            )
        cells[place] = _cell(row, spec.value, spec.digits)
    return [[spec.rows, *tops]] + [[head, *(cells.get((head, top), "") for top in tops)] for head in heads]


def _name(row: Row, keys: str) -> str:
    return " ".join(str(row.get(key)) for key in keys.split("+"))


def _cell(row: Row, key: str, digits: int) -> str:
    text = _number(row.get(key), digits)
    stderr = row.get(f"{key}:stderr")
    return text if stderr is None else f"{text} ± {_number(stderr, digits)}"


def _number(value: Any, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def update_text(text: str, results: Path = RESULTS) -> str:
    """`text` with every marked table drawn anew from the records under `results`."""

    def replace(match: re.Match[str]) -> str:
        spec = TableSpec.parse(match["name"], match["options"])
        return match[1] + render(spec, read_record(spec.name, spec.machine, results)) + match[5]

    return MARKER.sub(replace, text)


def stale_files(paths: Sequence[Path], results: Path = RESULTS) -> list[Path]:
    """The Markdown files among `paths` whose tables disagree with the records."""
    return [path for path in paths if (text := path.read_text(encoding="utf-8")) != update_text(text, results)]


def main(arguments: Sequence[str]) -> int:
    """Rewrite (or with --check compare) the tables of the given files; returns the exit code."""
    paths = [Path(a) for a in arguments if a != "--check"]
    stale = stale_files(paths)
    for path in stale:
        if "--check" in arguments:
            print(f"{path}: a table disagrees with its record; run python -m atom.record_tables {path}")
        else:
            path.write_text(update_text(path.read_text(encoding="utf-8")), encoding="utf-8")
            print(f"{path}: updated")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
