"""Rotary position embedding: the configuration spellings, the frequencies, and the rotation itself.

A `Rope` belongs to a layer and knows its frequencies; called with positions it gives a `Rotation`, which turns
query and key heads. Models hand the rotation to the cache, because the cache decides whether keys are stored
before or after it. Channels are paired as Hugging Face checkpoints are laid out: i with i + head_dim / 2.

Sources: RoFormer (arXiv:2104.09864); YaRN (arXiv:2309.00071); Llama 3.1's frequency bands as published in its
reference code; dynamic NTK as in transformers, where the base follows the length of the text.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, UnsupportedError
from ..kernels.rotate import rotate

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """One layer's rotary embedding; fields beyond `theta` and `factor` belong to single types."""

    kind: str = "default"  # one of ROPE_TYPES
    theta: float = 10000.0
    factor: float = 1.0
    original_max_positions: int = 2048  # the length the model was pretrained on
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: whole channels bound the ramp
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3


def read_rope(
    raw: Mapping[str, Any], layer_type: str = "full_attention", default_theta: float | None = None
) -> RopeConfig:
    """The rotary embedding of the layers of `layer_type`, from either spelling in config.json.

    transformers 5 writes `rope_parameters`, flat or one dict for each layer type; before that came
    `rope_theta` beside `rope_scaling`. Raises UnsupportedError for another type of scaling and CheckpointError
    for a missing parameter.
    """
    found = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    if layer_type in found or "full_attention" in found:
        found = dict(found.get(layer_type) or {})
    return parse_rope(found, raw, default_theta)


def parse_rope(found: Mapping[str, Any], raw: Mapping[str, Any], default_theta: float | None = None) -> RopeConfig:
    """Like read_rope, for the one dict `found` of RoPE parameters inside the config `raw`."""
    kind = found.get("rope_type") or found.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise UnsupportedError(
            f"RoPE type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}; use a model with one of these."
        )
    partial = found.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise UnsupportedError(
            f"partial_rotary_factor {partial} is not supported; RoPE must turn the whole head (1.0); use another model."
        )
    theta = float(found.get("rope_theta") or raw.get("rope_theta") or default_theta or 10000.0)
    max_positions = int(raw.get("max_position_embeddings") or 2048)
    if kind == "default":
        return RopeConfig(theta=theta, original_max_positions=max_positions)
    if kind in ("linear", "dynamic"):
        return RopeConfig(kind, theta, _number(found, "factor", kind), max_positions)
    original = raw.get("original_max_position_embeddings") or found.get("original_max_position_embeddings")
    original = int(original or max_positions)
    if kind == "llama3":
        low, high = _number(found, "low_freq_factor", kind), _number(found, "high_freq_factor", kind)
        factor = _number(found, "factor", kind)
        return RopeConfig(kind, theta, factor, original, low_freq_factor=low, high_freq_factor=high)
    factor = float(found.get("factor") or max_positions / original)
    return RopeConfig(
        kind,
        theta,
        factor,
        original,
        attention_factor=_yarn_attention_factor(found, factor),
        beta_fast=float(found.get("beta_fast") or 32),
        beta_slow=float(found.get("beta_slow") or 1),
        truncate=bool(found.get("truncate", True)),
    )


def _number(found: Mapping[str, Any], key: str, kind: str) -> float:
    value = found.get(key)
    if not isinstance(value, int | float) or value <= 0:
        raise CheckpointError(
            f"config.json has {key} = {value!r} for RoPE type {kind!r}; it must be a positive number; "
            "the file is incomplete or damaged."
        )
    return float(value)


def _yarn_attention_factor(found: Mapping[str, Any], factor: float) -> float:
    given = found.get("attention_factor")
    if given is not None:
        return float(given)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if found.get("mscale") and found.get("mscale_all_dim"):
        return mscale(found["mscale"]) / mscale(found["mscale_all_dim"])
    return mscale(1.0)


class Rope:
    """The frequencies of one layer's rotary embedding.

    `rope(positions)` gives the Rotation at these positions. Frequencies are float32, computed once on the CPU
    and copied to a device on first use there.
    """

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        if head_dim % 2:
            raise UnsupportedError(f"head_dim {head_dim} is odd; RoPE turns pairs of channels; use another model.")
        self.config = config
        self.head_dim = head_dim
        self._inv_freq = {torch.device("cpu"): _inverse_frequencies(config, head_dim)}  # [head_dim / 2]

    @property
    def frequencies(self) -> Tensor:
        """Radians per position of each channel pair, as they are without stretching: [head_dim / 2], float32."""
        return self._inv_freq[torch.device("cpu")]

    def __call__(self, positions: Tensor, lengths: Tensor | None = None) -> "Rotation":
        """Rotation at `positions` [T] (int64).

        `lengths` [T] or [1] is the length of the text each token stands in, of which dynamic NTK makes its base;
        by default max(positions) + 1, right where all sequences are equally long.
        """
        device = positions.device
        if device not in self._inv_freq:
            self._inv_freq[device] = self._inv_freq[torch.device("cpu")].to(device)
        inv_freq = self._inv_freq[device]
        if self.config.kind == "dynamic" and positions.numel():
            inv_freq = self._dynamic(positions.max() + 1 if lengths is None else lengths)
        angles = positions.float()[:, None] * inv_freq  # [T, head_dim / 2]
        cos, sin, factor = angles.cos(), angles.sin(), self.config.attention_factor
        if factor != 1:
            cos, sin = cos * factor, sin * factor
        return Rotation(cos, sin, positions, self)

    def _dynamic(self, lengths: Tensor) -> Tensor:
        """NTK-scaled frequencies [1 or T, head_dim / 2]; the plain ones up to the pretrained length."""
        config, dim = self.config, self.head_dim
        lengths = lengths.reshape(-1, 1).clamp(min=config.original_max_positions)
        stretch = config.factor * lengths / config.original_max_positions - (config.factor - 1)
        base = config.theta * stretch ** (dim / (dim - 2))
        return 1.0 / (base ** _exponents(dim).to(lengths.device))


@dataclass(frozen=True)
class Rotation:
    """cos and sin [T, head_dim / 2] (float32) at `positions` [T], and the rope they came from."""

    cos: Tensor
    sin: Tensor
    positions: Tensor
    rope: Rope

    def apply(self, x: Tensor) -> Tensor:
        """x [..., T, H, head_dim] turned by its tokens' angles; the dtype stays x's."""
        return rotate(x, self.cos, self.sin)


def _exponents(dim: int) -> Tensor:
    return torch.arange(0, dim, 2, device="cpu").float() / dim


def _inverse_frequencies(config: RopeConfig, dim: int) -> Tensor:
    """Radians per position of each channel pair: [dim / 2], float32."""
    inv_freq = 1.0 / (config.theta ** _exponents(dim))
    if config.kind == "linear":
        return inv_freq / config.factor
    if config.kind == "llama3":
        return _llama3(config, inv_freq)
    if config.kind == "yarn":
        return _yarn(config, inv_freq, dim)
    return inv_freq


def _llama3(config: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    low, high, length = config.low_freq_factor, config.high_freq_factor, config.original_max_positions
    wavelength = 2 * math.pi / inv_freq
    smooth = (length / wavelength - low) / (high - low)
    between = (1 - smooth) * inv_freq / config.factor + smooth * inv_freq
    stretched = torch.where(wavelength > length / low, inv_freq / config.factor, between)
    return torch.where(wavelength < length / high, inv_freq, stretched)


def _yarn(config: RopeConfig, inv_freq: Tensor, dim: int) -> Tensor:
    """Channels that turn often within the pretrained length keep their frequency; slow ones are stretched."""

    def channel(turns: float) -> float:
        wavelengths = config.original_max_positions / (turns * 2 * math.pi)
        return dim * math.log(wavelengths) / (2 * math.log(config.theta))

    low, high = channel(config.beta_fast), channel(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, device="cpu").float() - low) / width).clamp(0, 1)
    return inv_freq / config.factor * ramp + inv_freq * (1 - ramp)
