"""Distillation: the student is the checkpoint, gradients reach it, and what is written predicts better."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atom.calibration.config import CalibrationConfig
from atom.calibration.data import load_windows
from atom.calibration.distill import distill_checkpoint, load_distill_text
from atom.calibration.latent import REST, rest_of
from atom.calibration.report import Report
from atom.calibration.scaled_rows import ScaledRows, has_scaled_rows
from atom.calibration.stream import quantize_model
from atom.calibration.student import Student
from atom.calibration.trainable import TrainableColumns
from atom.checkpoint import read_scheme
from atom.errors import CalibrationError
from atom.models.generate import scheme_cache
from atom.models.loader import load_model
from atom.models.source import load_tokenizer, open_source
from atom.quant.granularity import Channel, Group
from atom.quant.keys import prepare_keys
from atom.quant.mixed import quantize_weight
from atom.quant.presets import PRESETS, get_scheme
from atom.quant.rotation import rotate
from atom.quant.rounding import dequantize, expand_scale, fake_quantize, quantize
from atom.quant.schemes import RotationSpec, TensorSpec

Tiny = Callable[[str], Path]
Close = Callable[[Path, Path], float]
SPECS = {
    "int4": TensorSpec("int4", Group(32), clip=0.85, scale_rule="range"),
    "int4-asymmetric": TensorSpec("int4", Group(32), symmetric=False),
    "int4-signed": TensorSpec("int4", Group(32), clip="mse", scale_rule="signed"),
    "int4-signed-e4m3": TensorSpec("int4", Group(32), scale_rule="signed", scale_format="e4m3", outer="tensor"),
    "int8-channel": TensorSpec("int8", Channel(), scale_format="fp32"),
    "int4-two-level": TensorSpec("int4", Group(32), scale_format="uint4", outer="channel"),
    "nvfp4": PRESETS["nvfp4"].weight,
    "mxfp4": PRESETS["mxfp4"].weight,
    "fp8": PRESETS["fp8"].weight,
}


@pytest.mark.parametrize("name", SPECS)
def test_columns_start_as_they_were_rounded_and_learn(name: str) -> None:
    spec = SPECS[name]
    assert spec is not None
    rounded = quantize(torch.randn(24, 80, generator=torch.Generator().manual_seed(0)), spec)
    columns = TrainableColumns(rounded, spec, learns_codes=True)
    torch.testing.assert_close(columns.values(), dequantize(rounded, spec), rtol=1e-6, atol=0)
    assert torch.equal(columns.quantized().codes, rounded.codes)
    # Towards another weight: codes and scales move, and what would be stored is what ran.
    start = dequantize(rounded, spec)
    target = 0.5 * start + 0.5 * start.roll(1, 1)
    rate = 0.005 * columns.latent.detach().abs().max().item()  # of the grid's reach
    optimizer = torch.optim.Adam([{"params": [columns.latent], "lr": rate}, {"params": [columns.log_factor]}], lr=0.005)
    losses = []
    for _ in range(100):
        loss = (columns.values() - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    torch.testing.assert_close(dequantize(columns.quantized(), spec), columns.values().detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", ["w4a4", "w4a8-hadamard", "nvfp4"])
def test_codes_start_where_the_weights_were(scheme: str, tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    """Latents round to the codes, and most of them are the weight in units of the grid."""
    chosen = get_scheme(scheme)
    linear = chosen.default_linear
    assert linear.weight is not None
    weight = torch.randn(24, 160, generator=torch.Generator().manual_seed(0))
    found = quantize_weight(weight, linear)
    rest = rest_of(weight, found, linear)
    assert rest is not None
    columns = TrainableColumns(found.normal, linear.weight, True, rest)
    assert torch.equal(columns.quantized().codes, found.normal.codes)
    normal, _ = linear.split(160)
    exact = weight[:, :normal] if linear.rotation is None else rotate(weight[:, :normal], linear.rotation)
    size = expand_scale(found.normal.scale.effective, normal, linear.weight)
    close = (columns.latent.detach() * size - exact).abs() < 1e-2 * size + 1e-3
    assert float(close.float().mean()) > 0.9
    config = replace(quick, distill_steps=2, distill_windows=20, distill_codes=True)
    quantize_model(tiny("llama"), chosen, tmp_path / "out", config)
    assert not any(name.endswith(REST) for name in open_source(tmp_path / "out").names())
    load_model(tmp_path / "out")


def test_whole_factors_stay_and_the_scale_above_them_learns() -> None:
    spec = SPECS["int4-two-level"]
    assert spec is not None
    rounded = quantize(torch.randn(24, 80, generator=torch.Generator().manual_seed(0)), spec)
    columns = TrainableColumns(rounded, spec)
    assert not columns.latent.requires_grad and columns.log_factor.shape == (24, 1)
    before = columns.values()
    before.square().sum().backward()
    torch.testing.assert_close(columns.log_factor.grad, 2 * before.detach().square().sum(1, keepdim=True))
    with torch.no_grad():
        columns.log_factor += 0.3
    after = columns.quantized()
    assert torch.equal(after.scale.scale, rounded.scale.scale) and torch.equal(after.codes, rounded.codes)
    torch.testing.assert_close(columns.values(), before * torch.tensor(0.3).exp())
    torch.testing.assert_close(dequantize(after, spec), columns.values().detach())


@pytest.mark.parametrize("name", ["int8-channel", "int4-two-level", "int3-two-level"])
def test_rows_scaled_behind_the_product_learn_as_the_weight_does(name: str) -> None:
    two_level = TensorSpec("int3", Group(32), scale_format="uint4", outer="channel", scale_rule="range")
    spec = {**SPECS, "int3-two-level": two_level}[name]
    assert spec is not None
    draw = torch.Generator().manual_seed(0)
    rounded, x = quantize(torch.randn(24, 80, generator=draw), spec), torch.randn(9, 80, generator=draw)
    assert has_scaled_rows(rounded, spec)
    found = []
    for columns in (TrainableColumns(rounded, spec), ScaledRows(rounded, spec)):
        with torch.no_grad():
            columns.log_factor += 0.3 * torch.randn(columns.log_factor.shape, generator=draw.manual_seed(1))
        own = x.clone().requires_grad_()
        y = columns.product(own)
        y.sin().sum().backward()
        found.append((y.detach(), own.grad, columns.log_factor.grad, dequantize(columns.quantized(), spec)))
    for plain, scaled in zip(*found, strict=True):
        assert plain is not None and scaled is not None
        torch.testing.assert_close(scaled, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheme", ["w4a4", "w4a8"])
def test_a_student_whose_codes_stay_is_the_checkpoint(
    scheme: str, tiny: Tiny, quick: CalibrationConfig, tmp_path: Path
) -> None:
    quantize_model(tiny("llama-biased"), get_scheme(scheme), tmp_path / "out", quick)
    source = open_source(tmp_path / "out")
    found = read_scheme(source.config)
    assert found is not None
    student = Student(source, found, torch.device("cpu"))
    assert any(isinstance(module, ScaledRows) for module in student.model.modules())
    loaded = load_model(tmp_path / "out")
    tokens = torch.arange(60).view(20, 3)
    with torch.no_grad():
        kv = scheme_cache(loaded, 20)
        expected = loaded(tokens.flatten(), kv.positions(3), kv)
        error = (student.hidden(tokens) - expected).norm(dim=1) / expected.norm(dim=1)
    assert float((error < 1e-5).float().mean()) > 0.5 and float(error.max()) < 0.2  # where no code of an input fell
    for name, tensor in student.tensors(1):  # to the other side
        torch.testing.assert_close(tensor.float(), source.get(name).float())


@pytest.mark.parametrize(
    ("model", "scheme", "recent"),
    [
        ("llama", "w4a4", 0),
        ("llama-biased", "w4a8", 16),
        ("qwen2", "nvfp4", 0),
        ("qwen3", "w4a16+kv4", 0),
        ("gemma3", "nvint4", 0),
    ],
)
def test_the_student_is_the_checkpoint(
    model: str, scheme: str, recent: int, tiny: Tiny, quick: CalibrationConfig, tmp_path: Path
) -> None:
    chosen = replace(get_scheme(scheme), rotation=RotationSpec("block_hadamard", 16), kv_recent=recent)
    quantize_model(tiny(model), chosen, tmp_path / "out", quick)
    source = open_source(tmp_path / "out")
    found = read_scheme(source.config)
    assert found is not None
    student = Student(source, found, torch.device("cpu"), learns_codes=True)
    loaded = load_model(tmp_path / "out")
    tokens = torch.arange(60).view(2, 30)
    with torch.no_grad():
        kv = scheme_cache(loaded, 2)
        expected = loaded(tokens.flatten(), kv.positions(30), kv)
        is_close = torch.isclose(student.hidden(tokens), expected, rtol=1e-3, atol=1e-3).all(-1).view(2, 30)
    # a value at half a step may fall to the other side on another CPU, and all that follows in its sequence differs
    assert bool(is_close.all(1).any()) and float(is_close.float().mean()) > 0.5
    student.hidden(tokens).square().sum().backward()
    learning = student.parameters()
    assert len(learning.codes) == len(learning.factors) >= 7 * 3 and learning.plain
    for parameter in [*learning.codes, *learning.factors, *learning.plain]:
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all())
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in learning.codes if parameter.grad is not None)


@pytest.mark.parametrize(("scheme", "codes"), [("w4a4", False), ("w4a4", True), ("nvfp4", True)])
def test_distillation_brings_predictions_closer(
    scheme: str, codes: bool, tiny: Tiny, logit_error: Close, quick: CalibrationConfig, tmp_path: Path
) -> None:
    plain = quantize_model(tiny("llama"), get_scheme(scheme), tmp_path / "rounded", quick)
    config = replace(quick, distill_steps=40, distill_windows=60, distill_rate=0.003, distill_codes=codes)
    report = quantize_model(tiny("llama"), get_scheme(scheme), tmp_path / "out", config)
    found = report.distilled
    assert found is not None and plain.distilled is None
    assert found["steps"] == 40 and found["kl_after"] < 0.97 * found["kl_before"]
    assert logit_error(tmp_path / "out", tiny("llama")) < 1.02 * logit_error(tmp_path / "rounded", tiny("llama"))
    assert Report.read(tmp_path / "out") == report
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in (tmp_path / "rounded").iterdir()}
    assert not (tmp_path / "out.rounded").exists()


def test_the_first_key_is_on_the_grid_again(tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    """A layer's mean first key, less the centre, is a point of the grid of the cache, whatever was learned."""
    quantize_model(tiny("llama"), get_scheme("w4a4"), tmp_path / "out", quick)
    source = open_source(tmp_path / "out")
    scheme = read_scheme(source.config)
    assert scheme is not None and scheme.kv is not None
    student = Student(source, scheme, torch.device("cpu"))
    with torch.no_grad():
        for parameter in student.parameters().factors:
            parameter += 0.05
    tokens = torch.arange(8).view(8, 1)
    student.recentre(tokens)
    seen: list[torch.Tensor] = []
    for layer in student.model.model.decoder_layers():
        layer.self_attn.k_proj.register_forward_hook(lambda module, args, k: seen.append(k))
    with torch.no_grad():
        student.hidden(tokens)
    for layer, k in zip(student.model.model.decoder_layers(), seen, strict=True):
        centre = layer.self_attn.key_centre
        assert centre is not None
        first = k.unflatten(-1, centre.shape[-2:]).mean(0)  # at position 0 RoPE turns nothing
        keys = prepare_keys(first, centre, scheme.rotates_keys)
        torch.testing.assert_close(fake_quantize(keys, scheme.kv), keys, rtol=1e-3, atol=1e-4)


def test_under_a_low_bit_cache_alone_attention_learns(
    tiny: Tiny, logit_error: Close, quick: CalibrationConfig, tmp_path: Path
) -> None:
    scheme, quick = (
        get_scheme("bf16+kv4"),
        replace(quick, rotate="none"),
    )  # turned, there is hardly an error to learn from
    quantize_model(tiny("llama-biased"), scheme, tmp_path / "rounded", quick)
    config = replace(quick, distill_steps=60, distill_windows=60)
    report = quantize_model(tiny("llama-biased"), scheme, tmp_path / "out", config)
    assert report.distilled is not None and report.distilled["kl_after"] < 0.95 * report.distilled["kl_before"]
    before, after = (open_source(tmp_path / name) for name in ("rounded", "out"))
    changed = {n.split(".", 3)[-1] for n in before.names() if not torch.equal(before.get(n), after.get(n))}
    assert {"self_attn.v_proj.weight", "self_attn.v_proj.bias"} <= changed and not any(
        name.startswith("mlp.") for name in changed
    )


def test_the_time_limit_cuts_steps(tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    config = replace(quick, distill_steps=500, distill_seconds=0.5, distill_windows=20)
    report = quantize_model(tiny("llama"), get_scheme("w8a8"), tmp_path / "out", config)
    assert report.distilled is not None and 5 <= report.distilled["steps"] < 200


def test_a_checkpoint_that_did_not_gain_stays_as_it_was(tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    quantize_model(tiny("llama"), get_scheme("w4a4"), tmp_path / "rounded", quick)
    config = replace(quick, distill_steps=12, distill_windows=20, distill_rate=3.0)  # far too fast
    report = quantize_model(tiny("llama"), get_scheme("w4a4"), tmp_path / "out", config)
    assert report.distilled is not None and report.distilled["kl_after"] > report.distilled["kl_before"]
    for path in (tmp_path / "rounded").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_texts_to_distil_on_come_in_equal_shares(tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    """Another text than calibration's, by its tokens, beside calibration's own; each has its part held back."""
    other = tmp_path / "other.txt"
    other.write_text("zz yy xx ww " * 400)
    tokenizer = load_tokenizer(tiny("llama"))
    config = replace(quick, distill_windows=10, distill_calib=(quick.calib, str(other)))
    windows = load_windows(quick.calib, tokenizer, 2, quick.window_length, 0)
    found = load_distill_text(tokenizer, config, windows)
    assert found.training.shape == (10, quick.window_length) and found.held_back.shape == (2, quick.window_length)
    own = load_distill_text(tokenizer, replace(config, distill_calib=(), distill_windows=5), windows)
    assert torch.equal(found.training[:5], own.training) and torch.equal(found.held_back[:1], own.held_back)
    known = set(load_windows(str(other), tokenizer, 1, quick.window_length, 0).tokens.flatten().tolist())
    assert set(found.training[5:].flatten().tolist()) == known == set(found.held_back[1:].flatten().tolist())
    assert CalibrationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_distilled_w4a4_checkpoint_has_the_kernels_format(
    tiny: Tiny, quick: CalibrationConfig, tmp_path: Path
) -> None:
    """Names, dtypes and shapes as before; codes, factors and orders are the same bytes, scales of rows are not."""
    quantize_model(tiny("llama"), get_scheme("w4a4"), tmp_path / "rounded", quick)
    config = replace(quick, distill_steps=12, distill_windows=20)
    quantize_model(tiny("llama"), get_scheme("w4a4"), tmp_path / "out", config)
    before, after = open_source(tmp_path / "rounded"), open_source(tmp_path / "out")
    assert sorted(before.names()) == sorted(after.names())
    moved = set()
    for name in before.names():
        a, b = before.get(name), after.get(name)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        if not torch.equal(a, b):
            moved.add(name.rpartition(".")[2] if "_proj" in name else "norm" if "norm" in name else name)
    assert {"weight_channel_scale", "outlier_scale", "norm"} <= moved
    assert moved <= {"weight_channel_scale", "outlier_scale", "norm", "bias"} | {
        f"model.layers.{i}.self_attn.key_centre" for i in range(3)
    }


def test_the_device_may_be_left_to_torch(tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    """By a run from the model, and where a rounded checkpoint alone is distilled."""
    config = replace(quick, device="auto", distill_steps=2, distill_windows=20)
    report = quantize_model(tiny("llama"), get_scheme("w4a4"), tmp_path / "out", config)
    assert report.distilled is not None and report.distilled["steps"] == 2
    source = open_source(tiny("llama"))
    windows = load_windows(quick.calib, load_tokenizer(source.path), 2, quick.window_length, 0)
    text = load_distill_text(load_tokenizer(source.path), config, windows)
    assert distill_checkpoint(source, tmp_path / "out", tmp_path / "twice", text, config).steps == 2


def test_a_gpu_that_is_too_small_after_all_leaves_the_rounded_checkpoint(
    tiny: Tiny, quick: CalibrationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    monkeypatch.setattr("atom.calibration.stream.distill_checkpoint", fail)
    config = replace(quick, distill_steps=2, distill_windows=20)
    with pytest.raises(CalibrationError, match=r"Tried to allocate 20.00 GiB.\); .*out.rounded holds the checkpoint"):
        quantize_model(tiny("llama"), get_scheme("w4a4"), tmp_path / "out", config)
    assert load_model(tmp_path / "out.rounded") is not None
    monkeypatch.undo()
    report = quantize_model(tiny("llama"), get_scheme("w4a4"), tmp_path / "out", config, resume=True)
    assert report.distilled is not None and not (tmp_path / "out.rounded").exists()
