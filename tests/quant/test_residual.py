"""Residual channels: what rounding leaves of the loudest channels is multiplied too."""

from dataclasses import replace

import pytest
import torch

from atom.kernels.refusals_fp4 import refuses_scheme as refuses_fp4
from atom.kernels.refusals_sm90 import refuses_scheme as refuses_sm90
from atom.quant.mixed import dequantize_weight, fake_quantize_activation, quantize_weight
from atom.quant.presets import get_scheme
from atom.quant.rounding import fake_quantize
from atom.quant.schemes import LinearScheme, OutlierSpec, Scheme
from atom.quant.switches import Switches

COUNT = 32


def residual(name: str, outliers: int = 0) -> LinearScheme:
    plain = get_scheme(name).default_linear
    return replace(plain, outliers=OutlierSpec(outliers), reorder=True, rotation=None, residual=COUNT)


@pytest.mark.parametrize(("name", "outliers"), [("nvfp4", 0), ("w4a8", 0), ("w4a4", 16)])
def test_it_is_a_product_with_so_many_columns_more(name: str, outliers: int) -> None:
    linear = residual(name, outliers)
    assert linear.activation is not None
    torch.manual_seed(0)
    x, weight = torch.randn(5, 144 + outliers), torch.randn(24, 144 + outliers)
    read = dequantize_weight(quantize_weight(weight, linear), linear)
    once = fake_quantize_activation(x, replace(linear, residual=0))
    loud = slice(144 - COUNT, 144)
    left = fake_quantize(x[:, loud] - once[:, loud], linear.activation)
    wanted = torch.cat((once, left), 1) @ torch.cat((read, read[:, loud]), 1).T
    torch.testing.assert_close(fake_quantize_activation(x, linear) @ read.T, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "nvint4"])
def test_the_loudest_are_nearly_exact_and_the_others_as_before(name: str) -> None:
    linear = residual(name)
    torch.manual_seed(1)
    x = torch.randn(64, 256)
    x[:, -COUNT:] *= 20.0
    once, twice = (fake_quantize_activation(x, each) for each in (replace(linear, residual=0), linear))
    assert torch.equal(once[:, :-COUNT], twice[:, :-COUNT])
    error = (twice - x)[:, -COUNT:].norm() / (once - x)[:, -COUNT:].norm()
    assert error < 0.2


def test_bits_and_what_is_written() -> None:
    plain = replace(get_scheme("nvfp4"), reorder=True)
    scheme = replace(plain, residual=64)
    assert scheme.weight_bits(1024) == plain.weight_bits(1024)
    assert scheme.activation_bits(1024) == pytest.approx(plain.activation_bits(1024) * (1 + 64 / 1024), rel=1e-3)
    assert Scheme.from_dict(scheme.to_dict()) == scheme
    assert "residual" not in plain.to_dict() and scheme.to_dict()["residual"] == 64
    assert Switches(residual=64).apply(get_scheme("nvfp4")) == scheme


def test_no_kernel_takes_them_and_what_does_not_fit_is_refused() -> None:
    assert refuses_sm90(residual("w4a8")) == "residual channels have no kernel yet"
    assert "residual channels" in str(refuses_fp4(residual("nvfp4")))
    with pytest.raises(ValueError, match="a multiple of 16"):
        replace(residual("nvfp4"), residual=24)
    with pytest.raises(ValueError, match="residual channels are the last normal ones"):
        replace(residual("nvfp4"), reorder=False)
    with pytest.raises(ValueError, match="--residual needs quantized activations"):
        Switches(residual=64).apply(get_scheme("w4a16"))
