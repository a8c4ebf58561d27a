"""Whether a rounded checkpoint is trained, for how many steps, and what that takes: decided before any work is done."""

from dataclasses import replace

import torch

from atom.models.model import Model
from atom.quant.formats import get_format
from atom.quant.schemes import Scheme

from .config import CalibrationConfig

DEFAULT_STEPS = 100
CACHE_STEPS = 400  # where only the cache is low-bit: weights learn, at so low a rate that it takes more
LARGEST_BITS = 4  # of what training is for unless told not to: 8 bits lose too little to be worth the time
ACTIVATIONS_HIDDEN, ACTIVATIONS_INNER = 60, 24  # float32 values a token while a layer's gradients are taken
WEIGHTS_AT_ONCE = 6  # copies of a layer's weights while its gradients are taken
MARGIN = 1.2  # more than the estimate that must be free: beyond 1.1 B parameters nothing has been compared with it
LOGITS_BYTES = 4 * 512 * 2**20  # a chunk of both models' logits, their logarithms and gradients


def plan_distillation(
    model: Model, scheme: Scheme, config: CalibrationConfig, free_bytes: int | None
) -> tuple[CalibrationConfig, str | None]:
    """`config` with its steps of distillation decided, and why they are left out where the default would have them.

    model       on the meta device
    free_bytes  of the GPU that calibrates; None on a CPU
    """
    if config.distill_steps is not None:
        return config, None
    if not _is_low_bit(scheme):
        return replace(config, distill_steps=0), None
    why = _obstacle(model, scheme, config, free_bytes)
    return replace(config, distill_steps=0 if why else default_steps(scheme)), why


def default_steps(scheme: Scheme) -> int:
    """Steps of training where nobody says how many."""
    return CACHE_STEPS if scheme.weight is None else DEFAULT_STEPS


def free_gpu_bytes(device: torch.device) -> int | None:
    """What is free on the GPU; None for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def _is_low_bit(scheme: Scheme) -> bool:
    """Weights are, or all that is rounded is the cache and it is."""
    spec = scheme.weight if scheme.weight is not None or scheme.overrides else scheme.kv
    return spec is not None and get_format(spec.format).bits <= LARGEST_BITS


def distill_bytes(model: Model, scheme: Scheme, config: CalibrationConfig) -> int:
    """Memory of training: both models in float32, Adam's moments, gradients and the first values of codes that learn,
    or of attention's weights where only the cache is low-bit, one layer's activations and the inputs of all, a chunk of
    logits."""
    outside, layers = _parameters(model)
    tokens = max(config.distill_tokens, config.window_length)
    hidden, inner = model.config.hidden_size, model.config.intermediate_size
    learned = 4 * (layers if config.distill_codes else 0 if scheme.weight is not None else _attention(model))
    kept = tokens * (model.config.num_layers * hidden + ACTIVATIONS_HIDDEN * hidden + ACTIVATIONS_INNER * inner)
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in model.model.decoder_layers())
    return 4 * (2 * (outside + layers) + learned + WEIGHTS_AT_ONCE * largest + kept) + LOGITS_BYTES


def _obstacle(model: Model, scheme: Scheme, config: CalibrationConfig, free_bytes: int | None) -> str | None:
    """Why training is left out by default."""
    if free_bytes is None:
        return "on a CPU it takes hours"
    needed = distill_bytes(model, scheme, config)
    if needed * MARGIN > free_bytes:
        return f"it needs {needed / 2**30:.0f} GiB, the GPU has {free_bytes / 2**30:.0f} GiB free"
    return None


def _attention(model: Model) -> int:
    """Numbers of parameters of all layers' attention."""
    return sum(p.numel() for layer in model.model.decoder_layers() for p in layer.self_attn.parameters())


def _parameters(model: Model) -> tuple[int, int]:
    """Numbers of parameters outside of layers and in layers."""
    layers = sum(p.numel() for layer in model.model.decoder_layers() for p in layer.parameters())
    return sum(p.numel() for p in model.parameters()) - layers, layers
