"""--scheme auto: the preset of a GPU that was measured, by its own name or by ours, and a refusal for others."""

import pytest
import torch

from atom.calibration.recommended import RECOMMENDED, recommended_scheme
from atom.commands.quantize import Options
from atom.errors import UnsupportedError
from atom.kernels.bounds import GPUS
from atom.quant.presets import get_scheme


def test_every_gpu_that_was_measured_has_one() -> None:
    assert set(RECOMMENDED) == set(GPUS)
    for gpu, name in RECOMMENDED.items():
        assert recommended_scheme(gpu) == name
        assert get_scheme(name).is_quantized


def test_this_machine_s_gpu_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert recommended_scheme(None) == RECOMMENDED["h200"]
    options = Options("models/m.gguf", scheme="auto+kv8")
    assert options.build_scheme() == get_scheme("w4a8-hadamard+kv8")
    assert str(options.directory) == "m-w4a8-hadamard-kv8"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    with pytest.raises(UnsupportedError, match=r"NVIDIA A100-SXM4-80GB; give --gpu h200 or h100"):
        recommended_scheme(None)


def test_a_gpu_is_for_auto_alone() -> None:
    assert Options("m", scheme="auto", gpu="h200").build_scheme().name == "w4a8-hadamard"
    with pytest.raises(ValueError, match="--gpu chooses what --scheme auto means"):
        Options("m", gpu="h200")


def test_a_budget_has_a_base_that_rotates_by_blocks() -> None:
    assert Options("m").preset == "w4a4"
    assert Options("m", budget=5.0).preset == Options("m", max_loss=0.1).preset == "w4a4-hadamard"
    assert Options("m", scheme="w4a8", budget=5.0).preset == "w4a8"
