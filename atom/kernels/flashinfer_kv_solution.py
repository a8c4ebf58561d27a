"""What a FlashInfer-Trace solution of attention calls: plain tensors in, our kernels, plain tensors out."""

from typing import Any

import torch
from torch import Tensor

from ..quant.presets import KV4_WHOLE
from ..quant.tensor_spec import TensorSpec
from .bench_attention import FORMATS as MEASURED
from .dense_attention import AttentionSpec
from .kv_layout import KVLayout
from .paged_attention import PAGED_ATTENTION
from .paged_step import PagedStep
from .registry import Problem, device_arch
from .rope_append import ROPE_APPEND_KV

FORMATS: dict[str, TensorSpec | None] = {**MEASURED, "int4": KV4_WHOLE}  # zero points of the definitions are whole
BLOCK = 16
_caches: dict[int, tuple[Tensor, Any, PagedStep]] = {}


def run_append(kv: str, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Queries turned; codes, scales and zero points of keys, then of values."""
    q, k = tensors["q"], tensors["k"]
    tokens = q.shape[0]
    layout = KVLayout(FORMATS[kv], q.dtype, k.shape[1], k.shape[2], BLOCK)
    layer = torch.zeros(layout.shape(-(-tokens // BLOCK)), dtype=torch.uint8, device=q.device)
    append = ROPE_APPEND_KV.choose(_problem(kv, q, layout)).build(layout)
    slots = torch.arange(tokens, device=q.device)
    turned = append(q, k, tensors["v"], tensors["cos"], tensors["sin"], slots, layer)
    found = [turned]
    for part in (0, 1):
        codes = layout.codes(layer, part).transpose(1, 2).flatten(0, 1)[:tokens].contiguous()
        found.append(codes.view(_stored_dtype(kv)))
        if layout.spec is not None:
            words = layout.words(layer, part).transpose(1, 2).flatten(0, 1)[:tokens]
            found += words.unbind(-1)[: 1 if kv == "fp8" else 2]
    return tuple(found)


def run_attention(kv: str, tensors: dict[str, Tensor], window: int | None) -> Tensor:
    """Decode attention. A cache is put together at its first use and kept under its codes' address."""
    q, codes = tensors["q"], tensors["key_codes"]
    key = codes.data_ptr()
    if key not in _caches:
        blocks, kv_heads, block_size = codes.shape[:3]
        layout = KVLayout(FORMATS[kv], q.dtype, kv_heads, q.shape[2], block_size)
        layer = torch.zeros(layout.shape(blocks), dtype=torch.uint8, device=q.device)
        for part, name in enumerate(("key", "value")):
            layout.codes(layer, part)[:] = tensors[f"{name}_codes"].contiguous().view(torch.uint8)
            for index, word in enumerate(("scale", "zero")):
                if f"{name}_{word}" in tensors:
                    layout.words(layer, part)[..., index] = tensors[f"{name}_{word}"]
        attend = PAGED_ATTENTION.choose(_problem(kv, q, layout)).build(layout)
        tables, lengths = tensors["block_tables"], tensors["seqlens_k"].cpu().numpy()
        ends = torch.arange(len(q) + 1).numpy()
        slots = torch.zeros(len(q), dtype=torch.int64, device=q.device)
        _caches[key] = (layer, attend, PagedStep(ends, lengths, tables.cpu().numpy(), slots, tables))
    layer, attend, step = _caches[key]
    found: Tensor = attend(q, layer, step, AttentionSpec(q.shape[2] ** -0.5, window))
    return found


def _problem(kv: str, q: Tensor, layout: KVLayout) -> Problem:
    return Problem(
        device_arch(q.device),
        kv=FORMATS[kv],
        head_dim=layout.head_dim,
        num_heads=q.shape[1],
        num_kv_heads=layout.num_kv_heads,
        block_size=layout.block_size,
    )


def _stored_dtype(kv: str) -> torch.dtype:
    return {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}.get(kv, torch.int8)
