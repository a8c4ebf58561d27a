"""Keys as a cache rounds them: the centre taken off, heads turned by butterflies."""

import pytest
import torch

from atom.quant.keys import prepare_keys, rotate_head
from atom.quant.presets import get_scheme
from atom.quant.rotation import hadamard
from atom.quant.schemes import Scheme


@pytest.mark.parametrize(("dim", "block"), [(64, 64), (128, 128), (256, 256), (96, 32), (80, 16), (16, 16), (7, 1)])
def test_butterflies_are_sylvesters_matrix_in_blocks(dim: int, block: int) -> None:
    x = torch.randn(5, 3, dim, generator=torch.Generator().manual_seed(dim))
    expected = (x.double().unflatten(-1, (-1, block)) @ hadamard(block).double()).flatten(-2)
    assert torch.allclose(rotate_head(x).double(), expected, atol=1e-6)
    assert torch.allclose(rotate_head(rotate_head(x)), x, atol=1e-6)
    assert rotate_head(x.bfloat16()).dtype == torch.float32


def test_scores_change_by_one_constant_a_query() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, centre = (torch.randn(n, 2, 64, generator=generator) for n in (5, 9, 1))
    plain = torch.einsum("qhd,khd->hqk", q, k)
    found = torch.einsum("qhd,khd->hqk", rotate_head(q), prepare_keys(k, centre[0], True))
    assert torch.allclose(plain.softmax(-1), found.softmax(-1), atol=1e-5)
    assert torch.equal(prepare_keys(k, None, False), k)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_rotation": "dct"}, "unknown kv_rotation 'dct'"),
        ({"kv_rotation": "hadamard", "kv_offset": "mean"}, "use 'centre'"),
        ({"kv_rotation": "hadamard", "kv_offset": "none", "kv_pre_rope": True}, "kv_pre_rope=False"),
        ({"kv_offset": "centre", "kv_pre_rope": True}, "kv_pre_rope=False"),
        ({"kv_offset": "none", "kv_pre_rope": True, "kv_recent": 16}, "kv_pre_rope=False"),
        ({"kv_offset": "mean", "kv_recent": 16}, "kv_offset 'mean' came; use kv_offset 'centre'"),
        ({"kv_offset": "none", "kv_recent": 8}, "one of 0, 16, 32, 64, got 8; use 16"),
    ],
)
def test_what_does_not_fit_together_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheme("x", kv=get_scheme("bf16+kv4").kv, **fields)  # type: ignore[arg-type]
