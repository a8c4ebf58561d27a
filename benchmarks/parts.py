"""Parts of a record: what one process measured, kept on disk as it comes, and joined into the record afterwards.

A part is rewritten after every row, so that a stopped run loses one measurement at most, and a run that is started
again goes on where it was.
"""

import gc
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from atom.circumstances import circumstances, current_commit
from atom.records import Row, write_record


@dataclass
class Part:
    """Rows by record name, kept on disk as they come; `where` says how and on what, `commit` what they are of."""

    path: Path
    where: dict[str, Any]
    commit: str
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, machine: str, commit: str | None = None) -> "Part":
        """The part at `path` with what it holds already. `commit` is what is measured; default: the checkout's."""
        found = json.loads(path.read_text()) if path.exists() else {}
        for name in ("where", "commit"):
            found.pop(name, None)
        return cls(path, circumstances(machine), commit or current_commit(), found)

    def has(self, record: str, key: dict[str, Any]) -> bool:
        """Whether a row of `record` has all the values of `key`."""
        return any(all(row.get(k) == v for k, v in key.items()) for row in self.rows.get(record, []))

    def add(self, record: str, row: dict[str, Any]) -> None:
        self.rows.setdefault(record, []).append(row)
        self.write(record, row)

    def write(self, record: str, row: dict[str, Any]) -> None:
        """Write the part; `row`, of this record, is new or has changed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({**self.rows, "where": self.where, "commit": self.commit}, indent=1))
        print(record, json.dumps(row), flush=True)


def join_parts(
    paths: Sequence[Path],
    names: Iterable[str],
    commit: str | None = None,
    finish: Callable[[list[Row]], None] = lambda rows: None,
) -> None:
    """Write the records `names` that the parts have rows of.

    commit  what was measured, of parts that do not say it. If they name several commits or GPUs, the record carries the
            first part's, and the rows of the others their own.
    finish  told the rows of each record, to fill in what a part alone cannot know
    """
    parts = [json.loads(path.read_text()) for path in paths]
    commits = [part.get("commit", commit) for part in parts]
    for name in names:
        rows: list[Row] = []
        for part, own in zip(parts, commits, strict=True):
            differs = {} if own == commits[0] else {"commit": own}
            gpu = part["where"]["machine"].get("gpu")
            differs |= {} if gpu == parts[0]["where"]["machine"].get("gpu") else {"gpu": gpu}
            rows += [{**differs, **row} for row in part.get(name, [])]
        if rows:
            finish(rows)
            where = dict(parts[0]["where"])
            where["command"] += f" (and {len(parts) - 1} more parts alike)" if len(parts) > 1 else ""
            print("wrote", write_record(name, rows, where["machine"]["name"], commit=commits[0], where=where))


class scratch:  # noqa: N801  a context manager, named as it reads
    """A folder that is gone afterwards unless it is kept, and the GPU memory of what was loaded from it as well."""

    def __init__(self, parent: Path | None, keeps: bool = False) -> None:
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(dir=parent))
        self.keeps = keeps

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(self, *error: object) -> None:
        if not self.keeps:
            shutil.rmtree(self.folder)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
