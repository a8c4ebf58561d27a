"""A directory of safetensors files, checked before it is trusted and read one tensor at a time.

Headers are parsed here and compared with the file: sizes, offsets, overlaps, dtypes and shapes. A truncated or
tampered shard is an error that names the file; nothing is read beyond what a header was allowed to say.

Format: https://github.com/huggingface/safetensors#format
"""

import json
import struct
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..checkpoint import INDEX_FILE, read_json
from ..errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """One tensor as a header describes it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class Shards:
    """All tensors of a directory's safetensors files.

    Raises CheckpointError on opening if a shard that the index names is missing, a file is not what its header says,
    or a tensor stands in two files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, Entry] = {}
        for file, header in _headers(path).items():
            for name, entry in header.items():
                if name in self._entries:
                    raise CheckpointError(
                        f"tensor {name} stands in {self._entries[name].file.name} and in {file.name}; each must stand "
                        f"in one file; remove what does not belong into {path}."
                    )
                self._entries[name] = entry

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def get(self, name: str) -> Tensor:
        """Read one tensor in its own dtype onto the CPU; CheckpointError if there is none of that name."""
        from safetensors import SafetensorError, safe_open

        file = self._entry(name).file
        try:
            with safe_open(file, "pt") as opened:  # each tensor has its own mapping, which goes with it
                tensor: Tensor = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}; it must be whole; download it again.") from error
        return tensor

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise CheckpointError(f"{self.path} has no tensor {name}; it must be in the checkpoint; use a whole one.")
        return self._entries[name]


def _headers(path: Path) -> dict[Path, dict[str, Entry]]:
    """The checked header of each safetensors file that belongs to the checkpoint in `path`."""
    index = path / INDEX_FILE
    if not index.is_file():
        single = path / "model.safetensors"  # others beside it may be the same weights in another layout
        files = [single] if single.is_file() else sorted(path.glob("*.safetensors"))
        return {file: read_header(file) for file in files}
    shard_of = read_index(index)
    headers = {name: read_header(path / name) for name in sorted(set(shard_of.values()))}
    check_promises(index, shard_of, headers)
    return {path / name: header for name, header in headers.items()}


def read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name, as the index file of a sharded checkpoint says; all these files are beside it."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise CheckpointError(f"{index} has no weight_map; it must say which shard holds what; download it again.")
    shard_of = {name: str(shard) for name, shard in named.items()}
    shards = sorted(set(shard_of.values()))
    outside = [name for name in shards if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index} names shards outside its directory ({outside[0]}); do not use this checkpoint.")
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of {len(shards)} shards: {some(missing)}; all that {index.name} "
            "names must be there; download the missing ones."
        )
    return shard_of


def check_promises(index: Path, shard_of: Mapping[str, str], shards: Mapping[str, Container[str]]) -> None:
    """Raise CheckpointError unless each shard holds the tensors that the index says it does."""
    absent = [f"{name} ({shard})" for name, shard in shard_of.items() if name not in shards[shard]]
    if absent:
        raise CheckpointError(
            f"{index} promises tensors that their shards do not hold: {some(absent)}; shards and index must be of "
            "one checkpoint; download it again."
        )


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first few names of a long list, and how many more there are; for messages."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, after every claim of its header was checked against the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path} has {size} bytes and says its header takes {length}; it is truncated or no safetensors file; "
                "download it again."
            )
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"the header of {path} is not JSON ({error}); download the file again.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {path} is not a JSON object; download the file again.")
    header.pop("__metadata__", None)
    _check_layout(path, header, size - 8 - length)
    return {name: Entry(path, DTYPES[e["dtype"]], tuple(e["shape"])) for name, e in header.items()}


def _check_layout(path: Path, header: dict[str, Any], data_bytes: int) -> None:
    """Raise CheckpointError unless the tensors fill the file's data exactly, each as large as its shape says."""
    spans = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.get("dtype") not in DTYPES:
            found = entry.get("dtype") if isinstance(entry, dict) else entry
            raise CheckpointError(
                f"{path}: tensor {name} has dtype {found!r}; known are {', '.join(DTYPES)}; use a checkpoint in these."
            )
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {shape!r} and offsets {offsets!r}; both must be lists of sizes; "
                "download the file again."
            )
        needed = prod(shape) * DTYPES[entry["dtype"]].itemsize
        if offsets[1] - offsets[0] != needed:
            raise CheckpointError(
                f"{path}: tensor {name} has {offsets[1] - offsets[0]} bytes, its shape {shape} as {entry['dtype']} "
                f"needs {needed}; the header is damaged; download the file again."
            )
        spans.append((offsets[0], offsets[1], name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            what = "overlaps the tensor before it" if start < end else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {name} {what}; the header is damaged; download the file again.")
        end = stop
    if end != data_bytes:
        state = "truncated" if end > data_bytes else "longer than its header says"
        raise CheckpointError(
            f"{path} holds {data_bytes} bytes of tensors, its header describes {end}; the file is {state}; "
            "download it again."
        )


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
