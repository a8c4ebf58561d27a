"""Linears that share an input, stacked: the same numbers as one by one; and adds that are put off."""

import pytest
import torch
from torch import nn

from atom.models.norm import RMSNorm
from atom.models.together import LinearPart, run_together, stack_biases, stack_rows
from atom.models.twins import QuantizedLinear
from atom.quant.mixed import fake_quantize_activation, quantize_weight
from atom.quant.presets import PRESETS, get_scheme

SIZES = (24, 8, 8)
K = 192


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "bf16"])
def test_stacked_linears_give_what_each_gives(name: str, has_bias: bool) -> None:
    """Also where one scale per tensor differs between them (NVFP4), and where only one has a bias."""
    scheme = get_scheme(name).for_linear("x")
    generator = torch.Generator().manual_seed(0)
    weights = [quantize_weight(torch.randn(n, K, generator=generator) * 10.0**i, scheme) for i, n in enumerate(SIZES)]
    biases = [torch.randn(SIZES[0], generator=generator) if has_bias else None, None, None]
    alone = [QuantizedLinear(scheme, w, b, (n, K)) for w, b, n in zip(weights, biases, SIZES, strict=True)]
    whole = QuantizedLinear(scheme, stack_rows(weights), stack_biases(biases, SIZES), (sum(SIZES), K))
    parts = [LinearPart(whole, at, n, b) for at, n, b in zip((0, 24, 32), SIZES, biases, strict=True)]
    x = fake_quantize_activation(torch.randn(5, K, generator=generator), scheme)
    wanted = [linear(x) for linear in alone]
    for found in (run_together(parts, x), run_together(alone, x), [part(x) for part in parts]):
        for got, want in zip(found, wanted, strict=True):
            assert torch.allclose(got, want, rtol=1e-6, atol=1e-5 * float(want.abs().max()))


def test_parts_run_their_linear_once() -> None:
    calls: list[int] = []
    whole = nn.Linear(4, 6, bias=False)
    whole.register_forward_hook(lambda module, args, y: calls.append(1))
    first, second = run_together([LinearPart(whole, 0, 2, None), LinearPart(whole, 2, 4, None)], torch.ones(3, 4))
    assert first.shape == (3, 2) and second.shape == (3, 4) and len(calls) == 1


def test_a_norm_adds_what_was_put_off() -> None:
    norm = RMSNorm(8, 1e-6)
    hidden, update = torch.randn(3, 8), torch.randn(3, 8)
    total, normed = norm.after(hidden, update)
    assert torch.equal(total, hidden + update) and torch.equal(normed, norm(hidden + update))
    same, normed = norm.after(hidden, None)
    assert same is hidden and torch.equal(normed, norm(hidden))
