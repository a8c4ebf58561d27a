"""Factors of keys and their mirror's direction, found together."""

import torch
from torch import Tensor

from atom.calibration.key_tuning import score_error, tune_keys
from atom.calibration.keys import KeyStatistics, mirror_to_equal
from atom.models.rope import Rope, RopeConfig
from atom.quant.keys import reflect_head, rotate_head
from atom.quant.presets import KV4
from atom.quant.rounding import fake_quantize

DIM = 32


def moments(seed: int, heads: int = 2) -> Tensor:
    """Second moments of heads whose channels differ, with a main direction."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.randn(heads, DIM, generator=generator).exp()
    main = torch.randn(heads, DIM, generator=generator) * 2
    found: Tensor = torch.diag_embed(channels) + main[:, :, None] * main[:, None, :]
    return found


def plain_factors(keys: Tensor, queries: Tensor) -> Tensor:
    """At which keys and queries have the same energies."""
    pairs = [x.diagonal(dim1=-2, dim2=-1).unflatten(-1, (2, -1)).sum(1) for x in (keys, queries)]
    logs = (pairs[0] / pairs[1]).log() / 4
    factors: Tensor = (logs - logs.mean(-1, keepdim=True)).exp()
    return factors


def both(factors: Tensor) -> Tensor:
    return torch.cat((factors, factors), -1)


def test_the_error_falls_and_stays_fallen() -> None:
    keys, queries = moments(0), moments(1)
    before = plain_factors(keys, queries)
    scaled = queries * both(before)[:, :, None] * both(before)[:, None, :]
    main = torch.linalg.eigh(scaled)[1][..., -1]
    factors, direction = tune_keys(keys, queries, before, is_shared=False)
    found = score_error(keys, queries, both(factors), direction)
    assert (found < 0.95 * score_error(keys, queries, both(before), main)).all()
    assert torch.allclose(factors.log().mean(-1), torch.zeros(2), atol=1e-5)
    assert torch.allclose(direction.norm(dim=-1), torch.ones(2))
    again, turned = tune_keys(keys, queries, factors, is_shared=False)
    assert torch.allclose(score_error(keys, queries, both(again), turned), found, rtol=0.02)


def test_shared_factors_are_the_same_for_all_heads() -> None:
    factors, direction = tune_keys(moments(0), moments(1), torch.ones(2, DIM // 2), is_shared=True)
    assert torch.equal(factors[0], factors[1]) and not torch.allclose(direction[0], direction[1])


def test_without_energy_nothing_is_infinite() -> None:
    nothing = torch.zeros(1, DIM, DIM)
    for keys, queries in ((nothing, moments(1, 1)), (moments(0, 1), nothing), (nothing, nothing)):
        factors, direction = tune_keys(keys, queries, torch.ones(1, DIM // 2), is_shared=False)
        assert factors.isfinite().all() and direction.isfinite().all()


def test_scores_have_less_error() -> None:
    """Of keys in a 4-bit cache, behind what `KeyStatistics` finds."""
    generator = torch.Generator().manual_seed(0)
    length, rope = 64, Rope(RopeConfig(), DIM)
    slow = torch.arange(DIM) % (DIM // 2) >= DIM // 2 - 6  # channels that RoPE hardly turns in so few tokens
    mains = [torch.randn(DIM, generator=generator) * slow * 3 for _ in "qk"]
    q, k = (torch.randn(8 * length, 1, DIM + 1, generator=generator) for _ in "qk")
    q, k = (x[..., :DIM] + x[..., DIM:] * main for x, main in zip((q, k), mains, strict=True))
    statistics = KeyStatistics(rope, length, q.device, 1)
    statistics.add_queries(q)
    statistics.add_keys(k)
    rotation = rope(torch.arange(length).repeat(8))
    q, k = rotation.apply(q), rotation.apply(k)

    def error(factors: Tensor, mirror: Tensor) -> float:
        def prepare(x: Tensor) -> Tensor:
            return reflect_head(rotate_head(x), mirror)

        keys, queries = prepare((k - statistics.centre) / both(factors)), prepare(q * both(factors))
        wrong = fake_quantize(keys, KV4) - keys
        return float(torch.einsum("shd,thd->st", queries, wrong).square().mean())

    factors = statistics.factors(is_shared=False)
    moments = statistics._query_moments * both(factors)[:, :, None] * both(factors)[:, None, :]
    apart = error(factors, mirror_to_equal(torch.linalg.eigh(moments)[1][..., -1].float(), is_rotated=True))
    assert error(*statistics.factors_and_mirror(is_shared=False)) < 0.97 * apart
