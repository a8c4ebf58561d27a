"""What `atom report bench` reads: rows of record `throughput` from records and sweeps, and results of load runs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atom.circumstances import circumstances, current_commit
from atom.kernels.bounds import GPUS
from atom.records import check_rows

from .result import KIND

QUALITY = ("quality-presets", "accuracy-frontier")
LATENCY = ("engine-latency", "latency")


@dataclass(frozen=True)
class BenchData:
    """Everything a report shows.

    rows     of record `throughput`
    quality  of records `quality-presets` and `accuracy-frontier`, schemes only
    latency  of records `engine-latency` and `latency`
    profile  of record `profile`
    served   of record `served`
    loads    results of `atom bench serve`
    sources  file, date, commit, machine and command of each
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    quality: list[dict[str, Any]] = field(default_factory=list)
    latency: list[dict[str, Any]] = field(default_factory=list)
    profile: list[dict[str, Any]] = field(default_factory=list)
    served: list[dict[str, Any]] = field(default_factory=list)
    loads: list[dict[str, Any]] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)


def write_rows(path: Path, rows: Sequence[dict[str, Any]], name: str = "throughput") -> Path:
    """Write rows of record `name` with the circumstances of this machine; returns the path."""
    check_rows(name, rows)
    data = {"name": name, **circumstances(machine_name()), "commit": current_commit(), "rows": list(rows)}
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def machine_name() -> str:
    """What records call this machine: its GPU's short name, or cpu."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name().lower()
    return next((gpu for gpu in GPUS if gpu in name), name.replace(" ", "-"))


def read_bench(paths: Sequence[Path]) -> BenchData:
    """Read records or sweeps of `throughput`, folders of a sweep, results of `atom bench serve`, other records.

    Raises ValueError for a file that is none of these.
    """
    data = BenchData()
    for path in paths:
        file = path / "throughput.json" if path.is_dir() else path
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON ({error}); give results of atom bench sweep or serve") from None
        if isinstance(found, dict) and found.get("name") == "throughput":
            check_rows("throughput", found["rows"])
            data.rows.extend(found["rows"])
        elif isinstance(found, dict) and found.get("name") in QUALITY:
            check_rows(found["name"], found["rows"])
            data.quality.extend(row for row in found["rows"] if "scheme" in row)
        elif isinstance(found, dict) and found.get("name") in LATENCY:
            check_rows(found["name"], found["rows"])
            data.latency.extend(found["rows"])
        elif isinstance(found, dict) and found.get("name") in ("profile", "served"):
            check_rows(found["name"], found["rows"])
            getattr(data, found["name"]).extend(found["rows"])
        elif isinstance(found, dict) and found.get("kind") == KIND:
            data.loads.append({**found, "file": file.name, "samples": None})
        else:
            raise ValueError(
                f"{file} is neither a record `throughput` nor a result of atom bench serve; give files that atom bench "
                "sweep or atom bench serve --output wrote, or records of latency, quality, profiles"
            )
        facts = {key: found.get(key) for key in ("date", "commit", "command")}
        data.sources.append({"file": file.name, **facts, "machine": found.get("machine", {})})
    return data


def workload_of(row: dict[str, Any]) -> str:
    """The workload of a row of record `throughput`; of fixed lengths, these."""
    return str(row.get("workload") or f"{row['input']}/{row['output']}")
