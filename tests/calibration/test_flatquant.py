"""The transforms change nothing until something is rounded, and learning them brings the rounded model closer."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from atom.calibration.flatquant import ALL, FlatConfig, FlatInput, FlatLinear, flatten_model, inverse_nearby, round_rows
from atom.models.generate import scheme_cache
from atom.models.loader import load_model
from atom.models.model import Model
from atom.quant.presets import get_scheme

Tiny = Callable[[str], Path]
TEXT = torch.arange(400).remainder(97).view(10, 40)


def test_transformed_inputs_and_weights_give_the_same_product() -> None:
    generator = torch.Generator().manual_seed(0)
    x, linear = torch.randn(9, 24, generator=generator), nn.Linear(24, 5)
    source = FlatInput(24, 4, generator, torch.device("cpu"))
    with torch.no_grad():  # away from orthogonal and from 1
        source.left += 0.1 * torch.randn(source.left.shape, generator=generator)
        source.log_scale += 0.3 * torch.randn(24, generator=generator)
        y = source.transform(x) @ source.transform_weight(linear.weight).T
    torch.testing.assert_close(y, x @ linear.weight.detach().T, rtol=1e-4, atol=1e-4)
    assert FlatLinear(linear, source, 4).rounded().unique().numel() <= 16 * 5


def test_rows_are_clipped_at_the_learned_reach() -> None:
    x = torch.tensor([[1.0, -0.5, 0.1]], requires_grad=True)
    reach = torch.zeros(1, requires_grad=True)  # half of the largest
    y = round_rows(x, reach, 4)
    assert y.max().item() == pytest.approx(0.5)
    y.sum().backward()
    assert x.grad is not None and x.grad[0, 2] == 1 and reach.grad is not None and reach.grad.abs() > 0


def test_what_is_not_learned_is_left_out(tiny: Tiny) -> None:
    """Transforms bring the most, as in the paper's table of its parts."""
    exact = hidden(load_model(tiny("llama")))
    errors = {}
    for learns in (("transforms",), ("factors", "clips"), ALL):
        model = load_model(tiny("llama"))
        flatten_model(model, TEXT, get_scheme("bf16"), FlatConfig(learns, steps=40))
        errors[learns] = float((hidden(model) - exact).norm() / exact.norm())
    assert errors[ALL] < 1.02 * min(errors.values()) and max(errors.values()) < 1.0
    source = FlatInput(24, 4, torch.Generator().manual_seed(0), torch.device("cpu"), ("factors",))
    x = torch.randn(5, 24)
    torch.testing.assert_close(source.transform(x), x)
    assert source.reach.sigmoid().item() > 0.999999


def test_time_is_shared_by_the_layers(tiny: Tiny) -> None:
    model = load_model(tiny("llama"))
    started = time.perf_counter()
    found = flatten_model(model, TEXT, get_scheme("bf16"), replace(FlatConfig(), steps=10**6, seconds=1.0))
    assert len(found["steps"]) == 3 and all(0 < steps < 10**6 for steps in found["steps"])
    assert time.perf_counter() - started < 30  # a second, and what a busy machine adds


def hidden(model: Model) -> Tensor:
    tokens = torch.arange(60).remainder(89)
    kv = scheme_cache(model, 1, 60)
    with torch.no_grad():
        return model(tokens, kv.positions(60), kv)


@pytest.mark.parametrize(("name", "kv"), [("llama", "kv16"), ("qwen2", "kv16"), ("gemma3", "kv8")])
def test_learning_brings_the_model_closer(name: str, kv: str, tiny: Tiny) -> None:
    exact = hidden(load_model(tiny(name)))
    scheme = get_scheme(f"bf16+{kv}")
    errors = []
    for steps in (0, 100):
        model = load_model(tiny(name))
        flatten_model(model, TEXT, scheme, replace(FlatConfig(), steps=steps))
        errors.append(float((hidden(model) - exact).norm() / exact.norm()))
    assert errors[1] < 0.9 * errors[0] < 0.9


def test_an_inverse_from_one_nearby_has_the_gradient_of_the_inverse() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    near = A.T.clone()
    A = (A + 0.03 * torch.randn(12, 12, generator=generator, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    found, exact = inverse_nearby(A, near), torch.linalg.inv(A)
    (own,) = torch.autograd.grad((found * weight).sum(), A, retain_graph=True)
    (wanted,) = torch.autograd.grad((exact * weight).sum(), A)
    torch.testing.assert_close(found, exact, atol=1e-8, rtol=0)
    torch.testing.assert_close(own, wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(near, exact.detach(), atol=1e-6, rtol=0)
