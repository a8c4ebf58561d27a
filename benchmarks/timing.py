"""What the benchmarks share: the timing protocol of atom/kernels/timing.py, and how records are kept."""

import json
from pathlib import Path
from typing import Any

from atom.circumstances import circumstances, current_commit
from atom.kernels.timing import COLD_BYTES as COLD_BYTES
from atom.kernels.timing import time_calls as time_calls
from atom.records import write_record


def keep(name: str, rows: list[dict[str, Any]], out: str | None, is_record: bool = True) -> None:
    """Write the rows of a finished run as record `name`, or with their circumstances into the file `out`."""
    if out:
        found = {"rows": rows, "where": circumstances("h200"), "commit": current_commit()}
        Path(out).write_text(json.dumps(found))
    elif is_record:
        print(write_record(name, rows, "h200"))


def save(name: str, file: str) -> None:
    """Write record `name` from what `keep` wrote into a file on another machine."""
    found = json.loads(Path(file).read_text())
    print(write_record(name, found["rows"], "h200", where=found["where"], commit=found["commit"]))
