"""Every RoPE scaling that models come with, through the kernels on a GPU: stored bytes, attention over them, logits."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from atom.kernels.append_sm90 import RopeAppendSm90
from atom.kernels.attention_sm90 import PagedAttentionSm90
from atom.kernels.dense_attention import AttentionSpec
from atom.kernels.kv_layout import KVLayout
from atom.kernels.paged_attention import PagedAttentionReference
from atom.kernels.paged_step import PagedStep
from atom.kernels.rope_append import rope_append_kv_reference
from atom.models.rope import ROPE_TYPES, Rope, parse_rope
from atom.quant.presets import KV4

from ..serving.test_kv_pool import LLAMA, RAW, SCHEMES, Cache, chunked, small_model
from .test_attention_gpu import within
from .test_rope_append_sm90 import inputs

pytestmark = pytest.mark.gpu
TRAINED = 16  # tokens, so that short texts pass it
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": TRAINED},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
}


def scaling(kind: str) -> dict[str, Any]:
    """What a config.json says of it."""
    return {
        "max_position_embeddings": TRAINED if kind == "dynamic" else 8 * TRAINED,
        "rope_scaling": {"rope_type": kind, **SCALINGS[kind]},
    }


def test_all_are_here() -> None:
    assert set(SCALINGS) == set(ROPE_TYPES)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kind", SCALINGS)
def test_bytes_and_attention(kind: str, dim: int) -> None:
    """The reference's bytes at positions before and beyond the pretrained length, and decode over them."""
    raw = scaling(kind)
    rope = Rope(parse_rope(raw["rope_scaling"], raw), dim)
    tokens, layout = 90, KVLayout(KV4, torch.bfloat16, 2, dim, 16)
    places = torch.arange(tokens)
    rotation = rope(places, places + 1)
    q, k, v, *_ = inputs(dim, 8, 2, tokens)
    wanted = torch.full(layout.shape(6), 255, dtype=torch.uint8)
    turned = rope_append_kv_reference(layout)(q, k, v, rotation.cos, rotation.sin, places, wanted)
    layer = torch.full_like(wanted, 255, device="cuda")
    on_gpu = [x.cuda() for x in (q, k, v, rotation.cos, rotation.sin, places)]
    out = RopeAppendSm90(layout)(*on_gpu, layer)
    assert torch.equal(out.cpu(), turned) and torch.equal(layer.cpu(), wanted)
    table = np.arange(6, dtype=np.int32)[None]
    step = PagedStep(np.array([0, 1]), np.array([tokens], dtype=np.int32), table, places[:1], torch.from_numpy(table))
    spec, last = AttentionSpec(dim**-0.5), turned[-1:]
    exact = PagedAttentionReference(replace(layout, dtype=torch.float64))(last.double(), wanted, step, spec)
    in_torch = PagedAttentionReference(layout)(last, wanted, step, spec)
    moved = replace(step, slots=step.slots.cuda(), block_tables=step.block_tables.cuda(), _derived={})
    found = PagedAttentionSm90(layout)(last.cuda(), layer, moved, spec)
    within(found, exact, float((in_torch.double() - exact).abs().max()))


@pytest.mark.parametrize("kind", SCALINGS)
def test_logits(kind: str) -> None:
    """Prompts, chunks and decodes of a small model, in a cache of 8 bits: as with the references, to rounding."""
    RAW["scaled"] = {**LLAMA, "head_dim": 64, **scaling(kind)}
    try:
        model = small_model("scaled", SCHEMES["int8"]).bfloat16().cuda()
    finally:
        del RAW["scaled"]
    steps = (((0, 40), (1, 9)), ((0, 1), (1, 30)), ((1, 1), (0, 1)), ((0, 1), (1, 1)))
    wanted, found = (chunked(Cache(model, 16, device="cuda", kernels=each), steps) for each in ("reference", "auto"))
    for sequence, logits in wanted.items():
        error = (found[sequence] - logits).float().norm(dim=1) / logits.float().norm(dim=1)
        assert float(error.max()) < 0.1, f"sequence {sequence}"
