"""Zero points that keep the mean: what they promise, and the grid's own values found again."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atom.quant.granularity import Group, Head
from atom.quant.ordered_sum import sum_in_order
from atom.quant.presets import KV2, KV3, KV4
from atom.quant.rounding import choose_scale, dequantize, encode, fake_quantize, quantize
from atom.quant.tensor_spec import TensorSpec

SPECS = {"int2": KV2, "int3": KV3, "int4": KV4, "int8": TensorSpec("int8", Head(), False, True, zero="mean")}
every = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def rows(size: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(200, size, generator=generator) + 3 * torch.randn(200, 1, generator=generator)


@every
def test_the_mean_stays(spec: TensorSpec) -> None:
    """To the accuracy of the zero point, a 256th of its distance from half the codes, where zero is near."""
    x = rows()
    x = x - 0.8 * x.mean(-1, keepdim=True)
    scale = choose_scale(x, spec)
    assert scale.zero_point is not None
    found = fake_quantize(x, spec).mean(-1)
    half = 2 ** (int(spec.format[3:]) - 1)
    bound = scale.scale[..., 0] * ((scale.zero_point[..., 0] - half).abs() / 256 + half / 2000)  # the scale is rounded
    assert ((found - x.mean(-1)).abs() <= bound).all()


@every
def test_what_channels_have_in_common_costs_nothing(spec: TensorSpec) -> None:
    """A row moved by half the length of its range has the same codes and scale; far away its range holds zero."""
    x = rows() - rows().mean(-1, keepdim=True)
    reach = x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)
    near, here = quantize(x + 0.5 * reach, spec), quantize(x, spec)
    assert float((near.codes != here.codes).float().mean()) < 2e-3  # of values that lie between two codes
    assert torch.allclose(near.scale.scale, here.scale.scale, rtol=2**-7)
    far = x + 100 * reach
    assert (choose_scale(far, spec).scale > 10 * here.scale.scale).all()
    assert ((fake_quantize(far, spec) - far).abs() <= choose_scale(far, spec).scale).all()


@every
def test_codes_and_fake_quantize_agree(spec: TensorSpec) -> None:
    for x in (rows(), rows(7), rows(96), torch.zeros(3, 16), torch.full((2, 16), 2.5), torch.full((1, 8), -3e38)):
        q = quantize(x, spec)
        assert torch.equal(dequantize(q, spec), fake_quantize(x, spec))
        assert torch.isfinite(fake_quantize(x, spec)).all()
    assert (fake_quantize(torch.zeros(3, 16), spec) == 0).all()
    assert torch.allclose(fake_quantize(torch.full((2, 16), -2.5), spec), torch.full((2, 16), -2.5), rtol=2**-8)
    huge = torch.tensor([[3e38, -3e38, 1.0, 0.0]])
    assert torch.isfinite(fake_quantize(huge, spec)).all()


@pytest.mark.parametrize("spec", [KV2, KV3, KV4], ids=str)
def test_a_rounded_row_is_found_again(spec: TensorSpec) -> None:
    """What puts the first key of sequences on the grid rests on it."""
    once = quantize(rows(), spec)
    values = dequantize(once, spec)
    again = quantize(values, spec)
    assert torch.equal(again.codes, once.codes)
    assert torch.allclose(dequantize(again, spec), values, atol=1e-5)
    assert torch.equal(encode(values, once.scale, spec), once.codes)


def test_it_is_more_accurate_than_whole_zero_points() -> None:
    x = rows(128)
    whole = TensorSpec("int4", Head(), False, True)
    assert (fake_quantize(x, KV4) - x).norm() < 0.9 * (fake_quantize(x, whole) - x).norm()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40))
def test_error_bound_of_any_values(values: list[float]) -> None:
    """Half a step, and what the zero point moves all values by: half a step on average at most."""
    x = torch.tensor([values])
    step = float(choose_scale(x, KV4).scale)
    assert float((fake_quantize(x, KV4) - x).abs().max()) <= 1.6 * step


def test_sums_in_order() -> None:
    for size in (1, 7, 64, 80, 96, 256):
        x = torch.arange(size, dtype=torch.float32)
        assert float(sum_in_order(x)) == size * (size - 1) / 2


def test_what_it_does_not_go_with() -> None:
    for changed in ({"symmetric": True}, {"clip": 0.9}, {"granularity": Group(8)}):
        with pytest.raises(ValueError, match="zero 'mean'"):
            replace(KV4, **changed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown zero rule"):
        TensorSpec("int4", Head(), False, True, zero="median")  # type: ignore[arg-type]
    assert "zero" not in TensorSpec("int4", Head()).to_dict()
    assert TensorSpec.from_dict(KV4.to_dict()) == KV4
