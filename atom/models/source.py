"""Where a model's files come from: a hub id, a local directory, a GGUF file, or the alias of a small real model.

Whatever was given, a `Source` is one local directory with config, tokenizer and weights of one revision, whose
tensors are read one at a time. Nothing from a checkpoint is ever executed: safetensors, or `.bin` files through
torch's weights-only reader, and no remote code.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checkpoint import read_json, read_scheme
from ..env import cache_dir
from ..errors import CheckpointError
from .alias import ALIASES, fetch_alias
from .bin_weights import BinWeights
from .gguf import PROVENANCE_FILE, convert
from .shards import Shards

log = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them is what a tokenizer cannot do without
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_HUB_IGNORED = ["*/*", "consolidated*"]  # other formats of the same weights


class Weights(Protocol):
    """Named tensors on disk, read one at a time."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def get(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Source:
    """One model on local disk.

    config, generation_config  parsed; the second is empty where there is none
    provenance                 what was asked for, its kind, and the revision or hash that was found
    """

    path: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    weights: Weights

    def names(self) -> list[str]:
        """Names of all tensors, as the checkpoint has them."""
        return self.weights.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.weights.dtype(name)

    def get(self, name: str) -> Tensor:
        """Read one tensor, in its own dtype, on the CPU. Raises CheckpointError if there is none of that name."""
        return self.weights.get(name)

    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files, to be copied beside a model made from this one."""
        return [self.path / name for name in TOKENIZER_FILES if (self.path / name).is_file()]

    @property
    def is_quantized(self) -> bool:
        """It is an Atom checkpoint."""
        return "quantization_config" in self.config


def open_source(model: str | Path, revision: str | None = None) -> Source:
    """The model called `model`: a directory, a GGUF file, the alias `smollm2`, or a hub id (at `revision`).

    Raises CheckpointError if it cannot be found, is damaged, or is quantized by other means or by a newer Atom, and
    ValueError if a revision is asked of what has none.
    """
    name, local = str(model), Path(model).expanduser()
    if revision is not None and (local.exists() or name in ALIASES):
        raise ValueError(f"{name} is no hub model and has no revision {revision!r}; leave the revision out")
    if local.is_dir():
        return open_directory(local, {"source": local.resolve().name, "kind": "directory"})
    if local.is_file():
        return open_directory(convert(local, cache_dir()), {"source": local.name, "kind": "gguf"})
    if name in ALIASES:
        gguf = fetch_alias(name, cache_dir())
        return open_directory(convert(gguf, cache_dir()), {"source": name, "kind": "gguf"})
    if _HUB_ID.fullmatch(name):
        path = _download(name, revision)
        return open_directory(path, {"source": name, "kind": "hub", "revision": path.name})
    raise CheckpointError(
        f"model {name!r} is not there; give a directory, a GGUF file, a hub id such as Qwen/Qwen3-0.6B, "
        f"or {' or '.join(ALIASES)}; check the spelling of the path."
    )


def read_config(model: str | Path, revision: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json ({} if absent) of the model called `model`, named as for open_source.

    Of a hub model nothing else is fetched; a GGUF file is converted (once), since its config is in it.
    """
    name, local = str(model), Path(model).expanduser()
    if local.is_dir() and revision is None:
        path = local
    elif not local.exists() and name not in ALIASES and _HUB_ID.fullmatch(name):
        path = _download(name, revision, ["config.json", "generation_config.json"])
    else:
        path = open_source(model, revision).path
    generation = path / "generation_config.json"
    return read_json(path / "config.json"), read_json(generation) if generation.is_file() else {}


def open_directory(path: Path, provenance: Mapping[str, Any]) -> Source:
    """The model in a local directory, with what is known of its origin."""
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} has no config.json; a model directory holds config.json, safetensors and a tokenizer; "
            "check the path, or pass the GGUF file itself."
        )
    config = read_json(path / "config.json")
    read_scheme(config, f"{path.name}/config.json")  # another tool's checkpoint, or a newer Atom's, ends here
    origin, generation = (
        read_json(path / name) if (path / name).is_file() else {}
        for name in (PROVENANCE_FILE, "generation_config.json")
    )
    return Source(path, config, generation, {**origin, **provenance}, open_weights(path))


def open_weights(path: Path) -> Weights:
    """The weight files of a directory: safetensors, else PyTorch `.bin` files."""
    if any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").is_file():
        return Shards(path)
    if any(path.glob("pytorch_model*.bin")):
        return BinWeights(path)
    raise CheckpointError(
        f"{path} has no weights; it needs model.safetensors, its shards with their index, or pytorch_model.bin; "
        "download the model again."
    )


def load_tokenizer(model: Path | str) -> Any:
    """The transformers tokenizer of a model, named as for open_source; CheckpointError says what is missing."""
    local = Path(model).expanduser()
    folder = local if local.is_dir() else open_source(model).path
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        gguf = next(folder.glob("*.gguf"), None)
        advice = "copy the tokenizer files of the original model into it" if gguf is None else f"or pass {gguf} itself"
        raise CheckpointError(f"{folder} has no tokenizer; one of {', '.join(_VOCABULARIES)} is needed; {advice}.")
    try:
        return _tokenizer_class(folder).from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, LookupError, TypeError, AttributeError, ImportError) as error:
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be read ({type(error).__name__}: {error}); its files must be whole and "
            "of one model; copy them from the original again."
        ) from error


def _tokenizer_class(folder: Path) -> Any:
    """What loads the tokenizer of a folder.

    AutoTokenizer, or at once the class that it would find where the files name it, as our checkpoints' do: to look for
    it among all models' imports torch's compiler, which takes two seconds and more.
    """
    file = folder / "tokenizer_config.json"
    named = json.loads(file.read_text(encoding="utf-8")).get("tokenizer_class") if file.is_file() else None
    if named in ("TokenizersBackend", "PreTrainedTokenizerFast") and (folder / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _download(name: str, revision: str | None, only: list[str] | None = None) -> Path:
    """The snapshot of a hub model: config, tokenizer and weights of one commit, whose hash is the folder's name.

    only  files to fetch instead of all of these
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = Path(
            snapshot_download(name, revision=revision, allow_patterns=only or _HUB_FILES, ignore_patterns=_HUB_IGNORED)
        )
        if only is None and not any(path.glob("*.safetensors")):
            path = Path(snapshot_download(name, revision=path.name, allow_patterns=["pytorch_model*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"model {name!r} is no local directory and could not be downloaded: {reason}; "
            "check the name, the network and your access (hf auth login), or give a local path."
        ) from error
    return path
