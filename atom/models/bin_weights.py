"""Weights in PyTorch `.bin` files, read by torch's weights-only loader so that no code in them can run."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .shards import check_promises, read_index


class BinWeights:
    """pytorch_model.bin, or the shards that pytorch_model.bin.index.json names. Files are mapped, not read whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        index = path / "pytorch_model.bin.index.json"
        if index.is_file():
            self._file_of = read_index(index)
            self._files = {name: _read(path / name) for name in sorted(set(self._file_of.values()))}
            check_promises(index, self._file_of, self._files)
        else:
            self._files = {file.name: _read(file) for file in sorted(path.glob("pytorch_model*.bin"))}
            self._file_of = {tensor: name for name, tensors in self._files.items() for tensor in tensors}

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.get(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.get(name).dtype

    def get(self, name: str) -> Tensor:
        """The tensor `name`, still mapped from its file; CheckpointError if there is none."""
        if name not in self._file_of:
            raise CheckpointError(f"{self.path} has no tensor {name}; it must be in the checkpoint; use a whole one.")
        return self._files[self._file_of[name]][name]


def _read(path: Path) -> dict[str, Tensor]:
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read safely: {str(error).splitlines()[0]}; it must be a zip file of plain tensors; "
            "convert the model to safetensors."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{path} holds more than named tensors; a plain state dict is needed; use safetensors.")
    return found
