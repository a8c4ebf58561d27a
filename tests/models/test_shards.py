"""Safetensors directories: what is read, and every way in which a file can lie."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from atom.errors import CheckpointError
from atom.models.shards import DTYPES, Shards, read_header


def write(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    as_list = [list(value) if isinstance(value, tuple) else value for value in (shape, offsets)]
    return {"dtype": dtype, "shape": as_list[0], "data_offsets": as_list[1]}


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    """Every dtype that a checkpoint may hold, a scalar and an empty tensor among them."""
    tensors = {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    shards = Shards(tmp_path)
    assert sorted(shards.names()) == sorted(tensors)
    for name, tensor in tensors.items():
        assert shards.shape(name) == tuple(tensor.shape)
        assert shards.dtype(name) == tensor.dtype
        assert torch.equal(shards.get(name).to(torch.float64), tensor.to(torch.float64))


LIES: dict[str, tuple[Any, bytes, str]] = {
    "no header": (b"{}" + b" " * 8, b"", ""),
    "not json": (b"{'a': 1}", b"", "is not JSON"),
    "a list": ([1], b"", "is not a JSON object"),
    "unknown dtype": ({"a": entry("F7")}, bytes(8), "tensor a has dtype 'F7'"),
    "no entry": ({"a": 3}, bytes(8), "tensor a has dtype 3"),
    "negative size": ({"a": entry(shape=(-2,))}, bytes(8), r"shape \[-2\]"),
    "boolean size": ({"a": entry(shape=(True,))}, bytes(8), r"shape \[True\]"),
    "shape of text": ({"a": entry(shape="22")}, bytes(8), "must be lists of sizes"),
    "one offset": ({"a": entry(offsets=(0,))}, bytes(8), "must be lists of sizes"),
    "wrong size": ({"a": entry(shape=(3,))}, bytes(8), "has 8 bytes, its shape .* needs 12"),
    "backwards": ({"a": entry(offsets=(8, 0))}, bytes(8), "has -8 bytes"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "tensor b overlaps"),
    "hole": ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), "tensor b leaves a hole"),
    "truncated": ({"a": entry()}, bytes(7), "truncated; download it again"),
    "too long": ({"a": entry()}, bytes(9), "longer than its header says"),
    "huge": ({"a": entry(shape=(2**40, 2**40), offsets=(0, 2**82))}, bytes(8), "truncated"),
}


@pytest.mark.parametrize("lie", [name for name in LIES if LIES[name][2]])
def test_a_header_that_lies_is_refused(lie: str, tmp_path: Path) -> None:
    header, data, message = LIES[lie]
    path = write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as error:
        read_header(path)
    assert "model.safetensors" in str(error.value)


def test_an_empty_header_is_an_empty_file(tmp_path: Path) -> None:
    assert read_header(write(tmp_path / "a.safetensors", *LIES["no header"][:2])) == {}


@pytest.mark.parametrize("size", [0, 7, 8, 30])
def test_a_file_cut_in_its_header_is_refused(size: int, tmp_path: Path) -> None:
    path = write(tmp_path / "model-00001-of-00002.safetensors", {"a": entry()}, bytes(8))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors has .* truncated"):
        read_header(path)


def test_a_header_as_long_as_it_claims_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(CheckpointError, match="says its header takes 9223372036854775808"):
        read_header(path)


def sharded(path: Path) -> Path:
    save_file({"a": torch.zeros(2)}, path / "one.safetensors")
    save_file({"b": torch.ones(3)}, path / "two.safetensors")
    index(path, {"a": "one.safetensors", "b": "two.safetensors"})
    return path


def index(path: Path, weight_map: Any) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards(tmp_path: Path) -> None:
    shards = Shards(sharded(tmp_path))
    assert shards.names() == ["a", "b"]
    assert torch.equal(shards.get("b"), torch.ones(3))
    with pytest.raises(CheckpointError, match="has no tensor c"):
        shards.get("c")


def test_missing_shard_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 shards: two\.safetensors"):
        Shards(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "one.safetensors", "b": "one.safetensors"}, r"promises tensors .*: b \(one\.safetensors\)"),
        ({"a": "../one.safetensors"}, "names shards outside its directory"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(weight_map: Any, message: str, tmp_path: Path) -> None:
    index(sharded(tmp_path), weight_map)
    with pytest.raises(CheckpointError, match=message):
        Shards(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"a": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor a stands in one\.safetensors and in two\.safetensors"):
        Shards(tmp_path)


def test_other_layouts_beside_the_model_are_left_alone(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    assert torch.equal(Shards(tmp_path).get("a"), torch.zeros(2))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from Linux's /proc")
def test_what_was_read_does_not_stay_in_memory(tmp_path: Path) -> None:
    """Calibration reads layer by layer; a checkpoint must not add up to its size."""
    sixteen = {f"layer.{index}": torch.full((1024, 1024), float(index)) for index in range(16)}  # of 4 MiB
    save_file(sixteen, tmp_path / "model.safetensors")
    shards = Shards(tmp_path)
    before = resident_bytes()
    for index in range(16):
        assert shards.get(f"layer.{index}").sum() == index * 2**20
    assert resident_bytes() - before < 16 * 2**20


def resident_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024
