"""A model without a checkpoint: random weights in a known shape, for measuring speed.

The weights are a `Source` like any other, so that a dummy model goes through the same loader, kernels and engine as a
real one. Values are of a trained model's order of magnitude and mean nothing; the same bytes come again and again.
They are normally distributed, and codes with them, as a trained model's are: a GPU at its power limit runs slower on
codes that are uniform. On a GPU they are cut from a pool that lies there: 16 GB then take a second instead of crossing
the bus.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import quantization_config, read_json
from ..errors import CheckpointError
from ..quant.formats import FP8_E4M3, INT8, Format, get_format
from ..quant.packing import pack
from ..quant.rounding import encode_float
from ..quant.schemes import Scheme
from .family import model_config
from .layout import PERM, Expected, model_tensors
from .loader import meta_model
from .source import Source

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA_3 = {
    **_LLAMA,
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,  # of 3.1, so that long requests can be measured
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_LLAMA_2 = {**_LLAMA, "vocab_size": 32000, "max_position_embeddings": 4096, "rope_theta": 10000.0}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {**_LLAMA, **_sizes(192, 280, 2, 6), "vocab_size": 258, "num_key_value_heads": 2},
    "llama-2-7b": {**_LLAMA_2, **_sizes(4096, 11008, 32, 32)},
    "llama-2-13b": {**_LLAMA_2, **_sizes(5120, 13824, 40, 40)},
    "llama-3-8b": {**_LLAMA_3, **_sizes(4096, 14336, 32, 32)},
    "llama-3-70b": {**_LLAMA_3, **_sizes(8192, 28672, 80, 64)},
}
POOL = 1 << 22  # random elements that all weights are cut from
STD = 0.02  # of weights that are not quantized
SIGMAS_4BIT, SIGMAS_8BIT = 2.7, 3.7  # where the largest code stands: the largest of a group's 128, or of a row's 4096


def dummy_source(
    model: str | Path, scheme: Scheme | None = None, seed: int = 0, device: torch.device | str = "cpu"
) -> Source:
    """A source of random weights.

    model   a name of SHAPES, or a directory with a config.json (whose weights, if any, are not read)
    scheme  how the weights are quantized; None: they are not
    device  where the weights are made; they are the same everywhere
    Raises CheckpointError for a name that is neither.
    """
    name = str(model)
    if name in SHAPES:
        raw = dict(SHAPES[name])
    elif Path(name).is_dir():
        raw = read_json(Path(name) / "config.json")
        raw.pop("quantization_config", None)
    else:
        raise CheckpointError(
            f"{name!r} has no shape; dummy weights take {', '.join(SHAPES)}, or a directory with a config.json."
        )
    if scheme is not None and scheme.is_quantized:
        raw["quantization_config"] = quantization_config(scheme)
    else:
        scheme = None
    expected = model_tensors(meta_model(model_config(raw)), scheme)
    return Source(Path(name), raw, {}, {"source": name, "kind": "dummy"}, DummyWeights(expected, scheme, seed, device))


class DummyWeights:
    """Random tensors in the names, shapes and dtypes of `expected`; bfloat16 where those leave the dtype open."""

    def __init__(
        self,
        expected: Mapping[str, Expected],
        scheme: Scheme | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self._expected = expected
        self._device = torch.device(device)
        weight = None if scheme is None else scheme.weight
        self._format = None if weight is None else get_format(weight.format)
        self._has_factors = weight is not None and weight.scale_format == "uint4"
        generator = torch.Generator().manual_seed(seed)
        self._draws = torch.randn(POOL, generator=generator)
        self._pools: dict[torch.dtype, Tensor] = {
            torch.bfloat16: (self._draws.to(torch.bfloat16) * STD).to(self._device)
        }

    def names(self) -> list[str]:
        return list(self._expected)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._expected[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._expected[name].dtype or torch.bfloat16

    def get(self, name: str) -> Tensor:
        shape, dtype, part = self.shape(name), self.dtype(name), name.rpartition(".")[2]
        if part == PERM:  # linears that share an input share its order: of one length, all do
            perm = torch.randperm(shape[0], generator=torch.Generator().manual_seed(shape[0]))
            return perm.to(self._device, dtype)
        if part == "weight_zero_point":
            return self._full(shape, 8, dtype)
        if part.endswith("scale"):
            return self._scale(part, shape, dtype)
        if part in ("weight_packed", "outlier_weight") and dtype != torch.bfloat16:
            return self._cut(self._codes(dtype), shape)
        if "norm" in name:
            return self._full(shape, 1, dtype)
        if part == "bias":
            return self._full(shape, 0, dtype)
        return self._cut(self._pools[torch.bfloat16], shape).to(dtype)

    def _full(self, shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=self._device)

    def _scale(self, part: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Weights of about 0.02 for codes of a few units; of two levels, the outer one is the small one."""
        outer = "weight_tensor_scale" in part or "weight_channel_scale" in part
        if dtype == torch.uint8:  # a factor, or an exponent biased by 127
            return self._full(shape, 8 if self._has_factors else 127 - 7, dtype)
        if self._has_factors and outer:
            return self._full(shape, 0.0006, dtype)
        if dtype.itemsize == 1:
            return self._full(shape, 1, dtype)
        return self._full(shape, 0.005 if outer or dtype == torch.bfloat16 else 0.0003, dtype)

    def _codes(self, dtype: torch.dtype) -> Tensor:
        """The pool of codes that are stored as `dtype`."""
        if dtype not in self._pools:
            self._pools[dtype] = self._draw_codes(dtype).to(self._device)
        return self._pools[dtype]

    def _draw_codes(self, dtype: torch.dtype) -> Tensor:
        if dtype == torch.uint8 and self._format is not None:
            values = self._values(self._format, SIGMAS_4BIT)
            codes = values.round().to(torch.int8) if self._format.is_integer else encode_float(values, self._format)
            return pack(codes, self._format)
        values = self._values(FP8_E4M3 if dtype == torch.float8_e4m3fn else INT8, SIGMAS_8BIT)
        return values.to(dtype) if dtype.is_floating_point else values.round().to(dtype)

    def _values(self, fmt: Format, sigmas: float) -> Tensor:
        return (self._draws * (fmt.max / sigmas)).clamp(-fmt.max, fmt.max)

    @staticmethod
    def _cut(pool: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A tensor of this shape, out of the pool's elements over and over."""
        size = 1
        for length in shape:
            size *= length
        return pool.repeat(-(-size // len(pool)))[:size].view(shape)
