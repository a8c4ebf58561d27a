"""The dense cache against attention written out in loops."""

import math

import pytest
import torch
from torch import Tensor

from atom.kernels.dense_attention import AttentionSpec
from atom.models.family import model_config
from atom.models.kv import DenseKV
from atom.models.rope import Rope, RopeConfig
from atom.quant.presets import KV4, KV8, KVFP8
from atom.quant.rounding import fake_quantize

from .random_models import LLAMA

CONFIG = model_config(LLAMA)
ROPE = Rope(RopeConfig(theta=100.0), CONFIG.head_dim)
BATCH, SEQ, HEADS, KV_HEADS, DIM = 2, 9, CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.head_dim


def random_qkv(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS,), (KV_HEADS,), (KV_HEADS,))
    q, k, v = (torch.randn(BATCH * SEQ, *heads, DIM, generator=generator) for heads in shapes)
    return q, k, v


def written_out(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """Attention of rotated q, k [BATCH * SEQ, heads, DIM], one query at a time in float64."""
    out = torch.zeros(BATCH * SEQ, HEADS, DIM, dtype=torch.float64)
    for row in range(BATCH):
        for i in range(SEQ):
            first = 0 if spec.window is None else max(0, i - spec.window + 1)
            for head in range(HEADS):
                group = head // (HEADS // KV_HEADS)
                scores = []
                for j in range(first, i + 1):
                    score = float(q[row * SEQ + i, head].double() @ k[row * SEQ + j, group].double()) * spec.scale
                    scores.append(score if spec.soft_cap is None else spec.soft_cap * math.tanh(score / spec.soft_cap))
                weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
                values = v[row * SEQ + first : row * SEQ + i + 1, group].double()
                out[row * SEQ + i, head] = weights @ values
    return out.float()


SPECS = {
    "plain": AttentionSpec(0.25),
    "window 1": AttentionSpec(0.25, window=1),
    "window 4": AttentionSpec(0.25, window=4),
    "window of the length": AttentionSpec(0.25, window=SEQ),
    "window beyond": AttentionSpec(0.25, window=100),
    "capped": AttentionSpec(1.0, soft_cap=1.5),
    "capped window": AttentionSpec(1.0, window=3, soft_cap=1.5),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("max_len", [None, SEQ, 50])
@pytest.mark.parametrize("chunks", [(SEQ,), (4, 5), (1,) * SEQ, (3, 1, 1, 4)], ids=str)
def test_attention_in_any_chunks(name: str, max_len: int | None, chunks: tuple[int, ...]) -> None:
    spec, (q, k, v) = SPECS[name], random_qkv()
    everywhere = ROPE(torch.arange(SEQ).repeat(BATCH))
    expected = written_out(everywhere.apply(q), everywhere.apply(k), v, spec)
    kv = DenseKV(CONFIG, BATCH, max_len=max_len)
    got = torch.empty_like(q).view(BATCH, SEQ, HEADS, DIM)
    start = 0
    for size in chunks:
        part = [x.view(BATCH, SEQ, -1, DIM)[:, start : start + size].flatten(0, 1) for x in (q, k, v)]
        out = kv.attend(0, *part, ROPE(kv.positions(size)), spec)
        got[:, start : start + size] = out.view(BATCH, size, HEADS, DIM)
        start += size
    torch.testing.assert_close(got.flatten(0, 1), expected, atol=1e-5, rtol=1e-5)
    assert kv.length == SEQ


@pytest.mark.parametrize("scheme", [KV4, KV8, KVFP8], ids=str)
@pytest.mark.parametrize("pre_rope", [False, True])
def test_quantized_cache(scheme: object, pre_rope: bool) -> None:
    """Keys are rounded where the flag says, values as they come, one scale per token and head."""
    q, k, v = random_qkv(1)
    rotation = ROPE(torch.arange(SEQ).repeat(BATCH))
    keys = rotation.apply(fake_quantize(k, scheme)) if pre_rope else fake_quantize(rotation.apply(k), scheme)
    expected = written_out(rotation.apply(q), keys, fake_quantize(v, scheme), SPECS["plain"])
    kv = DenseKV(CONFIG, BATCH, scheme, pre_rope)
    torch.testing.assert_close(kv.attend(3, q, k, v, rotation, SPECS["plain"]), expected, atol=1e-5, rtol=1e-5)
    exact = DenseKV(CONFIG, BATCH).attend(3, q, k, v, rotation, SPECS["plain"])
    assert (expected - exact).abs().max() > 1e-3  # the rounding is there


def test_layers_do_not_meet() -> None:
    q, k, v = random_qkv(2)
    kv = DenseKV(CONFIG, BATCH)
    rotation = ROPE(kv.positions(SEQ))
    first = kv.attend(0, q, k, v, rotation, SPECS["plain"])
    kv.attend(1, q, k + 1, v * 2, rotation, SPECS["plain"])
    torch.testing.assert_close(kv.attend(2, q, k, v, rotation, SPECS["plain"]), first)


def test_sequences_do_not_meet() -> None:
    q, k, v = random_qkv(3)
    rotation = ROPE(torch.arange(SEQ).repeat(BATCH))
    first = DenseKV(CONFIG, BATCH).attend(0, q, k, v, rotation, SPECS["plain"])
    k[SEQ:] += 10
    again = DenseKV(CONFIG, BATCH).attend(0, q, k, v, rotation, SPECS["plain"])
    torch.testing.assert_close(again[:SEQ], first[:SEQ], atol=0, rtol=0)
    assert not torch.allclose(again[SEQ:], first[SEQ:])


def test_a_full_cache_says_so() -> None:
    kv = DenseKV(CONFIG, BATCH, max_len=SEQ - 1)
    with pytest.raises(ValueError, match="reached 9 tokens, the cache holds max_len = 8"):
        kv.attend(0, *random_qkv(), ROPE(kv.positions(SEQ)), SPECS["plain"])


def test_tokens_must_split_over_the_batch() -> None:
    kv = DenseKV(CONFIG, 4)
    with pytest.raises(ValueError, match="18 tokens came for a dense cache of 4 sequences"):
        kv.attend(0, *random_qkv(), ROPE(torch.zeros(18, dtype=torch.int64)), SPECS["plain"])
