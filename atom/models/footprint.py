"""How large a model is under a scheme: on disk, in memory, and per cached token; counted from shapes alone."""

from dataclasses import dataclass
from math import prod

import torch

from ..quant.schemes import Scheme
from .config import ModelConfig
from .layers import DecoderLayer
from .layout import layer_prefix, layer_tensors, model_tensors
from .model import Model

REFERENCE_DTYPE = torch.float32  # the reference path multiplies with weights dequantized to this


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model.

    disk          tensors of the checkpoint
    packed        in memory, weights as the checkpoint has them: what a kernel path holds
    dense         in memory on the reference path: weights dequantized to float32, the rest in the model's dtype
    kv_token      one cached token in all layers in the scheme's format, scales included, and its share of what is kept
                  exactly in a sequence of schemes.CONTEXT tokens
    kv_token_16   the same in 16 bits
    """

    parameters: int
    disk: int
    packed: int
    dense: int
    kv_token: float
    kv_token_16: int


def measure_footprint(
    model: Model, scheme: Scheme, source_dtype: torch.dtype, dtype: torch.dtype = torch.float32
) -> Footprint:
    """The footprint of `model` (on the meta device, in full precision) under `scheme`.

    source_dtype  of the source's tensors, in which a checkpoint keeps what is not quantized
    dtype         in which the model is to run
    """
    parameters = sum(p.numel() for p in model.state_dict().values())
    disk = packed = 0
    for expected in model_tensors(model, scheme).values():
        disk += prod(expected.shape) * (expected.dtype or source_dtype).itemsize
        packed += prod(expected.shape) * (expected.dtype or dtype).itemsize
    config = model.config
    elements = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    kv_bits = scheme.kv_bits(config.head_dim, config.num_layers)
    return Footprint(parameters, disk, packed, _dense_bytes(model, scheme, dtype), elements * kv_bits / 8, elements * 2)


def mean_bits(model: Model, scheme: Scheme) -> tuple[float, float]:
    """Effective bits of a weight and of an activation, the mean over all multiplications of a token.

    Of one format everywhere and inputs of one width it is Scheme.weight_bits and activation_bits of that width.
    """
    weights = activations = 0.0
    total = 0
    for index, layer in enumerate(model.model.decoder_layers()):
        for name in model.family.linears:
            N, K = layer.get_parameter(f"{name}.weight").shape
            linear = scheme.for_linear(f"{layer_prefix(index)}.{name}")
            weights += N * K * linear.weight_bits(K)
            activations += N * K * linear.activation_bits(K)
            total += N * K
    return weights / total, activations / total


def _dense_bytes(model: Model, scheme: Scheme, dtype: torch.dtype) -> int:
    outside: int = sum(p.numel() for n, p in model.state_dict().items() if not n.startswith("model.layers."))
    total = outside * dtype.itemsize
    for index, layer in enumerate(model.model.decoder_layers()):
        prefix = layer_prefix(index)
        quantized = {n.removesuffix(".weight_packed") for n in layer_tensors(layer, model.family, scheme, prefix)}
        for name, tensor in layer.state_dict().items():
            linear = f"{prefix}.{name}".rpartition(".")[0]
            is_dense = linear in quantized
            total += tensor.numel() * (REFERENCE_DTYPE if is_dense else dtype).itemsize
        total += _perm_bytes(model, scheme, index, layer)
    return total


def _perm_bytes(model: Model, scheme: Scheme, index: int, layer: DecoderLayer) -> int:
    """Permutations that producers keep as int64, one for each gathered input."""
    total = 0
    for group in model.family.groups:
        linear = scheme.for_linear(f"{layer_prefix(index)}.{group.linears[0]}")
        if group.is_gathered and linear.weight is not None and linear.reorder:
            total += 8 * layer.get_parameter(f"{group.linears[0]}.weight").shape[1]
    return total


def source_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype that config.json says the weights have; bfloat16 where it is silent."""
    raw = config.raw.get("dtype") or config.raw.get("torch_dtype") or "bfloat16"
    dtype = getattr(torch, str(raw).removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
