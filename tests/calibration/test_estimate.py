"""The estimate of `atom check` against what was measured."""

from dataclasses import replace
from typing import Any

import pytest

from atom.calibration.config import CalibrationConfig
from atom.calibration.distill_plan import distill_bytes
from atom.calibration.estimate import GPUS, Machine, estimate, estimate_distillation, measure_machine
from atom.models.family import model_config
from atom.models.loader import meta_model
from atom.models.model import Model
from atom.quant.presets import get_scheme
from atom.quant.switches import Switches
from atom.records import read_record

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
SMALL = {**LLAMA_8B, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 2}
MACHINE = Machine("cpu", 1e11, 1e10, 1e-5)


def model(raw: dict[str, Any]) -> Model:
    return meta_model(model_config(raw))


def test_within_1_5_of_the_measured_8b_run() -> None:
    """Seconds and GPU memory of the record calibration-8b, made on the machine whose rates the table holds."""
    row = next(row for row in read_record("calibration-8b", "h200").rows if not row.get("distill_steps"))
    config = CalibrationConfig(windows=row["windows"], window_length=row["window"])
    found = estimate(model(LLAMA_8B), get_scheme(row["scheme"]), config, GPUS["h200"])
    assert 1 / 1.5 < found.seconds / row["seconds"] < 1.5
    assert 1 / 1.5 < found.peak_bytes / 1e9 / row["peak_gpu_gb"] < 1.5


def test_grows_with_text_and_layers_and_with_gptq() -> None:
    config = CalibrationConfig(windows=16, window_length=512)
    base = estimate(model(SMALL), get_scheme("w4a4"), config, MACHINE)
    twice = estimate(model(SMALL), get_scheme("w4a4"), replace(config, windows=32), MACHINE)
    deeper = estimate(model({**SMALL, "num_hidden_layers": 4}), get_scheme("w4a4"), config, MACHINE)
    rounded = estimate(model(SMALL), get_scheme("w4a4"), replace(config, gptq=False), MACHINE)
    assert base.seconds * 1.5 < twice.seconds < base.seconds * 2
    assert deeper.seconds == pytest.approx(base.seconds * 2)
    assert rounded.seconds < base.seconds and rounded.peak_bytes < base.peak_bytes
    assert deeper.peak_bytes == base.peak_bytes  # one layer at a time


def test_measuring_clips_and_searching_them_take_time() -> None:
    config = CalibrationConfig(windows=64, window_length=2048)
    measured, constant = (
        estimate(model(SMALL), get_scheme("w4a4"), c, MACHINE).seconds
        for c in (config, replace(config, clip="constant"))
    )
    assert constant < measured < 1.5 * constant  # seven products of 2048 tokens beside three of 131,072
    plain = Switches(weight_clip=0.85).apply(get_scheme("w4a4"))
    assert estimate(model(SMALL), plain, config, MACHINE).seconds < measured
    unclipped = estimate(model(SMALL), get_scheme("w8a8"), config, MACHINE)
    assert unclipped == estimate(model(SMALL), get_scheme("w8a8"), replace(config, clip="constant"), MACHINE)


def test_rates_of_this_machine_are_plausible() -> None:
    machine = measure_machine("cpu")
    assert 1e9 < machine.flops < 1e14 and 1e8 < machine.bytes_per_s < 1e13 and 0 < machine.op_s < 1e-2


def test_distillation_takes_time_by_steps_and_no_longer_than_allowed() -> None:
    config = CalibrationConfig(distill_steps=50, distill_tokens=4096)
    large, scheme, gpu = model(LLAMA_8B), get_scheme("w4a4"), GPUS["h200"]
    found = estimate_distillation(large, scheme, config, gpu)
    twice = estimate_distillation(large, scheme, replace(config, distill_steps=100), gpu)
    assert twice.seconds == pytest.approx(2 * found.seconds)
    assert found.peak_bytes == distill_bytes(large, scheme, config)
    limited = replace(config, distill_steps=10**6, distill_seconds=30.0)
    assert estimate_distillation(large, scheme, limited, gpu).seconds == 30.0
    small = estimate_distillation(model(SMALL), scheme, config, gpu)
    assert small.seconds < found.seconds / 10 and small.peak_bytes < found.peak_bytes / 5
