"""The full-precision model in the form in which calibration rounds it: what a budget measures losses on.

Values turned, inputs balanced, the keys' factors folded, as the base asks for: the same function from other weights.
What rounding loses hangs on all of them.
"""

from dataclasses import replace

import torch
from torch import Tensor

from atom.models.device import choose_device
from atom.models.loader import load_source
from atom.models.model import Model
from atom.models.source import Source
from atom.quant.schemes import Scheme

from .clock import Clock
from .config import CalibrationConfig
from .hidden import HiddenStates
from .layer import LayerQuantizer
from .plan import plan_layer
from .rotated import rotate_source


@torch.no_grad()
def load_prepared(source: Source, base: Scheme, tokens: Tensor, config: CalibrationConfig) -> Model:
    """The model of `source` in float32, its layers as they are prepared for `base` from tokens [windows, length].

    They see what full precision gives. Raises as rotate_source does.
    """
    device = torch.device(choose_device(config.device))
    windows, length = tokens.shape
    config = replace(config.for_scheme(base), windows=windows, window_length=length)
    if config.rotate != "none":
        source = rotate_source(source, config.seed, device, values_alone=config.rotate == "values")
    model = load_source(source, device, torch.float32, "reference")
    quantizer = LayerQuantizer(source, model, base, config, device, Clock(device))
    embedded = model.model.embed(tokens.flatten().to(device))
    hidden = HiddenStates(embedded.view(windows, length, -1), config.windows_per_batch, device)
    for index, layer in enumerate(model.model.decoder_layers()):
        quantizer.prepare(layer, index, plan_layer(model.family, base, index), hidden)
        for number in range(len(hidden)):
            hidden.put(number, quantizer.runner.run(layer, hidden, number, None))
    return model
