"""True-sequential rounding: each input group is calibrated on what the rounded ones before it give."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atom.calibration.config import CalibrationConfig
from atom.calibration.stream import quantize_model
from atom.models.shards import Shards
from atom.quant.presets import get_scheme

Tiny = Callable[[str], Path]
Close = Callable[[Path, Path], float]


@pytest.mark.parametrize("scheme", ["w4a4+kv16", "nvfp4"])
def test_only_later_groups_change(
    scheme: str, tiny: Tiny, logit_error: Close, quick: CalibrationConfig, tmp_path: Path
) -> None:
    config = replace(quick, clip="constant")
    quantize_model(tiny("llama"), get_scheme(scheme), tmp_path / "at-once", config)
    quantize_model(tiny("llama"), get_scheme(scheme), tmp_path / "in-turn", replace(config, true_sequential=True))
    at_once, in_turn = Shards(tmp_path / "at-once"), Shards(tmp_path / "in-turn")
    same = {
        linear: torch.equal(at_once.get(name), in_turn.get(name))
        for linear in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
        for name in [f"model.layers.0.{linear}.weight_packed"]
    }
    assert same == {
        "self_attn.q_proj": True,
        "self_attn.o_proj": False,
        "mlp.gate_proj": False,
        "mlp.down_proj": False,
    }
    errors = [logit_error(tmp_path / name, tiny("llama")) for name in ("at-once", "in-turn")]
    assert errors[1] < 1.1 * errors[0]


def test_without_gptq_it_changes_nothing(tiny: Tiny, quick: CalibrationConfig, tmp_path: Path) -> None:
    rounding = replace(quick, gptq=False, clip="constant")
    for name, config in (("a", rounding), ("b", replace(rounding, true_sequential=True))):
        quantize_model(tiny("llama"), get_scheme("w4a4"), tmp_path / name, config)
    name = "model.layers.2.mlp.down_proj.weight_packed"
    assert torch.equal(Shards(tmp_path / "a").get(name), Shards(tmp_path / "b").get(name))
