"""Loading: from a source to a model that runs, quantized or not, tensor by tensor.

The model is made on the meta device, the checkpoint's names, shapes and dtypes are compared with it before any weight
is read, then each tensor goes straight to its place. Beyond the model itself, memory holds one decoder layer's
checkpoint tensors at a time.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint import read_scheme
from ..kernels.registry import Kernels, device_arch
from ..kernels.warm import step_kernels, warm_up
from .config import ModelConfig
from .device import choose_device
from .family import model_config
from .free_memory import check_memory
from .fused import fuse_model_
from .head import HeadFormat, round_head_
from .layers import DecoderLayer
from .layout import check_source, layer_prefix, layer_tensors, model_tensors
from .model import Model, build_model
from .quantized import quantize_layer_
from .source import Source, load_tokenizer, open_source

__all__ = ["load_model", "load_source", "load_tokenizer", "meta_model", "open_source"]


def load_model(
    model: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    kernels: Kernels = "auto",
    revision: str | None = None,
    head: HeadFormat = "full",
) -> Model:
    """The model called `model` (directory, GGUF file, hub id, alias; Atom checkpoint or full precision), ready to run.

    dtype    of everything that is not quantized, and of the residual stream
    kernels  "auto": the registry's choice for this device; "reference": torch references on any device
    head     "full": in `dtype`; "int8": rounded now (head.py)
    Raises CheckpointError if the model is not found, incomplete, damaged or of a newer version, and UnsupportedError
    if Atom cannot run it here, for want of memory say.
    """
    device = choose_device(device)  # refused before a model is downloaded
    return load_source(open_source(model, revision), device, dtype, kernels, head)


def load_source(
    source: Source,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    kernels: Kernels = "auto",
    head: HeadFormat = "full",
) -> Model:
    """Like load_model, from an opened source."""
    scheme = read_scheme(source.config, f"{source.path.name}/config.json")
    model = meta_model(model_config(source.config, source.generation_config))
    model.scheme = scheme
    check_source(model_tensors(model, scheme), source, model)
    check_memory(model, source.path.name, torch.device(device), dtype, kernels)
    outside = (name for name in model.state_dict() if not name.startswith("model.layers."))
    _load_tensors(model, source, {name: name for name in outside}, device, dtype)
    for index, layer in enumerate(model.model.decoder_layers()):
        load_layer_(layer, model, source, index, device, dtype, kernels)
    if head == "int8":
        round_head_(model, kernels)
    if torch.device(device).type == "cuda":
        fuse_model_(model, kernels)
        steps = step_kernels() if kernels == "auto" and device_arch(device) == "sm_90" else ()
        warm_up(model, dtype, others=steps)
    return model.eval().requires_grad_(False)


def load_layer_(
    layer: DecoderLayer,
    model: Model,
    source: Source,
    index: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    kernels: Kernels = "auto",
) -> None:
    """Fill decoder layer `index` from the source, and quantize it if the model has a scheme."""
    prefix = layer_prefix(index)
    names = set(layer_tensors(layer, model.family, model.scheme, prefix))
    plain = {name: f"{prefix}.{name}" for name in layer.state_dict() if f"{prefix}.{name}" in names}
    _load_tensors(layer, source, plain, device, dtype)
    if model.scheme is not None:
        stored = _LayerTensors(source, names)
        quantize_layer_(layer, model.family, model.scheme, stored, prefix, kernels)


def meta_model(config: ModelConfig) -> Model:
    """The model without weights, on the meta device."""
    with torch.device("meta"):
        return build_model(config)


def _load_tensors(
    module: torch.nn.Module, source: Source, names: dict[str, str], device: torch.device | str, dtype: torch.dtype
) -> None:
    """Put source tensors into a module: `names` maps the module's parameter names to the source's."""
    for own, name in names.items():
        path, _, last = own.rpartition(".")
        value = nn.Parameter(source.get(name).to(device, dtype), module.get_parameter(own).requires_grad)
        setattr(module.get_submodule(path), last, value)


class _LayerTensors(Mapping[str, Tensor]):
    """One layer's checkpoint tensors by name, each read when it is asked for."""

    def __init__(self, source: Source, names: Iterable[str]) -> None:
        self._source = source
        self._names = frozenset(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._source.get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
