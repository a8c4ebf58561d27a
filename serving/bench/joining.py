"""Records joined from what several runs left: files that `write_rows` wrote, or alike."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from atom.records import write_record

from .report_data import machine_name

Part = dict[str, Any]
Row = dict[str, Any]


def read_parts(files: Iterable[Path], kind: str | None = None) -> list[Part]:
    """What the files hold, in order of time; with `kind` only the files that say they are of it."""
    parts: list[Part] = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    wanted = [part for part in parts if kind is None or part.get("kind") == kind]
    return sorted(wanted, key=lambda part: str(part["date"]))


def rows_of(parts: Sequence[Part]) -> list[Row]:
    """All rows; one from another commit than the last part's says so under `source`."""
    found = []
    for part in parts:
        other = {} if part["commit"] == parts[-1]["commit"] else {"source": f"commit {part['commit']}"}
        found += [row | ({} if "source" in row else other) for row in part["rows"]]
    return found


def latest(rows: Iterable[Row], keys: Sequence[str]) -> list[Row]:
    """Of rows that are alike in `keys` the last, at the first one's place."""
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def write_joined(name: str, parts: Sequence[Part], rows: Iterable[Row], command: str | None = None) -> Path:
    """Write record `name` with the circumstances of the last part; returns the path.

    command  default: those of all parts
    Raises ValueError where the parts come from several machines.
    """
    names = {part["machine"].get("name") for part in parts}
    if len(names) > 1:
        raise ValueError(f"the parts come from {', '.join(sorted(map(str, names)))}; a record is of one machine")
    last = parts[-1]
    where = {key: last[key] for key in ("date", "machine", "versions")}
    where["command"] = command or "; ".join(dict.fromkeys(part["command"] for part in parts))
    machine = last["machine"].get("name", machine_name())
    return write_record(name, list(rows), machine, where=where, commit=last["commit"])
