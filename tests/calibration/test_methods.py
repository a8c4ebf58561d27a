"""Every method of the comparison quantizes, loads and predicts; what they are at bits is what the tables say."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

from atom.calibration.config import CalibrationConfig
from atom.calibration.methods import Bits, methods, with_cache
from atom.calibration.stream import quantize_model
from atom.circumstances import CHECKOUT
from atom.commands.quantize import Options
from atom.quant.presets import get_scheme

Tiny = Callable[[str], Path]
Close = Callable[[Path, Path], float]
WEIGHT_BITS = {
    "fp": 16.0,
    "rtn": 4.004,
    "atom": 4.25,
    "quarot": 4.125,
    "quarot-token": 4.004,
    "quarot-token-rtn": 4.004,
    "flatquant": 4.004,
    "flatquant-transforms": 4.004,
    "flatquant-rest": 4.004,
    "nvfp4-rtn": 4.5,
    "nvfp4-gptq": 4.5,
    "ours": 4.133,
}
COMPARED: tuple[Bits, ...] = ("w4a4", "w4a8")


@pytest.mark.parametrize("bits", COMPARED)
def test_bits_at_the_width_of_llama(bits: Bits) -> None:
    for name, method in methods(bits).items():
        assert round(method.scheme.weight_bits(4096), 3) == WEIGHT_BITS[name]
        if name != "fp":
            assert method.scheme.activation_bits(4096) < (4.52 if bits == "w4a4" else 8.02)
    assert set(WEIGHT_BITS) - set(methods(bits)) == (set() if bits == "w4a4" else {"nvfp4-rtn", "nvfp4-gptq"})
    assert methods("w4a4")["ours"].scheme.activation_bits(4096) < 4.14


@pytest.mark.parametrize("bits", COMPARED)
def test_each_writes_a_checkpoint_that_predicts(
    bits: Bits, tiny: Tiny, logit_error: Close, quick: CalibrationConfig, tmp_path: Path
) -> None:
    errors = {}
    for name, method in methods(bits).items():
        if method.learned or name == "fp":
            continue
        scheme = with_cache(method.scheme, "kv4")
        config = method.config(quick)
        config = replace(config, distill_steps=min(config.distill_steps or 0, 4), distill_windows=20)
        quantize_model(tiny("qwen2"), scheme, tmp_path / name, config)
        errors[name] = logit_error(tmp_path / name, tiny("qwen2"))
    assert errors["ours"] < errors["rtn"] and errors["atom"] < errors["rtn"] and max(errors.values()) < 0.8


def test_caches_are_compared_alone(tiny: Tiny, logit_error: Close, quick: CalibrationConfig, tmp_path: Path) -> None:
    errors = {}
    for name, method in methods("kv4").items():
        if name == "fp":
            continue
        assert method.scheme.kv == get_scheme("w4a4").kv and method.scheme.weight is None
        config = replace(method.config(quick), distill_windows=20)
        config = replace(config, distill_steps=min(config.distill_steps or 0, 40))
        quantize_model(tiny("qwen2"), method.scheme, tmp_path / name, config)
        errors[name] = logit_error(tmp_path / name, tiny("qwen2"))
    assert errors["ours"] < 0.95 * min(errors["rtn"], errors["atom"])


@pytest.mark.parametrize("bits", COMPARED)
def test_ours_can_be_said_on_the_command_line(bits: Bits) -> None:
    options = f"x --scheme {bits}-hadamard --distill-steps 2000"
    said = tyro.cli(Options, args=options.split())
    ours = methods(bits)["ours"]
    assert said.build_scheme() == with_cache(ours.scheme, "kv4")
    assert said.config == ours.config(CalibrationConfig())
    resolved = said.config.for_scheme(said.build_scheme())
    assert resolved.balance and resolved.rotate == "values"
    page = (CHECKOUT / "docs/accuracy-methods.md").read_text().replace("\\\n", " ")
    assert options.removeprefix("x ").replace("w4a8", "w4a4") in " ".join(page.split())
