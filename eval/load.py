"""A model and its tokenizer, loaded once for everything that is measured on it."""

from dataclasses import dataclass
from typing import Any

import torch

from atom.kernels.registry import Kernels
from atom.models.device import choose_device
from atom.models.loader import load_model, load_tokenizer
from atom.models.model import Model

from .forward import execution_path

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """What is measured: `path` says whether the quantized ops are the served kernels or the torch reference."""

    model: Model
    tokenizer: Any
    name: str
    path: str

    @property
    def device(self) -> str:
        return str(self.model.device)

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a name; "auto" is float32 on a CPU and bfloat16 on a GPU. ValueError for others."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load(
    name: str, device: str = "auto", dtype: str = "auto", kernels: Kernels = "auto", tokenizer: str | None = None
) -> Loaded:
    """Load a model (Atom checkpoint, directory, hub id) and its tokenizer, or the tokenizer that lies at `tokenizer`.

    The tokenizer comes first: it is small, and missing more often than the weights.
    """
    where = choose_device(device)
    loaded_tokenizer = load_tokenizer(name if tokenizer is None else tokenizer)
    model = load_model(name, device=where, dtype=choose_dtype(dtype, where), kernels=kernels)
    return Loaded(model, loaded_tokenizer, name, execution_path(model, kernels))
