"""The kernel that rotates, rounds and appends, on a GPU: the reference's bits."""

import pytest
import torch

from atom.kernels.append_sm90 import RopeAppendSm90
from atom.kernels.head_norm import HeadNorms
from atom.kernels.kv_layout import KVLayout
from atom.kernels.rope_append import rope_append_kv_reference

from .test_attention_gpu import SPECS
from .test_rope_append_sm90 import inputs, offset_for

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kv", SPECS)
@pytest.mark.parametrize("tokens", [1, 3, 64, 700])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_appended_bytes(kv: str, tokens: int, dim: int) -> None:
    """Equal to the reference's on the CPU, bit for bit."""
    q, k, v, cos, sin = (x[:tokens] for x in inputs(dim, 6, 2, max(tokens, 4)))
    layout = KVLayout(SPECS[kv], torch.bfloat16, 2, dim, 16)
    slots = torch.randperm(800, generator=torch.Generator().manual_seed(0))[:tokens]
    wanted = torch.full(layout.shape(50), 255, dtype=torch.uint8)
    offset = offset_for(2, dim).bfloat16() if kv == "int4" else None
    turned = rope_append_kv_reference(layout)(q, k, v, cos, sin, slots, wanted, offset)
    found = torch.full(layout.shape(50), 255, dtype=torch.uint8, device="cuda")
    on_gpu = [x.cuda() for x in (q, k, v, cos, sin, slots)]
    out = RopeAppendSm90(layout)(*on_gpu, found, None if offset is None else offset.cuda())
    assert torch.equal(out.cpu(), turned) and torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("kv", SPECS)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("norm", [None, 0.0, 1.0])
def test_transformed_bytes(kv: str, dim: int, norm: float | None) -> None:
    """Norms of heads, centre, Hadamard transform and mirror: the reference's bits, few tokens and many."""
    layout = KVLayout(SPECS[kv], torch.bfloat16, 2, dim, 16)
    weights = torch.randn(2, dim, generator=torch.Generator().manual_seed(2)).bfloat16()
    norms = None if norm is None else HeadNorms(*weights, 1e-6, norm)
    on_gpu = None if norms is None else HeadNorms(norms.q.cuda(), norms.k.cuda(), 1e-6, norms.offset)
    centre = offset_for(2, dim)
    if layout.zero_bias:
        mirror = torch.nn.functional.normalize(torch.randn(2, dim, generator=torch.Generator().manual_seed(3)), dim=-1)
        centre = torch.stack((centre, mirror * 2**0.5))
    for tokens in (3, 2100):
        q, k, v, cos, sin = (x[:tokens] for x in inputs(dim, 6, 2, max(tokens, 4)))
        slots = torch.randperm(2176, generator=torch.Generator().manual_seed(0))[:tokens]
        wanted = torch.full(layout.shape(136), 255, dtype=torch.uint8)
        found = wanted.cuda()
        rows = slots.flip(0) - tokens // 3  # some are negative
        exact = torch.full((2176, 2, 2, dim), 255.0).bfloat16()
        found_exact = exact.cuda()
        append = rope_append_kv_reference(layout, rotates=True)
        turned = append(q, k, v, cos, sin, slots, wanted, None, centre, norms, exact, rows)
        moved = [x.cuda() for x in (q, k, v, cos, sin, slots)]
        out = RopeAppendSm90(layout, rotates=True)(*moved, found, None, centre.cuda(), on_gpu, found_exact, rows.cuda())
        assert torch.equal(found_exact.cpu(), exact), f"unrounded keys and values of {tokens} tokens"
        assert torch.equal(out.cpu(), turned), f"queries of {tokens} tokens"
        differs = (found.cpu() != wanted).nonzero()
        assert not len(differs), f"{len(differs)} bytes of {tokens} tokens, {differs[:3].tolist()} first"
