"""Op rope_append_kv: turn queries and keys, round keys and values, write them into the blocks of a paged cache.

One call takes all tokens of a step, of prefill chunks and of decodes alike: where a token's key and value go is said by
its slot. Keys are stored turned unless `pre_rope`; where the scheme keeps a key offset apart, the offset is taken off
before anything else and comes back when keys are read (paged_attention.py). A centre is taken off after RoPE and never
comes back, and heads of keys and queries may be turned by a Hadamard matrix and reflected last (atom/quant/keys.py).
"""

from collections.abc import Callable

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
        q = rotate(q, cos, sin)
        return prepare_queries(q, centre, rotates)

    return run


ROPE_APPEND_KV = Op(
    name="rope_append_kv",
    formula="blocks[slots] = quantize((rope(norm(k) - offset) - centre) H M), quantize(v); returns rope(norm(q)) H M",
    reference=rope_append_kv_reference,
    implementations=(Implementation("rope_append_sm90", "atom.kernels.append_sm90:RopeAppendSm90", refuses_attention),),
)
