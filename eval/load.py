"""A model and its tokenizer, loaded once for everything that is measured on it."""

from dataclasses import dataclass
from typing import Any

from atom.kernels.registry import Kernels
from atom.models.device import choose_device, choose_dtype
from atom.models.head import HeadFormat
from atom.models.loader import load_model, load_tokenizer
from atom.models.model import Model

from .forward import execution_path


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


def load(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    kernels: Kernels = "auto",
    tokenizer: str | None = None,
    head: HeadFormat = "full",
) -> Loaded:
    """Load a model (Atom checkpoint, directory, hub id) and its tokenizer, or the tokenizer that lies at `tokenizer`.

    The tokenizer comes first: it is small, and missing more often than the weights.
    """
    where = choose_device(device)
    loaded_tokenizer = load_tokenizer(name if tokenizer is None else tokenizer)
    model = load_model(name, device=where, dtype=choose_dtype(dtype, where), kernels=kernels, head=head)
    return Loaded(model, loaded_tokenizer, name, execution_path(model, kernels))
