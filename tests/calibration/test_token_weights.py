"""Tokens of GPTQ's Hessians by the size of the residual stream that they add to."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atom.calibration.clock import Clock
from atom.calibration.config import CalibrationConfig, TokenWeights
from atom.calibration.hidden import HiddenStates
from atom.calibration.layer import LayerQuantizer
from atom.calibration.observe import observe_hessians
from atom.calibration.plan import plan_layer
from atom.models.config import ModelConfig
from atom.models.loader import meta_model
from atom.models.source import open_source
from atom.quant.presets import get_scheme

CPU = torch.device("cpu")


def test_a_token_on_a_loud_stream_counts_little(tiny: Callable[[str], Path], quick: CalibrationConfig) -> None:
    """Norms take the loudness out of what q, gate and their like see; o and down add to the loud stream."""
    source = open_source(tiny("llama"))
    model, scheme = meta_model(ModelConfig.from_hf(source.config, {})), get_scheme("w4a8+kv16")
    quantizer = LayerQuantizer(source, model, scheme, quick, CPU, Clock(CPU))
    layer, plans = quantizer.load(0), plan_layer(model.family, scheme, 0)
    states = torch.randn(2, 16, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    loud = states.clone()
    loud[1] *= 1e3

    def hessians(x: Tensor, tokens: TokenWeights) -> dict[str, Tensor]:
        hidden = HiddenStates(x.clone(), 2, CPU)
        found = observe_hessians(layer, 0, plans, hidden, quantizer.runner, scheme, None, tokens)
        return {name: sums.finish() for name, sums in found.items()}

    equal, relative = hessians(loud, "equal"), hessians(loud, "relative")
    quiet = hessians(states[:1], "relative")
    for name in ("attention_input", "mlp_input"):
        assert torch.equal(equal[name], relative[name])
    for name in ("o_input", "down_input"):
        assert torch.allclose(2 * relative[name], quiet[name], rtol=1e-2, atol=1e-2 * float(quiet[name].abs().max()))


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match="equal or relative"):
        CalibrationConfig(token_weights="loud")  # type: ignore[arg-type]
