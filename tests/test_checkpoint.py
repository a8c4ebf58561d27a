"""The checkpoint writer: atomic, resumable, and clear about what went wrong."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from atom.checkpoint import (
    INDEX_FILE,
    REPORT_FILE,
    RUN_FILE,
    VERSION,
    CheckpointWriter,
    quantization_config,
    read_json,
    read_scheme,
)
from atom.errors import CheckpointError
from atom.quant.presets import PRESETS

RUN = {"source": "tiny", "scheme": "w4a4", "seed": 0}


def shard(number: int) -> dict[str, torch.Tensor]:
    return {f"layer{number}.w": torch.full((2, 3), float(number)), f"layer{number}.t": torch.arange(6).view(2, 3).T}


def test_whole_or_not_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    writer = CheckpointWriter(out, RUN, num_shards=2)
    size = writer.write_shard(1, shard(1)) + writer.write_shard(2, shard(2))
    writer.note("layer-1", {"error": 0.5})
    assert writer.noted("layer-1") == {"error": 0.5} and writer.noted("layer-2") is None
    assert not out.exists()
    (writer.partial / "model-00009-of-00009.tmp").write_text("of a killed run")
    writer.finish({"model_type": "llama"}, {"report": 1}, [tokenizer])
    names = {"config.json", REPORT_FILE, INDEX_FILE, "tokenizer.json"}
    names |= {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert {p.name for p in out.iterdir()} == names and not writer.partial.exists()
    index = read_json(out / INDEX_FILE)
    assert index["metadata"]["total_size"] == size
    for name, file in index["weight_map"].items():
        number = int(name[5])
        assert torch.equal(load_file(out / file)[name], shard(number)[name])
    assert read_json(out / REPORT_FILE) == {"report": 1}


def test_an_empty_output_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    writer = CheckpointWriter(tmp_path / "out", RUN, 1)
    writer.write_shard(1, shard(1))
    assert (writer.finish({}, {}, []) / "config.json").exists()


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_output_that_holds_something_is_refused(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("precious")
    else:
        out.mkdir()
        (out / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="exists and is not empty; choose another --output or remove it"):
        CheckpointWriter(out, RUN, 1)


def test_resume_keeps_whole_shards(tmp_path: Path) -> None:
    first = CheckpointWriter(tmp_path / "out", RUN, 2)
    first.write_shard(1, shard(1))
    with pytest.raises(CheckpointError, match="unfinished run; pass --resume to continue"):
        CheckpointWriter(tmp_path / "out", RUN, 2)
    second = CheckpointWriter(tmp_path / "out", RUN, 2, resume=True)
    assert second.has_shard(1) and not second.has_shard(2)
    second.write_shard(2, shard(2))
    second.finish({}, {}, [])


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    CheckpointWriter(tmp_path / "out", RUN, 1)
    with pytest.raises(CheckpointError, match=r"another run \(seed: was 0, now 1; windows: was None, now 4\)"):
        CheckpointWriter(tmp_path / "out", {**RUN, "seed": 1, "windows": 4}, 1, resume=True)


def test_resume_compares_what_json_keeps(tmp_path: Path) -> None:
    CheckpointWriter(tmp_path / "out", {"shape": (1, 2)}, 1)
    CheckpointWriter(tmp_path / "out", {"shape": (1, 2)}, 1, resume=True)


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_then_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(tmp_path / "out", RUN, 1)
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full_disk)
        with pytest.raises(CheckpointError, match="the disk is full; free some space, then continue with --resume"):
            writer.write_shard(1, shard(1))
    assert not writer.has_shard(1)
    again = CheckpointWriter(tmp_path / "out", RUN, 1, resume=True)
    again.write_shard(1, shard(1))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_disk)
        with pytest.raises(CheckpointError, match="the disk is full"):
            again.finish({}, {}, [])
    assert not (tmp_path / "out").exists()
    again.finish({}, {}, [])
    assert (tmp_path / "out" / "config.json").exists()


def test_safetensors_own_error_is_told_as_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def fail(*args: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    writer = CheckpointWriter(tmp_path / "out", RUN, 1)
    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(CheckpointError, match="the disk is full"):
        writer.write_shard(1, shard(1))


def test_disk_full_at_the_very_start_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_disk)
        with pytest.raises(CheckpointError, match="the disk is full"):
            CheckpointWriter(tmp_path / "out", RUN, 1)
    writer = CheckpointWriter(tmp_path / "out", RUN, 1, resume=True)
    assert read_json(writer.partial / RUN_FILE) == RUN


def test_a_refused_write_names_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match=r"Permission denied; check permissions and the path"):
        CheckpointWriter(tmp_path / "out", RUN, 1)


@pytest.mark.parametrize("name", PRESETS)
def test_scheme_survives_config_json(name: str) -> None:
    config = json.loads(json.dumps({"quantization_config": quantization_config(PRESETS[name])}))
    assert read_scheme(config) == PRESETS[name]


def test_no_quantization_config_is_full_precision() -> None:
    assert read_scheme({}) is None and read_scheme({"quantization_config": None}) is None


@pytest.mark.parametrize("version", [VERSION + 1, 99, 0, -1, None, "1", 1.5])
def test_other_versions_are_refused(version: Any) -> None:
    found = {**quantization_config(PRESETS["w4a4"]), "version": version}
    with pytest.raises(CheckpointError, match=rf"here of version|version {version}.*upgrade atom-serving or quantize"):
        read_scheme({"quantization_config": found}, "here")


@pytest.mark.parametrize("found", [{"quant_method": "gptq"}, {}, "gptq", []])
def test_other_tools_are_refused(found: Any) -> None:
    with pytest.raises(CheckpointError, match=r"says quant_method .*start from the original checkpoint"):
        read_scheme({"quantization_config": found})


@pytest.mark.parametrize("scheme", [None, "w4a4", [], {}, {"name": "x", "sparkle": 1}, {"name": "x", "weight": {}}])
def test_unreadable_schemes_are_refused(scheme: Any) -> None:
    found = {"quant_method": "atom", "version": 1, "scheme": scheme}
    with pytest.raises(CheckpointError, match=r"the scheme in config\.json cannot be read .*quantize again"):
        read_scheme({"quantization_config": found})


def test_missing_scheme_is_refused() -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_scheme({"quantization_config": {"quant_method": "atom", "version": 1}})


def test_read_json_names_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match="does not exist; give a directory that holds"):
        read_json(path)
    for content, message in ((b"{", "is no JSON"), (b"\xff\xfe", "is no JSON"), (b"[1]", "holds list, needed is")):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_json(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_json(path / "config.json")  # a file where a directory should be
