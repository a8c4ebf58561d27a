"""Op rope_append_kv: turn queries and keys, round keys and values, write them into the blocks of a paged cache.

One call takes all tokens of a step, of prefill chunks and of decodes alike: where a token's key and value go is said by
its slot. Keys are stored turned unless `pre_rope`; where the scheme keeps a key offset apart, the offset is taken off
before anything else and comes back when keys are read (paged_attention.py). A centre is taken off after RoPE and never
comes back, and heads of keys and queries may be turned by a Hadamard matrix and reflected last (atom/quant/keys.py).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..quant.keys import prepare_keys, prepare_queries
from .attention_refusals_sm90 import refuses_attention
from .head_norm import HeadNorms, normalize_heads
from .kv_layout import KVLayout
from .registry import Implementation, Op
from .rotate import rotate

Append = Callable[..., Tensor]


def rope_append_kv_reference(layout: KVLayout, pre_rope: bool = False, rotates: bool = False) -> Append:
    """Builder of the op; its function takes

    q       [T, num_heads, head_dim]      before RoPE
    k, v    [T, num_kv_heads, head_dim]   k before RoPE
    cos     [T, head_dim / 2] float32, and sin
    slots   [T] int64
    layer   uint8, KVLayout.shape: written in place
    offset  [num_kv_heads, head_dim], taken off every key, or None
    centre  float32 [num_kv_heads, head_dim], taken off every key after RoPE, or [2, num_kv_heads, head_dim] with the
            mirror behind it (atom/quant/keys.py), or None
    norms   of heads of q and k, before anything else, or None
    exact   dtype of the model [rows, 2, num_kv_heads, head_dim]: takes keys and values too, as they are before they
            are rounded (paged_step.RecentStep), or None
    exact_slots  int64 [T], their rows in `exact`; negative: not stored
    returns q turned

    rotates  heads of q, and of k less its centre, are multiplied by a Hadamard matrix after RoPE
    """

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        layer: Tensor,
        offset: Tensor | None = None,
        centre: Tensor | None = None,
        norms: HeadNorms | None = None,
        exact: Tensor | None = None,
        exact_slots: Tensor | None = None,
    ) -> Tensor:
        if norms is not None:
            q, k = (normalize_heads(x, w, norms.eps, norms.offset) for x, w in ((q, norms.q), (k, norms.k)))
        if offset is not None:
            k = k - offset.to(k.dtype)
        if not pre_rope:
            k = rotate(k, cos, sin)
        if centre is not None or rotates:
            k = prepare_keys(k, centre, rotates)
        layout.write(layer, slots, 0, k)
        layout.write(layer, slots, 1, v)
        if exact is not None:
            assert exact_slots is not None, "exact keys and values need rows to go to"
            store_exact(exact, exact_slots, k, v)
        q = rotate(q, cos, sin)
        return prepare_queries(q, centre, rotates)

    return run


def store_exact(exact: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Prepared k and v [T, num_kv_heads, head_dim] into rows `slots` [T] of `exact`, in its dtype."""
    is_there = slots >= 0
    exact[slots[is_there]] = torch.stack((k.to(exact.dtype), v.to(exact.dtype)), 1)[is_there]


ROPE_APPEND_KV = Op(
    name="rope_append_kv",
    formula="blocks[slots] = quantize((rope(norm(k) - offset) - centre) H M), quantize(v); returns rope(norm(q)) H M",
    reference=rope_append_kv_reference,
    implementations=(Implementation("rope_append_sm90", "atom.kernels.append_sm90:RopeAppendSm90", refuses_attention),),
)
