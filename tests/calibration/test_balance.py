"""Balance changes no output, meets in the middle, and leaves less error behind Hadamard blocks; so does dealing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atom.calibration.balance import balance_layer_, choose_factors
from atom.calibration.config import CalibrationConfig
from atom.calibration.plan import plan_layer
from atom.calibration.report import Report
from atom.calibration.stream import quantize_model
from atom.models.kv import DenseKV
from atom.models.loader import load_model
from atom.quant.granularity import Group
from atom.quant.schemes import RotationSpec, Scheme, TensorSpec

Tiny = Callable[[str], Path]
Close = Callable[[Path, Path], float]
ROTATED = Scheme(
    "w4a4",
    TensorSpec("int4", Group(32), clip="mse"),
    TensorSpec("int4", Group(32), dynamic=True),
    rotation=RotationSpec("block_hadamard", 32),
    reorder=True,
)


@pytest.mark.parametrize("name", ["llama", "llama-biased", "qwen2", "qwen3", "gemma3"])
def test_a_balanced_layer_is_the_same_function(name: str, tiny: Tiny) -> None:
    model = load_model(tiny(name))
    layer = next(model.model.decoder_layers())
    plans = plan_layer(model.family, ROTATED, 0)
    generator = torch.Generator().manual_seed(0)
    sizes = {p.group.name: layer.get_submodule(p.group.linears[0]).in_features for p in plans}
    energies = {group: torch.rand(int(size), generator=generator) ** 4 + 1e-3 for group, size in sizes.items()}
    before = {group: energy.clone() for group, energy in energies.items()}
    x = torch.randn(12, 192, generator=generator)

    def run() -> torch.Tensor:
        kv = DenseKV(model.config)
        return layer(x, layer.rope(kv.positions(12)), kv)

    expected = run()
    rows = balance_layer_(layer, plans, energies, torch.bfloat16)
    torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-4)
    assert set(rows) == {"self_attn.v_proj", "mlp.up_proj"}
    for group in ("attention_input", "mlp_input"):
        gain = layer.get_submodule(next(p.group.producer for p in plans if p.group.name == group)).weight
        assert torch.equal(gain, gain.bfloat16().float())
        assert energies[group].log().std() < 0.8 * before[group].log().std()


def test_factors_bring_channels_and_columns_to_one_size() -> None:
    energy, sizes = torch.tensor([16.0, 1.0, 0.0, 81.0]), torch.tensor([1.0, 16.0, 5.0, 81.0])
    s = choose_factors(energy, sizes)
    ratio = (energy * s**2) / (sizes / s**2)
    assert s[2] == 1
    torch.testing.assert_close(ratio[[0, 1, 3]], ratio[0].expand(3))
    assert float(s[[0, 1, 3]].log().sum()) == pytest.approx(0, abs=1e-5)


def test_both_help_behind_hadamard_blocks(
    tiny: Tiny, logit_error: Close, quick: CalibrationConfig, tmp_path: Path
) -> None:
    base = replace(quick, clip="constant", balance=False, rotate="none")
    configs = {
        "ascending": base,
        "dealt": replace(base, order="dealt"),
        "balanced": replace(base, order="dealt", balance=True),
    }
    errors = {}
    for name, config in configs.items():
        quantize_model(tiny("llama"), ROTATED, tmp_path / name, config)
        errors[name] = logit_error(tmp_path / name, tiny("llama"))
    assert errors["dealt"] < errors["ascending"] and errors["balanced"] < errors["dealt"]
    linears = Report.read(tmp_path / "balanced").layers[0]["linears"]
    assert linears["mlp.up_proj"]["output_error"] < 0.3 and linears["self_attn.v_proj"]["output_error"] < 0.3
