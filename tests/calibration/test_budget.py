"""The knapsack against brute force, the measurement against itself resumed, and the scheme that comes of both."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atom.calibration import budget as budget_module
from atom.calibration.budget import build_scheme, choose_by_budget
from atom.calibration.config import CalibrationConfig
from atom.calibration.knapsack import Knapsack, Plan
from atom.calibration.places import Place, find_places
from atom.calibration.prepared import load_prepared
from atom.calibration.sensitivity import Sensitivity, losses_file
from atom.calibration.stream import quantize_model
from atom.models.family import input_groups
from atom.models.kv import DenseKV
from atom.models.loader import load_model, load_source
from atom.models.model import build_model
from atom.models.source import Source, open_source
from atom.quant.presets import KV8, get_scheme
from atom.quant.schemes import CacheOverride, Scheme

Tiny = Callable[[str], Path]
Close = Callable[[Path, Path], float]
ON_CPU = CalibrationConfig(device="cpu")
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
    found = Knapsack(places, losses).solve(budget)
    best = min(
        sum(losses[p.name][c] for p, c in zip(places, combination, strict=True))
        for combination in itertools.product("abc", repeat=len(places))
        if sum(p.macs * p.bits[c] for p, c in zip(places, combination, strict=True)) / total <= budget + 1e-9
    )
    assert found.bits <= budget + 1e-9
    assert found.loss == pytest.approx(best, rel=1e-9)
    assert found.loss == pytest.approx(sum(losses[name][c] for name, c in found.chosen.items()))


def test_limits_from_both_sides() -> None:
    places, losses = random_places(7)
    knapsack = Knapsack(places, losses)
    points = knapsack.frontier()
    assert [p.bits for p in points] == sorted(p.bits for p in points)
    assert [p.loss for p in points] == sorted((p.loss for p in points), reverse=True)
    middle = points[len(points) // 2]
    assert knapsack.solve_for_loss(middle.loss).bits <= middle.bits + 1e-3
    with pytest.raises(ValueError, match=r"3\.5 bits cannot be met: the cheapest choices need 4\.000"):
        knapsack.solve(3.5)
    with pytest.raises(ValueError, match="cannot be met: the best choices lose"):
        knapsack.solve_for_loss(0.0)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_measurement_resumes_and_leaves_the_model_alone(name: str, tiny: Tiny, tmp_path: Path) -> None:
    model = load_model(tiny(name))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    base = get_scheme("w4a4")
    places, choices = find_places(model, base)
    assert len(places) == 15 and "w4a4, 64 outliers" in choices["0.mlp_input"]
    assert "w4a4, 256 outliers" not in choices["0.mlp_input"]
    file = tmp_path / "sensitivity.json"
    losses = Sensitivity(model, base, TOKENS, file).measure(places, choices)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(losses[f"{layer}.cache"]["kv8"] < losses[f"{layer}.cache"]["kv4"] < 1.0 for layer in range(3))
    for place in places:
        if place.group is None:
            continue
        assert losses[place.name]["w8a8"] < losses[place.name]["w4a8"] < 1.0
        assert losses[place.name]["w8a8"] < losses[place.name]["w4a4, 0 outliers"]
    kept = json.loads(file.read_text())
    assert kept == losses
    file.write_text(json.dumps({**kept, "0.o_input": dict.fromkeys(kept["0.o_input"], 9.0)}))
    again = Sensitivity(model, base, TOKENS, file).measure(places, choices)
    assert again["0.o_input"]["w8a8"] == 9.0 and again["1.o_input"] == losses["1.o_input"]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("scheme", ["w4a4", "w4a4-hadamard", "bf16+kv4"])
def test_a_prepared_model_is_the_same_function(name: str, scheme: str, tiny: Tiny) -> None:
    """Weights are others, since inputs are balanced and keys and values have factors, but not what they compute."""
    plain, source = load_model(tiny(name)), open_source(tiny(name))
    prepared = load_prepared(source, get_scheme(scheme), TOKENS, ON_CPU)
    text, kv = TOKENS[0], DenseKV(plain.config)
    expected = plain(text, kv.positions(len(text)), kv)
    kv = DenseKV(plain.config)
    found = prepared(text, kv.positions(len(text)), kv)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.std()))  # rounded as stored
    weights = dict(prepared.named_parameters())
    changed = [key for key, weight in plain.named_parameters() if not torch.allclose(weight, weights[key])]
    assert any("v_proj" in key for key in changed) == (scheme != "w4a4")
    assert any("mlp" in key for key in changed) == (scheme == "w4a4-hadamard")


def test_losses_are_kept_for_what_they_hang_on(tiny: Tiny, tmp_path: Path) -> None:
    source, base = open_source(tiny("llama")), get_scheme("w4a4")

    def file_of(source: Source = source, base: Scheme = base, text: str = "text") -> Path:
        return losses_file(tmp_path / "out", source, base, text, ON_CPU)

    path = file_of()
    assert path.name.startswith("out.sensitivity-") and path == file_of()
    assert path == file_of(base=get_scheme("w4a8"))
    others = [
        file_of(open_source(tiny("qwen2"))),
        file_of(base=replace(base, kv_rotation="none")),
        file_of(base=get_scheme("w4a4-hadamard")),
        file_of(text="another text"),
    ]
    assert len({path, *others}) == 5


def test_choices_run_together_as_one_by_one(tiny: Tiny, tmp_path: Path) -> None:
    model = load_model(tiny("llama"))
    places, choices = find_places(model, get_scheme("w4a4"))
    together, alone = (Sensitivity(model, get_scheme("w4a4"), TOKENS, tmp_path / name) for name in ("a", "b"))
    alone._together = 1
    together.measure(places, choices)
    for name, losses in alone.measure(places, choices).items():
        assert losses == pytest.approx(together.losses[name], rel=1e-3, abs=1e-7)


def test_a_mixed_scheme_quantizes_and_loses_what_lies_between(
    tiny: Tiny, logit_error: Close, quick: CalibrationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, base = open_source(tiny("llama")), get_scheme("w4a4+kv16")
    errors = {}
    for budget in (4.6, 6.5, 8.5):
        scheme, plan, points, bits = choose_by_budget(source, base, TOKENS, tmp_path / "s.json", ON_CPU, budget=budget)
        assert plan.bits <= budget and len(points) == 9
        assert set(bits) == {"weight", "activation"} and sum(bits.values()) / 2 == pytest.approx(plan.bits)
        out = tmp_path / str(budget)
        quantize_model(tiny("llama"), scheme, out, quick)
        errors[budget] = logit_error(out, tiny("llama"))
    assert errors[8.5] < errors[6.5] < errors[4.6]
    monkeypatch.delattr(budget_module, "load_prepared")
    again = choose_by_budget(source, base, TOKENS, tmp_path / "s.json", ON_CPU, budget=8.5)  # from what is kept alone
    assert again.scheme == scheme
    with pytest.raises(ValueError, match="one of them"):
        choose_by_budget(source, base, TOKENS, tmp_path / "s.json", ON_CPU)


def test_caches_are_chosen_layer_by_layer(
    tiny: Tiny, logit_error: Close, quick: CalibrationConfig, tmp_path: Path
) -> None:
    source, base = open_source(tiny("llama")), get_scheme("bf16+kv4")

    def scheme_of(name: str, **limits: float) -> Scheme:
        return choose_by_budget(source, base, TOKENS, tmp_path / name, ON_CPU, **limits)[0]

    dearest = scheme_of("s.json", budget=20.0)
    assert [(o.layer, o.kv) for o in dearest.kv_overrides] == [(layer, KV8) for layer in range(3)]
    cached = load_source(source).config
    places, choices = find_places(build_model(cached), base)
    assert [place.name for place in places] == [f"{layer}.cache" for layer in range(3)]  # weights stay as they are
    chosen = {place.name: "kv8" if place.layer == 1 else "kv4" for place in places}
    mixed = build_scheme(base, Plan(chosen, 0.0, 0.0), places, choices)
    assert mixed.kv_overrides == (CacheOverride(1, KV8),)
    errors = []
    for number, scheme in enumerate((base, replace(base, kv_overrides=mixed.kv_overrides), base.with_kv(KV8))):
        out = tmp_path / str(number)
        quantize_model(tiny("llama"), scheme, out, quick)
        errors.append(logit_error(out, tiny("llama")))
    assert errors[0] > errors[1] > errors[2]
    recent, _ = find_places(build_model(cached), replace(base, kv_recent=16), context=1024)
    assert [r.bits["kv4"] - p.bits["kv4"] for r, p in zip(recent, places, strict=True)] == [0.25] * 3
    without, _ = find_places(build_model(cached), get_scheme("w4a4"), context=0)
    assert all(place.group is not None for place in without)
    with pytest.raises(ValueError, match="nothing to choose"):
        find_places(build_model(cached), base, context=0)


def test_the_cheapest_plan_of_the_base_is_the_base() -> None:
    base = get_scheme("w4a4")
    model_places = [Place(0, input_groups()[0], 10, {"x": 4.0})]
    plan = Knapsack(model_places, {"0.attention_input": {"x": 0.1}}).solve(4.0)
    scheme = build_scheme(base, plan, model_places, {"0.attention_input": {"x": base.default_linear}})
    assert scheme == base
