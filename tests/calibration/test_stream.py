"""The whole chain on tiny random models: every preset and switch, resume after a kill, bad input."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import atom
from atom.calibration.config import CalibrationConfig
from atom.calibration.progress import Silent
from atom.calibration.report import Report
from atom.calibration.stream import quantize_model
from atom.errors import AtomError, CalibrationError, CheckpointError, UnsupportedError
from atom.quant.granularity import Channel, Group, Token
from atom.quant.presets import PRESETS, get_scheme
from atom.quant.schemes import LinearScheme, OutlierSpec, Override, RotationSpec, Scheme, TensorSpec
from atom.quant.switches import Switches

Tiny = Callable[[str], Path]
Close = Callable[[Path, Path], float]
INT4_W = TensorSpec("int4", Group(32), clip=0.85, scale_rule="range")
INT4_A = TensorSpec("int4", Group(32), dynamic=True, clip=0.9)
INT8_A = TensorSpec("int8", Token(), dynamic=True)

# Largest relative error of the logits against full precision, on a random model whose directions all count alike:
# about 1.3 times what is measured, so that a broken permutation or scale (error near 1) does not pass.
PRESET_ERRORS = {
    "w4a4": 0.17,
    "w4a8": 0.15,
    "w4a4-hadamard": 0.23,
    "w4a8-hadamard": 0.12,
    "w4a16": 0.12,
    "w8a8": 0.04,
    "fp8": 0.08,
    "nvfp4": 0.27,
    "mxfp4": 0.38,
    "nvint4": 0.32,
    "w3a3": 0.27,
    "bf16": 1e-6,
}


def weights(folder: Path) -> dict[str, bytes]:
    """Every file of a checkpoint but the report, whose times differ from run to run."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "atom_report.json"}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads_and_is_close(
    name: str, tiny: Tiny, logit_error: Close, quick: CalibrationConfig, tmp_path: Path
) -> None:
    source, out = tiny("llama"), tmp_path / "out"
    report = quantize_model(source, get_scheme(name), out, quick)
    assert logit_error(out, source) < PRESET_ERRORS[name]
    assert Report.read(out) == report
    assert not (tmp_path / "out.partial").exists()
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= {p.name for p in out.iterdir()}


@pytest.mark.parametrize("suffix", ["kv4", "kv8", "kvfp8", "kv16"])
def test_kv_formats(suffix: str, tiny: Tiny, logit_error: Close, quick: CalibrationConfig, tmp_path: Path) -> None:
    quantize_model(tiny("llama"), get_scheme(f"w8a8+{suffix}"), tmp_path / "out", quick)
    assert logit_error(tmp_path / "out", tiny("llama")) < 0.11


@pytest.mark.parametrize("name", ["llama-biased", "qwen2", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("pre_rope", [False, True])
def test_families(
    name: str, pre_rope: bool, tiny: Tiny, logit_error: Close, quick: CalibrationConfig, tmp_path: Path
) -> None:
    scheme = Switches(kv_pre_rope=pre_rope).apply(get_scheme("w4a4"))
    quantize_model(tiny(name), scheme, tmp_path / "out", quick)
    assert logit_error(tmp_path / "out", tiny(name)) < 0.31


SWITCHES: dict[str, Scheme] = {
    "no outliers": Scheme("x", INT4_W, INT4_A),
    "reorder alone": Scheme("x", INT4_W, INT4_A, reorder=True),
    "bf16 outliers": Scheme("x", INT4_W, INT4_A, outliers=OutlierSpec(16, "bf16"), reorder=True),
    "fp8 outliers": Scheme("x", INT4_W, INT4_A, outliers=OutlierSpec(48, "fp8_e4m3"), reorder=True),
    "channel and token": Scheme(
        "x",
        TensorSpec("int4", Channel()),
        TensorSpec("int4", Token(), dynamic=True),
        outliers=OutlierSpec(16),
        reorder=True,
    ),
    "mse clip": Scheme("x", replace(INT4_W, clip="mse"), INT4_A),
    "asymmetric": Scheme("x", replace(INT4_W, symmetric=False, clip=1.0, scale_rule="max"), INT8_A),
    "block rotation": Scheme("x", INT4_W, INT4_A, rotation=RotationSpec("block_hadamard", 32)),
    "rotation and outliers": Scheme(
        "x", INT4_W, INT4_A, None, OutlierSpec(16), RotationSpec("block_hadamard", 16), reorder=True
    ),
    "weight only, reordered": Scheme("x", INT4_W, reorder=True),
    "kv only": Scheme("x", kv=get_scheme("w4a4").kv),
    "an override": Scheme(
        "x", INT4_W, INT4_A, overrides=(Override("*.down_proj", LinearScheme(TensorSpec("int8", Channel()), INT8_A)),)
    ),
    "a layer left alone": Scheme("x", INT4_W, INT4_A, overrides=(Override("model.layers.0.*", LinearScheme()),)),
    "down left alone": Scheme("x", INT4_W, INT4_A, reorder=True, overrides=(Override("*.down_proj", LinearScheme()),)),
    "only down": Scheme(
        "x", overrides=(Override("*.down_proj", LinearScheme(INT4_W, INT4_A, OutlierSpec(16), None, True)),)
    ),
    "unlike weights of one input": Scheme(
        "x", INT4_W, INT8_A, overrides=(Override("*.v_proj", LinearScheme(TensorSpec("int8", Channel()), INT8_A)),)
    ),
}


@pytest.mark.parametrize("gptq", [True, False], ids=["gptq", "rtn"])
@pytest.mark.parametrize("name", SWITCHES)
def test_switches(
    name: str, gptq: bool, tiny: Tiny, logit_error: Close, quick: CalibrationConfig, tmp_path: Path
) -> None:
    quantize_model(tiny("llama"), SWITCHES[name], tmp_path / "out", replace(quick, gptq=gptq))
    assert logit_error(tmp_path / "out", tiny("llama")) < 0.45


def test_full_rotation_needs_a_hadamard_order(
    tiny: Tiny, logit_error: Close, quick: CalibrationConfig, tmp_path: Path
) -> None:
    scheme = Scheme("x", INT4_W, INT4_A, rotation=RotationSpec("hadamard"))  # 192 = 12 * 16, and 280 = 140 * 2
    quantize_model(tiny("llama"), scheme, tmp_path / "out", quick)
    assert logit_error(tmp_path / "out", tiny("llama")) < 0.3


def test_gptq_and_outliers_help(tiny: Tiny, logit_error: Close, quick: CalibrationConfig, tmp_path: Path) -> None:
    """The steps that must show on any model: outlier channels, groups, and GPTQ over rounding to nearest."""
    token = TensorSpec("int4", Token(), dynamic=True)
    steps = {
        "rtn": (Scheme("x", TensorSpec("int4", Channel()), token), False),
        "outliers": (
            Scheme("x", TensorSpec("int4", Channel()), token, outliers=OutlierSpec(16), reorder=True),
            False,
        ),
        "groups": (Scheme("x", INT4_W, INT4_A, outliers=OutlierSpec(16), reorder=True), False),
        "gptq": (Scheme("x", INT4_W, INT4_A, outliers=OutlierSpec(16), reorder=True), True),
    }
    errors = []
    for name, (scheme, gptq) in steps.items():
        quantize_model(tiny("llama"), scheme, tmp_path / name, replace(quick, gptq=gptq))
        errors.append(logit_error(tmp_path / name, tiny("llama")))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.9 * errors[0]


def test_what_is_not_quantized_is_copied(tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    source = tiny("llama")
    quantize_model(source, get_scheme("w4a4"), tmp_path / "out", quick)
    before = load_file(source / "model.safetensors")
    after = {k: v for shard in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(shard).items()}
    for name in before.keys() & after.keys():
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name], after[name]), name
    assert {n for n in before if "proj" not in n} <= after.keys()


def test_report_says_what_happened(tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    report = quantize_model(tiny("llama"), get_scheme("w4a4"), tmp_path / "out", quick)
    calibration = report.provenance["calibration"]
    assert calibration["data"] == "words.txt"
    assert (calibration["windows"], calibration["window_length"]) == (10, 48)
    assert len(calibration["tokens_sha256"]) == 64
    assert report.provenance["versions"]["torch"] == torch.__version__
    assert [layer["layer"] for layer in report.layers] == [0, 1, 2]
    layer = report.layers[0]
    assert set(layer["seconds"]) == {"stats", "hessian", "gptq", "propagate", "io", "total"}
    assert set(layer["linears"]) == {f"self_attn.{p}_proj" for p in "qkvo"} | {
        f"mlp.{p}_proj" for p in ("gate", "up", "down")
    }
    assert all(0.0 < e["weight_error"] < 0.2 and 0.0 < e["output_error"] < 0.5 for e in layer["linears"].values())
    attention = layer["inputs"]["attention_input"]
    assert attention["outliers"] == 128
    assert attention["energy_ordered"] == sorted(attention["energy_ordered"])
    assert 0.5 < attention["outlier_share"] <= 1.0


class Interrupt(Silent):
    """Stops a run at a layer, as a progress display that raises."""

    def __init__(self, at: int) -> None:
        self.at = at

    def layer(self, index: int, total: int, doing: str) -> None:
        if index == self.at:
            raise KeyboardInterrupt


KILLED = """
import os, signal, sys, json
from pathlib import Path
import atom.calibration.layer as layer
from atom.calibration.config import CalibrationConfig
from atom.calibration.progress import Silent
from atom.calibration.stream import quantize_model
from atom.quant.presets import get_scheme

source, out, config = sys.argv[1:]
propagate = layer.LayerQuantizer.propagate
runs = []

def kill_in_the_third_layer(self, *args):
    runs.append(None)
    if len(runs) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return propagate(self, *args)

layer.LayerQuantizer.propagate = kill_in_the_third_layer
quantize_model(source, get_scheme("w4a4"), Path(out), CalibrationConfig.from_dict(json.loads(config)))
"""


def test_resume_after_a_kill_is_bit_identical(tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    source, out, whole = tiny("llama"), tmp_path / "out", tmp_path / "whole"
    root = Path(atom.__file__).parent.parent
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(out), json.dumps(quick.to_dict())],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    partial = tmp_path / "out.partial"
    assert len(list(partial.glob("*.safetensors"))) == 3  # what lies outside the layers, and two layers
    with pytest.raises(CheckpointError, match="unfinished run; pass --resume"):
        quantize_model(source, get_scheme("w4a4"), out, quick)
    with pytest.raises(CheckpointError, match=r"another run .*'seed': 1.*same options"):
        quantize_model(source, get_scheme("w4a4"), out, replace(quick, seed=1), resume=True)
    report = quantize_model(source, get_scheme("w4a4"), out, quick, resume=True)
    quantize_model(source, get_scheme("w4a4"), whole, quick)
    assert weights(out) == weights(whole)
    assert [layer["layer"] for layer in report.layers] == [0, 1, 2]


@pytest.mark.parametrize("at", [0, 1])
def test_resume_after_an_interrupt(at: int, tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    source = tiny("gemma3")
    with pytest.raises(KeyboardInterrupt):
        quantize_model(source, get_scheme("nvint4"), tmp_path / "out", quick, progress=Interrupt(at))
    quantize_model(source, get_scheme("nvint4"), tmp_path / "out", quick, resume=True)
    quantize_model(source, get_scheme("nvint4"), tmp_path / "whole", quick)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_self_calibration_is_seeded(tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    config = replace(quick, calib="self", windows=6, window_length=40)
    reports = [
        quantize_model(tiny("llama"), get_scheme("w4a4"), tmp_path / str(i), replace(config, seed=seed))
        for i, seed in enumerate([0, 0, 1])
    ]
    hashes = [report.provenance["calibration"]["tokens_sha256"] for report in reports]
    assert hashes[0] == hashes[1] != hashes[2]
    assert weights(tmp_path / "0") == weights(tmp_path / "1")


def broken(source: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a model with some tensors changed."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    state = load_file(source / "model.safetensors")
    change(state)
    save_file(state, target / "model.safetensors", {"format": "pt"})
    return target


def put_nan(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        state[name].view(-1)[3] = float("nan")

    return change


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight", "model.embed_tokens.weight"]
)
def test_nan_weights_are_named(name: str, tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    source = broken(tiny("llama"), tmp_path / "nan", put_nan(name))
    with pytest.raises(CheckpointError, match=rf"{name} holds NaN or infinity.*finite weights.*download"):
        quantize_model(source, get_scheme("w4a4"), tmp_path / "out", quick)


def test_overflowing_activations_name_the_layer(tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        state["model.layers.1.mlp.up_proj.weight"].fill_(3e38)

    source = broken(tiny("llama"), tmp_path / "huge", change)
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.mlp\.act .*down_proj.* not finite"):
        quantize_model(source, get_scheme("w4a4"), tmp_path / "out", quick)


def test_missing_tensor_is_named(tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    def drop(state: dict[str, Tensor]) -> None:
        del state["model.layers.1.mlp.up_proj.weight"]

    source = broken(tiny("llama"), tmp_path / "less", drop)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        quantize_model(source, get_scheme("w4a4"), tmp_path / "out", quick)


@pytest.mark.parametrize("scheme", ["w4a4", "bf16"])
def test_missing_tokenizer(scheme: str, tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    source = broken(tiny("llama"), tmp_path / "mute", lambda s: None)
    for path in source.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer.*copy the tokenizer files"):
        quantize_model(source, get_scheme(scheme), tmp_path / "out", quick)


def test_output_not_empty(tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty; choose another"):
        quantize_model("someone/not-even-looked-for", get_scheme("w4a4"), tmp_path / "out", quick)


def test_full_disk(
    tiny: Tiny, logit_error: Close, quick: CalibrationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk ends the run with the remedy, and the run can be resumed."""
    import safetensors.torch

    save = safetensors.torch.save_file
    calls = []

    def fill(*args: Any, **kwargs: Any) -> None:
        calls.append(None)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", fill)
    with pytest.raises(CheckpointError, match=r"the disk is full; free some space, then continue with --resume"):
        quantize_model(tiny("llama"), get_scheme("w4a4"), tmp_path / "out", quick)
    quantize_model(tiny("llama"), get_scheme("w4a4"), tmp_path / "out", quick, resume=True)
    assert logit_error(tmp_path / "out", tiny("llama")) < 0.2


def test_quantized_source_is_refused(tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    quantize_model(tiny("llama"), get_scheme("bf16+kv8"), tmp_path / "one", quick)
    with pytest.raises(UnsupportedError, match=r"quantized already.*full-precision"):
        quantize_model(tmp_path / "one", get_scheme("w4a4"), tmp_path / "two", quick)


def test_too_many_outliers(tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    scheme = replace(get_scheme("w4a4"), outliers=OutlierSpec(192))
    with pytest.raises(ValueError, match="192 outlier channels do not fit in 192 inputs"):
        quantize_model(tiny("llama"), scheme, tmp_path / "out", quick)
    assert not (tmp_path / "out.partial").exists()


def test_overrides_must_agree_on_an_input(tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    scheme = replace(get_scheme("w4a16"), overrides=(Override("*.q_proj", LinearScheme()),))
    with pytest.raises(AtomError, match=r"q_proj.*one input"):
        quantize_model(tiny("llama"), scheme, tmp_path / "out", quick)


def test_unknown_device(tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the GPU that the test wants absent")
    with pytest.raises(UnsupportedError, match="torch sees no GPU; use --device cpu"):
        quantize_model(tiny("llama"), get_scheme("w4a4"), tmp_path / "out", replace(quick, device="cuda"))
