"""The knapsack against brute force, the measurement against itself resumed, and the scheme that comes of both."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from atom.calibration.budget import (
    Place,
    Sensitivity,
    build_scheme,
    choose_by_budget,
    find_places,
    frontier,
    solve,
    solve_for_loss,
)
from atom.calibration.config import CalibrationConfig
from atom.calibration.stream import quantize_model
from atom.models.family import input_groups
from atom.models.loader import load_model
from atom.models.source import open_source
from atom.quant.presets import get_scheme

Tiny = Callable[[str], Path]
Close = Callable[[Path, Path], float]
TOKENS = torch.arange(96).remainder(83).view(3, 32)


def random_places(seed: int) -> tuple[list[Place], dict[str, dict[str, float]]]:
    draw = torch.Generator().manual_seed(seed)
    group = input_groups()[0]
    places = [
        Place(i, group, int(torch.randint(1, 9, (1,), generator=draw)) * 1000, {"a": 4.0, "b": 6.0, "c": 8.0})
        for i in range(6)
    ]
    losses = {}
    for place in places:
        values = torch.rand(3, generator=draw).sort(descending=True).values.tolist()
        losses[place.name] = dict(zip("abc", values, strict=True))
    return places, losses


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [4.0, 4.7, 6.1, 8.0])
def test_the_knapsack_is_solved(seed: int, budget: float) -> None:
    places, losses = random_places(seed)
    total = sum(p.macs for p in places)
    found = solve(places, losses, budget)
    best = min(
        sum(losses[p.name][c] for p, c in zip(places, combination, strict=True))
        for combination in itertools.product("abc", repeat=len(places))
        if sum(p.macs * p.bits[c] for p, c in zip(places, combination, strict=True)) / total <= budget + 1e-9
    )
    assert found.bits <= budget + 1e-9
    assert found.loss == pytest.approx(best, rel=0.01)  # costs are rounded up to a grid
    assert found.loss == pytest.approx(sum(losses[name][c] for name, c in found.chosen.items()))


def test_limits_from_both_sides() -> None:
    places, losses = random_places(7)
    points = frontier(places, losses)
    assert [p.bits for p in points] == sorted(p.bits for p in points)
    assert [p.loss for p in points] == sorted((p.loss for p in points), reverse=True)
    middle = points[len(points) // 2]
    assert solve_for_loss(places, losses, middle.loss).bits <= middle.bits + 0.01
    with pytest.raises(ValueError, match=r"3\.5 bits cannot be met: the cheapest choices need 4\.000"):
        solve(places, losses, 3.5)
    with pytest.raises(ValueError, match="cannot be met: the best choices lose"):
        solve_for_loss(places, losses, 0.0)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_measurement_resumes_and_leaves_the_model_alone(name: str, tiny: Tiny, tmp_path: Path) -> None:
    model = load_model(tiny(name))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    places, choices = find_places(model)
    assert len(places) == 12 and "w4a4, 64 outliers" in choices["0.mlp_input"]
    assert "w4a4, 256 outliers" not in choices["0.mlp_input"]
    file = tmp_path / "sensitivity.json"
    losses = Sensitivity(model, TOKENS, file).measure(places, choices)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for place in places:
        assert losses[place.name]["w8a8"] < losses[place.name]["w4a8"] < 1.0
        assert losses[place.name]["w8a8"] < losses[place.name]["w4a4, 0 outliers"]
    kept = json.loads(file.read_text())
    assert kept == losses
    file.write_text(json.dumps({**kept, "0.o_input": dict.fromkeys(kept["0.o_input"], 9.0)}))
    again = Sensitivity(model, TOKENS, file).measure(places, choices)
    assert again["0.o_input"]["w8a8"] == 9.0 and again["1.o_input"] == losses["1.o_input"]


def test_a_mixed_scheme_quantizes_and_loses_what_lies_between(
    tiny: Tiny, logit_error: Close, quick: CalibrationConfig, tmp_path: Path
) -> None:
    source, base = open_source(tiny("llama")), get_scheme("w4a4+kv16")
    errors = {}
    for budget in (4.6, 6.5, 8.5):
        scheme, plan, points = choose_by_budget(
            source, base, TOKENS, tmp_path / "s.json", torch.device("cpu"), budget=budget
        )
        assert plan.bits <= budget and len(points) == 9
        out = tmp_path / str(budget)
        quantize_model(tiny("llama"), scheme, out, quick)
        errors[budget] = logit_error(out, tiny("llama"))
    assert errors[8.5] < errors[6.5] < errors[4.6]
    with pytest.raises(ValueError, match="one of them"):
        choose_by_budget(source, base, TOKENS, tmp_path / "s.json", torch.device("cpu"))


def test_the_cheapest_plan_of_the_base_is_the_base() -> None:
    base = get_scheme("w4a4")
    model_places = [Place(0, input_groups()[0], 10, {"x": 4.0})]
    plan = solve(model_places, {"0.attention_input": {"x": 0.1}}, 4.0)
    scheme = build_scheme(base, plan, model_places, {"0.attention_input": {"x": base.default_linear}})
    assert scheme == base
