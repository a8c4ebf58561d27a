"""Activation clips measured by the output error of the linears behind them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atom.calibration.clips import CANDIDATES, Measured, measured_groups, probe_windows
from atom.calibration.config import CalibrationConfig
from atom.calibration.data import load_windows
from atom.calibration.stream import quantize_model
from atom.commands.quantize import Options
from atom.models.family import model_config
from atom.models.generate import scheme_cache
from atom.models.loader import load_model, meta_model
from atom.models.source import load_tokenizer, open_source
from atom.quant.granularity import Token
from atom.quant.permutation import energy_order
from atom.quant.presets import PRESETS, get_scheme
from atom.quant.rounding import fake_quantize
from atom.quant.schemes import LinearScheme, OutlierSpec, Override, Scheme
from atom.quant.switches import Switches

Tiny = Callable[[str], Path]
W4A4 = replace(get_scheme("w4a4"), outliers=OutlierSpec(32))
KINDS = ["attention_input", "o_input", "mlp_input", "down_input"]


def clip_of(scheme: Scheme, name: str) -> object:
    activation = scheme.for_linear(name).activation
    return None if activation is None else activation.clip


def output_error(folder: Path, tokens: Tensor, kind: str, clip: float) -> float:
    """How far rounding one kind of input moves the outputs of its linears, mean over tokens and layers."""
    model = load_model(folder)
    assert W4A4.activation is not None
    normal = replace(W4A4.activation, clip=clip)
    last = W4A4.outliers.spec(Token(), True)
    assert last is not None
    seen: dict[tuple[int, str], Tensor] = {}
    for index, layer in enumerate(model.model.decoder_layers()):
        for group in model.family.groups:

            def watch(module: object, args: object, x: Tensor, key: tuple[int, str] = (index, group.name)) -> None:
                seen[key] = x

            layer.get_submodule(group.producer).register_forward_hook(watch)
    count, length = tokens.shape
    kv = scheme_cache(model, count, length)
    with torch.no_grad():
        model(tokens.flatten(), kv.positions(length), kv)
    errors = []
    for index, layer in enumerate(model.model.decoder_layers()):
        group = next(g for g in model.family.groups if g.name == kind)
        x = seen[index, kind]
        order = energy_order(x.square().mean(0))
        rounded = torch.empty_like(x)
        rounded[:, order] = torch.cat(
            (fake_quantize(x[:, order[:-32]], normal), fake_quantize(x[:, order[-32:]], last)), 1
        )
        w = torch.cat([layer.get_submodule(name).weight for name in group.linears])  # type: ignore[misc]
        errors.append((((rounded - x) @ w.T).square().sum(1) / (x @ w.T).square().sum(1)).mean())
    return float(torch.stack(errors).mean())


def test_errors_are_what_plain_hooks_find_and_the_least_is_taken(
    tiny: Tiny, quick: CalibrationConfig, tmp_path: Path
) -> None:
    report = quantize_model(tiny("qwen2"), W4A4, tmp_path / "out", replace(quick, gptq=False))
    assert report.clips is not None and list(report.clips["chosen"]) == KINDS
    windows = load_windows(quick.calib, load_tokenizer(tiny("qwen2")), 10, 48, 0)
    tokens = probe_windows(windows.tokens)
    assert report.clips["tokens"] == tokens.numel() == 48
    for kind, clip in (("down_input", 0.8), ("attention_input", 0.9), ("o_input", 1.0), ("mlp_input", 0.75)):
        expected = output_error(tiny("qwen2"), tokens, kind, clip)
        assert report.clips["errors"][kind][str(clip)] == pytest.approx(expected, rel=1e-3)
    for kind, found in report.clips["errors"].items():
        assert list(found) == [str(c) for c in CANDIDATES]
        if kind != "down_input":
            assert found[str(report.clips["chosen"][kind])] == min(found.values()) > 0.0
    assert report.clips["chosen"]["down_input"] == 1.0  # though its error would have it clipped:
    assert min(report.clips["errors"]["down_input"], key=report.clips["errors"]["down_input"].__getitem__) != "1.0"


def test_the_checkpoint_runs_what_was_chosen(tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    report = quantize_model(tiny("llama"), W4A4, tmp_path / "out", quick)
    assert report.clips is not None
    model = load_model(tmp_path / "out")
    assert model.scheme is not None and model.scheme.to_dict() == report.scheme
    assert set(report.clips["chosen"].values()) != {0.9}  # the scheme's constant: nothing would be shown below
    for index in range(3):
        for group in model.family.groups:
            for linear in group.linears:
                name = f"model.layers.{index}.{linear}"
                assert clip_of(model.scheme, name) == report.clips["chosen"][group.name]
                module = model.get_submodule(name)
                assert module.scheme == model.scheme.for_linear(name)


def test_a_constant_is_left_alone(tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    report = quantize_model(tiny("llama"), W4A4, tmp_path / "out", replace(quick, clip="constant"))
    assert report.clips is None and report.scheme == W4A4.to_dict()
    with pytest.raises(ValueError, match="clip must be measured or constant, got 'guessed'"):
        CalibrationConfig(clip="guessed")  # type: ignore[arg-type]


def test_a_clip_that_is_given_is_not_measured() -> None:
    assert Options("m").config.clip == "measured"
    assert Options("m", switches=Switches(activation_clip=0.9)).config.clip == "constant"
    assert Options("m", switches=Switches(weight_clip=0.85)).config.clip == "measured"


@pytest.mark.parametrize("name", PRESETS)
def test_only_schemes_that_clip_are_measured(name: str, tiny: Tiny) -> None:
    model = meta_model(model_config(open_source(tiny("llama")).config))
    found = [group.name for group in measured_groups(model, get_scheme(name))]
    assert found == (KINDS if name in ("w4a4", "w3a3") else [])


def test_own_overrides_stay(tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    """A kind of input that an override touches keeps its clips; the others are measured around it."""
    own = Override("model.layers.1.mlp.down_proj", LinearScheme())
    report = quantize_model(tiny("llama"), replace(W4A4, overrides=(own,)), tmp_path / "out", quick)
    assert report.clips is not None and list(report.clips["chosen"]) == KINDS[:3]
    scheme = load_model(tmp_path / "out").scheme
    assert scheme is not None and scheme.overrides[0] == own
    assert clip_of(scheme, "model.layers.0.mlp.down_proj") == 0.9


def test_overrides_are_written_only_where_they_differ(tiny: Tiny) -> None:
    model = meta_model(model_config(open_source(tiny("llama")).config))
    chosen = {"attention_input": 0.9, "o_input": 0.8, "mlp_input": 0.9, "down_input": 1.0}
    scheme = Measured(chosen, {}, 1).apply(W4A4, model.family.groups)
    assert [o.pattern for o in scheme.overrides] == ["*.self_attn.o_proj", "*.mlp.down_proj"]
    assert clip_of(scheme, "model.layers.2.mlp.down_proj") == 1.0
    assert Scheme.from_dict(scheme.to_dict()) == scheme


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((128, 2048), (16, 128)), ((16, 512), (10, 128)), ((4, 300), (1, 128)), ((1, 8), (1, 8)), ((10, 48), (1, 48))],
)
def test_probe_windows(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    assert tuple(probe_windows(torch.zeros(shape)).shape) == expected


def test_a_resumed_run_measures_once(
    tiny: Tiny, quick: CalibrationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from atom.calibration import layer

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(layer.LayerQuantizer, "quantize", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantize_model(tiny("llama"), W4A4, tmp_path / "out", quick)
    monkeypatch.setattr("atom.calibration.clips.ClipProbe.measure", interrupt)
    report = quantize_model(tiny("llama"), W4A4, tmp_path / "out", quick, resume=True)
    assert report.clips is not None and report.clips["seconds"] > 0
