"""When a rounded checkpoint is trained without being asked to."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atom.calibration.config import CalibrationConfig
from atom.calibration.distill_plan import CACHE_STEPS, DEFAULT_STEPS, distill_bytes, plan_distillation
from atom.calibration.progress import Silent
from atom.calibration.report import Report
from atom.calibration.stream import quantize_model
from atom.models.family import model_config
from atom.models.loader import meta_model
from atom.models.model import Model
from atom.quant.presets import get_scheme

from .test_estimate import LLAMA_8B, SMALL

Tiny = Callable[[str], Path]
GIB = 2**30
CONFIG = CalibrationConfig()


def model(raw: dict[str, Any]) -> Model:
    return meta_model(model_config(raw))


@pytest.mark.parametrize("scheme", ["w4a4", "w4a8", "w4a16", "nvfp4", "mxfp4", "nvint4", "w3a3", "bf16+kv4"])
def test_low_bit_weights_or_a_low_bit_cache_alone_are_trained_on_a_gpu(scheme: str) -> None:
    found, why = plan_distillation(model(SMALL), get_scheme(scheme), CONFIG, 80 * GIB)
    assert (found.distill_steps, why) == (CACHE_STEPS if scheme == "bf16+kv4" else DEFAULT_STEPS, None)


@pytest.mark.parametrize("scheme", ["w8a8", "fp8", "bf16", "bf16+kv8", "w8a8+kv4"])
def test_others_are_not_and_nothing_is_said(scheme: str) -> None:
    for free in (None, 80 * GIB):
        found, why = plan_distillation(model(SMALL), get_scheme(scheme), CONFIG, free)
        assert (found.distill_steps, why) == (0, None)


def test_a_cpu_and_a_small_gpu_leave_it_out_and_say_why() -> None:
    found, why = plan_distillation(model(SMALL), get_scheme("w4a4"), CONFIG, None)
    assert (found.distill_steps, why) == (0, "on a CPU it takes hours")
    found, why = plan_distillation(model(LLAMA_8B), get_scheme("w4a4"), CONFIG, 24 * GIB)
    assert found.distill_steps == 0 and why is not None
    assert why.startswith("it needs ") and why.endswith(" GiB, the GPU has 24 GiB free")


@pytest.mark.parametrize("steps", [0, 3])
def test_what_was_asked_for_stays(steps: int) -> None:
    asked = replace(CONFIG, distill_steps=steps)
    assert plan_distillation(model(LLAMA_8B), get_scheme("w4a4"), asked, None) == (asked, None)


def test_memory_of_8b() -> None:
    """Both models in float32 are 64 GB; codes that learn add four times the layers, attention's weights theirs."""
    w4a4, cache = get_scheme("w4a4"), get_scheme("bf16+kv4")
    scales = distill_bytes(model(LLAMA_8B), w4a4, CONFIG)
    codes = distill_bytes(model(LLAMA_8B), w4a4, replace(CONFIG, distill_codes=True))
    assert 64e9 < scales < 100e9
    assert codes - scales == pytest.approx(16 * 6.98e9, rel=0.01)
    assert distill_bytes(model(LLAMA_8B), cache, CONFIG) - scales == pytest.approx(16 * 1.34e9, rel=0.01)


def test_a_run_on_a_cpu_says_it(tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    remarks: list[str] = []

    class Listening(Silent):
        def remark(self, text: str) -> None:
            remarks.append(text)

    quantize_model(tiny("llama"), get_scheme("w4a4"), tmp_path / "out", quick, progress=Listening())
    assert remarks == [
        "distillation is left out: on a CPU it takes hours (--distill-steps 100 insists, 0 is silent)",
    ]
    report = Report.read(tmp_path / "out")
    assert report.config["distill_steps"] == 0 and report.distilled is None
