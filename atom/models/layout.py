"""Which tensors a model's checkpoint holds under a scheme: names, shapes and dtypes, without reading one.

The loader compares this list with what a checkpoint has, and `atom check` counts its bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from ..errors import CheckpointError, UnsupportedError
from ..quant.schemes import LinearScheme, Scheme
from ..quant.stored import stored_tensors
from .family import Family
from .model import Model
from .shards import some
from .source import Source

PERM = "input_perm"
KEY_OFFSET = "self_attn.key_offset"
KEY_CENTRE = "self_attn.key_centre"


@dataclass(frozen=True)
class Expected:
    """A tensor that must be there. dtype None: as the source has it, any floating type."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


def layer_prefix(index: int) -> str:
    """The name of decoder layer `index` in a checkpoint."""
    return f"model.layers.{index}"


def linear_tensors(linear: nn.Linear, scheme: LinearScheme, is_gathered: bool) -> dict[str, Expected]:
    """What one linear stores under its scheme, by name without prefix; its plain weight where it is not quantized."""
    bias = {} if linear.bias is None else {"bias": Expected((linear.out_features,))}
    if scheme.weight is None:
        return {"weight": Expected((linear.out_features, linear.in_features)), **bias}
    stored = stored_tensors(linear.out_features, linear.in_features, scheme, is_gathered and scheme.reorder)
    return {**{name: Expected(tensor.shape, tensor.dtype) for name, tensor in stored.items()}, **bias}


def layer_tensors(layer: nn.Module, family: Family, scheme: Scheme | None, prefix: str) -> dict[str, Expected]:
    """All tensors of one decoder layer, by full name. `layer` is in full precision and may be on the meta device."""
    expected = {f"{prefix}.{name}": Expected(tuple(tensor.shape)) for name, tensor in layer.state_dict().items()}
    if scheme is None:
        return expected
    for group in family.groups:
        for name in group.linears:
            full = f"{prefix}.{name}"
            linear = layer.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            expected.pop(f"{full}.weight")
            tensors = linear_tensors(linear, scheme.for_linear(full), group.is_gathered)
            expected.update({f"{full}.{key}": value for key, value in tensors.items()})
    expected.update({f"{prefix}.{name}": value for name, value in key_tensors(layer, scheme).items()})
    return expected


def key_tensors(layer: nn.Module, scheme: Scheme) -> dict[str, Expected]:
    """What calibration stores of a layer's keys, [num_kv_heads, head_dim], by name within the layer.

    The mean before RoPE in bfloat16, or the centre after RoPE in float32, [2, ...] where a mirror stands behind it.
    """
    if not scheme.stores_key_offset and not scheme.stores_key_centre:
        return {}
    head_dim = cast(int, layer.get_submodule("self_attn").head_dim)
    shape = (layer.get_parameter("self_attn.k_proj.weight").shape[0] // head_dim, head_dim)
    if scheme.stores_key_centre:
        return {KEY_CENTRE: Expected((2, *shape) if scheme.mirrors_keys else shape, torch.float32)}
    return {KEY_OFFSET: Expected(shape, torch.bfloat16)}


def model_tensors(model: Model, scheme: Scheme | None) -> dict[str, Expected]:
    """All tensors of a model's checkpoint, by name. `model` is in full precision and may be on the meta device."""
    expected = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("model.layers."):
            expected[name] = Expected(tuple(tensor.shape))
    for index, layer in enumerate(model.model.layers):
        expected.update(layer_tensors(layer, model.family, scheme, layer_prefix(index)))
    return expected


def group_scheme(family: Family, scheme: Scheme, prefix: str, group_name: str) -> LinearScheme:
    """What the linears of one input group run, as far as their shared input goes.

    Raises UnsupportedError if overrides make them disagree about that input: one producer rounds it for all.
    """
    group = next(group for group in family.groups if group.name == group_name)
    first, *others = (scheme.for_linear(f"{prefix}.{name}") for name in group.linears)
    for name, other in zip(group.linears[1:], others, strict=True):
        if _input_of(first) != _input_of(other):
            raise UnsupportedError(
                f"overrides of scheme {scheme.name} treat {prefix}.{group.linears[0]} and {prefix}.{name} unlike, but "
                "they take one input; its activation, outliers, rotation and order must agree; override both."
            )
    return first


def _input_of(scheme: LinearScheme) -> tuple[object, ...]:
    return (scheme.weight is None, scheme.activation, scheme.outliers, scheme.rotation, scheme.reorder)


def is_ignored(name: str, model: Model) -> bool:
    """A tensor that old checkpoints carry and no model needs: RoPE tables, and a head that is the embedding."""
    return name.endswith("rotary_emb.inv_freq") or (model.lm_head is None and name == "lm_head.weight")


def check_source(expected: Mapping[str, Expected], source: Source, model: Model) -> None:
    """Raise CheckpointError unless the source holds exactly these tensors in these shapes and dtypes."""
    names = {name for name in source.names() if not is_ignored(name, model)}
    where = source.path.name
    if missing := [name for name in expected if name not in names]:
        raise CheckpointError(
            f"{where} lacks {len(missing)} of {len(expected)} tensors: {some(missing)}; a whole "
            f"{model.config.architecture} checkpoint is needed; check config.json, or download it again."
        )
    if unexpected := sorted(names - expected.keys()):
        raise CheckpointError(
            f"{where} has {len(unexpected)} tensors that {model.config.architecture} does not: {some(unexpected)}; "
            "config.json and weights must be of one model; check both."
        )
    for name, want in expected.items():
        check_tensor(name, source.shape(name), source.dtype(name), want, where)


def check_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, want: Expected, where: str) -> None:
    """Raise CheckpointError unless a tensor has the shape and dtype that are wanted."""
    if shape != want.shape:
        raise CheckpointError(
            f"{where}: {name} has shape {list(shape)}, the config asks for {list(want.shape)}; "
            "config.json and weights must be of one model; check both."
        )
    if (want.dtype is None and not dtype.is_floating_point) or (want.dtype is not None and dtype != want.dtype):
        needed = "a floating type" if want.dtype is None else str(want.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{where}: {name} is {str(dtype).removeprefix('torch.')}, needed is {needed}; "
            "the checkpoint does not fit its scheme; quantize again."
        )
