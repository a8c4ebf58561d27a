"""The Atom checkpoint on disk: a Hugging Face directory whose config.json says how it is quantized.

Written shard by shard into DIR.partial, finished by renaming that directory: a checkpoint is either whole or not there.
docs/checkpoint.md lists every file and tensor; atom/quant/stored.py says how one linear lies in it.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import CheckpointError
from .quant.schemes import Scheme

QUANT_METHOD = "atom"
VERSION = 1
RUN_FILE = "atom_run.json"
REPORT_FILE = "atom_report.json"
INDEX_FILE = "model.safetensors.index.json"


def quantization_config(scheme: Scheme) -> dict[str, Any]:
    """What config.json says under `quantization_config`."""
    return {"quant_method": QUANT_METHOD, "version": VERSION, "scheme": scheme.to_dict()}


def read_scheme(config: Mapping[str, Any], where: str = "config.json") -> Scheme | None:
    """The scheme of a parsed config.json, or None if the model is not quantized.

    Raises CheckpointError if another tool quantized it, or a newer Atom.
    """
    found = config.get("quantization_config")
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, Mapping) else found
    if method != QUANT_METHOD:
        raise CheckpointError(
            f"{where} says quant_method {method!r}, needed is {QUANT_METHOD!r} or a full-precision model; "
            "start from the original checkpoint and run `atom quantize`"
        )
    version = found.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise CheckpointError(
            f"{where} is an Atom checkpoint of version {version}, this Atom reads versions 1 to {VERSION}; "
            "upgrade atom-serving or quantize again"
        )
    try:
        return Scheme.from_dict(found["scheme"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the scheme in {where} cannot be read ({error}); quantize again") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError names the file if it is missing or damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} does not exist; give a directory that holds a model's {path.name}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is no JSON ({error}); download or write the checkpoint again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}, needed is a JSON object; download it again")
    return data


def check_output(out: Path, resume: bool = False) -> Path:
    """The directory that a checkpoint named `out` grows in, OUT.partial.

    Raises CheckpointError if `out` holds something, or another run was stopped there and is not to be resumed.
    """
    partial = out.with_name(out.name + ".partial")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not empty; choose another --output or remove it")
    if partial.exists() and not resume:
        raise CheckpointError(
            f"{partial} holds an unfinished run; pass --resume to continue it, or remove it to start again"
        )
    return partial


class CheckpointWriter:
    """Writes a checkpoint shard by shard; a killed run leaves DIR.partial, from which another resumes.

    `run` describes what is being written (source, scheme, calibration). A resumed writer compares it with what the
    first run left, and refuses to mix two runs.
    """

    def __init__(self, out: Path, run: Mapping[str, Any], num_shards: int, resume: bool = False) -> None:
        self.out = out
        self.num_shards = num_shards
        self.partial = check_output(out, resume)
        run = json.loads(json.dumps(run))
        if (self.partial / RUN_FILE).exists():
            _same_run(read_json(self.partial / RUN_FILE), run, self.partial)
        else:
            with disk_errors(self.partial):
                self.partial.mkdir(parents=True, exist_ok=True)
                self._write_text(RUN_FILE, json.dumps(run, indent=1))

    def has_shard(self, number: int) -> bool:
        """Whether shard `number` (from 1) was written whole."""
        return self.shard_path(number).exists()

    def shard_path(self, number: int) -> Path:
        return self.partial / f"model-{number:05d}-of-{self.num_shards:05d}.safetensors"

    def write_shard(self, number: int, tensors: Mapping[str, Tensor]) -> int:
        """Write shard `number` atomically; returns its bytes. Tensors are moved to the CPU."""
        from safetensors.torch import save_file

        path = self.shard_path(number)
        temporary = path.with_suffix(".tmp")
        with disk_errors(temporary):
            save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, temporary, {"format": "pt"})
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        return path.stat().st_size

    def note(self, name: str, data: Mapping[str, Any]) -> None:
        """Keep `data` as name.json beside the shards (what the report needs after a resume)."""
        with disk_errors(self.partial):
            self._write_text(f"{name}.json", json.dumps(data))

    def noted(self, name: str) -> dict[str, Any] | None:
        """What an earlier run kept under `name`, if it did."""
        path = self.partial / f"{name}.json"
        return read_json(path) if path.exists() else None

    def finish(self, config: Mapping[str, Any], report: Mapping[str, Any], extra_files: list[Path]) -> Path:
        """Write index, config and report, copy `extra_files`, and rename the whole into place."""
        from safetensors import safe_open

        weight_map: dict[str, str] = {}
        total = 0
        shards = [self.shard_path(number) for number in range(1, self.num_shards + 1)]
        with disk_errors(self.partial):
            for shard in shards:
                with safe_open(shard, "pt") as file:
                    weight_map.update(dict.fromkeys(file.keys(), shard.name))
                total += shard.stat().st_size
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            self._write_text(INDEX_FILE, json.dumps(index, indent=1))
            self._write_text("config.json", json.dumps(config, indent=2))
            self._write_text(REPORT_FILE, json.dumps(report, indent=1))
            for source in extra_files:
                shutil.copyfile(source, self.partial / source.name)
            if self.out.exists():
                self.out.rmdir()  # empty: checked at the start
            self.partial.rename(self.out)
            kept = {"config.json", REPORT_FILE, INDEX_FILE, *(f.name for f in extra_files), *(s.name for s in shards)}
            for path in self.out.iterdir():
                if path.name not in kept:
                    path.unlink()
        return self.out

    def _write_text(self, name: str, text: str) -> None:
        temporary = self.partial / f"{name}.tmp"
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(self.partial / name)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a refused write into a CheckpointError that says so."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        what = "the disk is full" if full else str(error)
        remedy = "free some space" if full else "check permissions and the path"
        raise CheckpointError(f"cannot write {path}: {what}; {remedy}, then continue with --resume") from error


def _same_run(found: Mapping[str, Any], wanted: Mapping[str, Any], where: Path) -> None:
    changed = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
    if changed:
        detail = "; ".join(f"{k}: was {found.get(k)!r}, now {wanted.get(k)!r}" for k in changed)
        raise CheckpointError(
            f"{where} belongs to another run ({detail}); resume with the same options, or remove it to start again"
        )
