"""The matrices that values are multiplied with before a low-bit cache rounds them."""

import torch
from torch import Tensor

from atom.calibration.values import ValueStatistics, attention_paid, transform_values_
from atom.kernels.dense_attention import AttentionSpec, attend_dense
from atom.models.attention import Attention
from atom.models.family import model_config
from atom.models.rope import Rope, RopeConfig
from atom.quant.presets import KV4
from atom.quant.rounding import fake_quantize

from ..conftest import MODELS


def loud_values(tokens: int, heads: int, dim: int) -> Tensor:
    """Values [tokens, heads * dim] with a main direction and channels of all sizes."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randn(heads * dim, generator=generator).exp()
    main = torch.randn(tokens, heads, 1, generator=generator) * torch.randn(heads, dim, generator=generator)
    return torch.randn(tokens, heads * dim, generator=generator) * sizes + 2 * main.flatten(1)


def test_transformed_values_leave_the_model_what_it_is() -> None:
    attention = Attention(model_config(MODELS["llama-biased"]), 0)
    x = torch.randn(40, attention.v_proj.in_features, generator=torch.Generator().manual_seed(0))
    heads = attention.v_proj.out_features // attention.head_dim
    statistics = ValueStatistics(heads)
    assert statistics.is_empty
    with torch.no_grad():
        values = attention.v_proj(x)
        statistics.add(values, torch.ones(40, heads))
        repeats = attention.o_proj.in_features // values.shape[1]

        def output(v: Tensor) -> Tensor:
            repeated = v.unflatten(-1, (heads, 1, -1)).expand(-1, -1, repeats, -1).flatten(1)
            found: Tensor = attention.o_proj(repeated)
            return found

        before = output(values)
        sample = transform_values_(attention, statistics.matrix(attention.o_proj.weight), values)
        after = attention.v_proj(x)
        assert torch.allclose(after, sample, atol=1e-5) and not torch.allclose(after, values, atol=1e-2)
        assert torch.allclose(output(after), before, atol=1e-4)
        moments = sample.unflatten(-1, (heads, -1))
        along = moments.mean(-1).square().sum(0) * moments.shape[-1]
        assert (along >= moments.square().sum(0).amax(-1)).all()  # more than along any one channel


def test_less_of_the_error_reaches_the_output() -> None:
    """Of values in a 4-bit cache, against a plain mirror, where o reads some directions louder than others."""
    heads, dim, tokens = 2, 32, 400
    values = loud_values(tokens, heads, dim)
    generator = torch.Generator().manual_seed(1)
    o = torch.randn(64, heads * dim, generator=generator) * torch.randn(heads * dim, generator=generator).exp()
    statistics = ValueStatistics(heads)
    statistics.add(values, torch.ones(tokens, heads))

    def error(matrix: Tensor) -> float:
        rows = torch.einsum("thi,hij->thj", values.unflatten(1, (heads, -1)), matrix)
        back = torch.einsum("thi,hij->thj", fake_quantize(rows, KV4), torch.linalg.inv(matrix)).flatten(1)
        return float(((back - values) @ o.T).square().mean())

    plain = torch.eye(dim).expand(heads, -1, -1)
    assert error(statistics.matrix(o)) < 0.8 * error(plain)


def test_attention_paid_is_what_attention_weighs_by() -> None:
    """Against the attention of torch, whose shares are read off values that are one token each."""
    length, generator = 24, torch.Generator().manual_seed(0)
    rope = Rope(RopeConfig(), 16)
    q, k = torch.randn(2 * length, 4, 16, generator=generator), torch.randn(2 * length, 2, 16, generator=generator)
    for window in (None, 5):
        rules = AttentionSpec(0.3, window)
        found = attention_paid(q, k, rope(torch.arange(length)), rules)
        assert found.shape == (2 * length, 2)
        positions = rope(torch.arange(length))
        for part in range(2):
            rows = slice(part * length, (part + 1) * length)
            turned, keys = (positions.apply(x[rows]).transpose(0, 1)[None] for x in (q, k))
            shares = attend_dense(turned, keys, torch.eye(length).expand(1, 2, -1, -1), rules)[0]  # [4, length, length]
            expected = shares.square().sum(1).unflatten(0, (2, 2)).sum(1).T
            assert torch.allclose(found[rows], expected, rtol=1e-4, atol=1e-6)
