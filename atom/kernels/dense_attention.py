"""Attention over keys and values that lie densely in memory: the rules of a layer, and torch's computation of them.

Both caches end here: DenseKV with what it stores, the torch reference of paged attention with what it gathered.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .head_norm import HeadNorms


@dataclass(frozen=True)
class AttentionSpec:
    """The rules of one layer's attention.

    softmax(soft_cap(q k^T * scale)) v over positions i - window + 1 ... i, where soft_cap(s) is cap * tanh(s / cap).

    key_offset  [num_kv_heads, head_dim], what every key (before RoPE) has in common: its projection's bias, or the
                mean that calibration found; None where nothing is known
    key_centre  float32 [num_kv_heads, head_dim], a constant after RoPE that calibration found; keys less of it give the
                same softmax (without a soft cap), so it is never added back; [2, ...] with a mirror behind it
                (atom/quant/keys.py); None where nothing is known
    norms       of query and key heads, before RoPE, for caches that take them; None where that is done, or no norm is
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    key_offset: Tensor | None = None
    key_centre: Tensor | None = None
    norms: HeadNorms | None = None


def attend_dense(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """Causal attention of the last `seq` of `length` tokens over all of them.

    q [batch, num_heads, seq, head_dim]; k, v [batch, num_kv_heads, length, head_dim] -> like q.
    """
    seq, length = q.shape[2], k.shape[2]
    if spec.window is not None:  # keys that no query sees any more
        first = max(0, length - seq - spec.window + 1)
        k, v, length = k[:, :, first:], v[:, :, first:], length - first
    has_window = spec.window is not None and spec.window < length
    is_causal = seq == length and seq > 1 and not has_window
    mask = None if is_causal or seq == 1 else _visible(seq, length, spec.window, q.device)
    if spec.soft_cap is not None:
        return attend_capped(q, k, v, spec.scale, spec.soft_cap, _visible(seq, length, spec.window, q.device))
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=spec.scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def attend_capped(q: Tensor, k: Tensor, v: Tensor, scale: float, cap: float, visible: Tensor) -> Tensor:
    """Attention with capped scores, which no fused torch function offers; `visible` broadcasts to the scores."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = (q @ k.mT).float() * scale
    scores = cap * torch.tanh(scores / cap)
    return scores.masked_fill(~visible, float("-inf")).softmax(-1).to(q.dtype) @ v


def _visible(seq: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """[seq, length] bool: which keys each of the last `seq` tokens sees."""
    distance = torch.arange(length - seq, length, device=device)[:, None] - torch.arange(length, device=device)
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)
