"""The dense cache with a recent window against attention written out: exact keys and values of the newest tokens."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from atom.errors import UnsupportedError
from atom.kernels import recent_attention
from atom.kernels.dense_attention import AttentionSpec
from atom.models.family import model_config
from atom.models.kv import DenseKV
from atom.models.rope import Rope, RopeConfig
from atom.quant.keys import prepare_keys, prepare_queries
from atom.quant.presets import get_scheme
from atom.quant.rounding import fake_quantize
from atom.quant.schemes import Scheme

from .random_models import LLAMA

CONFIG = model_config(LLAMA)
ROPE = Rope(RopeConfig(theta=100.0), CONFIG.head_dim)
BATCH, SEQ, HEADS, KV_HEADS, DIM = 2, 50, CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.head_dim
SCHEME = replace(get_scheme("bf16+kv4"), kv_recent=16)
PLAIN = replace(SCHEME, kv_offset="none", kv_rotation="none")


def random_qkv() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS,), (KV_HEADS,), (KV_HEADS,))
    q, k, v = (torch.randn(BATCH * SEQ, *heads, DIM, generator=generator) for heads in shapes)
    return q, k, v


def written_out(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, scheme: Scheme) -> Tensor:
    """Each query over keys and values that are chosen token by token, in float64."""
    rotation = ROPE(torch.arange(SEQ).repeat(BATCH))
    turned = prepare_keys(rotation.apply(k), spec.key_centre, scheme.rotates_keys)
    asked = prepare_queries(rotation.apply(q), spec.key_centre, scheme.rotates_keys).double()
    assert scheme.kv is not None
    pairs = [(x.double(), fake_quantize(x, scheme.kv).double()) for x in (turned, v)]
    out = torch.zeros(BATCH * SEQ, HEADS, DIM, dtype=torch.float64)
    for row in range(BATCH):
        for i in range(SEQ):
            seen = range(0 if spec.window is None else max(0, i - spec.window + 1), i + 1)
            keys, values = (
                torch.stack([(exact if i - j < scheme.kv_recent else rounded)[row * SEQ + j] for j in seen])
                for exact, rounded in pairs
            )
            for head in range(HEADS):
                group = head // (HEADS // KV_HEADS)
                shares = (keys[:, group] @ asked[row * SEQ + i, head] * spec.scale).softmax(0)
                out[row * SEQ + i, head] = shares @ values[:, group]
    return out.float()


SPECS = {
    "plain": AttentionSpec(0.25),
    "window 17": AttentionSpec(0.25, window=17),
    "window 30": AttentionSpec(0.25, window=30),
    "window beyond": AttentionSpec(0.25, window=100),
    "centre": AttentionSpec(0.25, key_centre=torch.linspace(-1, 1, KV_HEADS * DIM).view(KV_HEADS, DIM)),
}


@pytest.mark.parametrize("queries", [256, 7], ids=str)  # taken at a time
@pytest.mark.parametrize("chunks", [(SEQ,), (20, 30), (1,) * SEQ, (3, 1, 1, 45), (40, *(1,) * 10)], ids=len)
@pytest.mark.parametrize("scheme", [SCHEME, PLAIN], ids=["turned", "as it is"])
@pytest.mark.parametrize("name", SPECS)
def test_attention_in_any_chunks(
    name: str, scheme: Scheme, chunks: tuple[int, ...], queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent_attention, "QUERIES", queries)
    spec, (q, k, v) = SPECS[name], random_qkv()
    expected = written_out(q, k, v, spec if scheme is SCHEME else replace(spec, key_centre=None), scheme)
    kv = DenseKV.for_scheme(CONFIG, scheme if spec.key_centre is not None else replace(scheme, kv_offset="none"), BATCH)
    got = torch.empty_like(q).view(BATCH, SEQ, HEADS, DIM)
    start = 0
    for size in chunks:
        part = [x.view(BATCH, SEQ, -1, DIM)[:, start : start + size].flatten(0, 1) for x in (q, k, v)]
        got[:, start : start + size] = kv.attend(0, *part, ROPE(kv.positions(size)), spec).view(BATCH, size, HEADS, DIM)
        start += size
    torch.testing.assert_close(got.flatten(0, 1), expected, atol=1e-5, rtol=1e-5)


def test_a_window_changes_what_long_texts_read_and_nothing_else() -> None:
    """16 tokens are all read exactly; without the window, or beyond it, what is read is another thing."""
    q, k, v = (x[:SEQ] for x in random_qkv())
    spec = AttentionSpec(0.25)

    def read(scheme: Scheme | None) -> Tensor:
        kv = DenseKV.for_scheme(CONFIG, scheme)
        return kv.attend(0, q, k, v, ROPE(torch.arange(SEQ)), spec)

    found, rounded, exact = read(PLAIN), read(replace(PLAIN, kv_recent=0)), read(None)
    torch.testing.assert_close(found[:16], exact[:16])
    assert (found[16:] - exact[16:]).abs().amax((1, 2)).min() > 1e-4
    assert (found[16:] - exact[16:]).norm() < 0.8 * (rounded[16:] - exact[16:]).norm()


def test_what_is_kept_does_not_grow() -> None:
    kv = DenseKV.for_scheme(CONFIG, PLAIN)
    q, k, v = (x[:SEQ] for x in random_qkv())
    kv.attend(0, q, k, v, ROPE(torch.arange(SEQ)), AttentionSpec(1.0))
    newest = kv._newest[0][0]
    assert newest.shape[2] == 15 and newest.untyped_storage().nbytes() == newest.numel() * 4


def test_models_whose_attention_cannot_are_refused() -> None:
    capped = replace(CONFIG, attention_soft_cap=50.0)
    with pytest.raises(UnsupportedError, match="--kv-recent 0"):
        DenseKV.for_scheme(capped, PLAIN)
    narrow = replace(CONFIG, windows=(16,) * CONFIG.num_layers)
    with pytest.raises(UnsupportedError, match=r"sliding window of 16.*smaller --kv-recent"):
        DenseKV.for_scheme(narrow, PLAIN)
