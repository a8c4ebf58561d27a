"""The same models on a GPU: the torch reference there equals the CPU."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from atom.models.generate import scheme_cache
from atom.models.loader import load_model
from atom.models.model import Model
from atom.quant.presets import get_scheme

from .random_models import CONFIGS, quantized_state, random_model, save_state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TOKENS = torch.randint(0, 61, (26,), generator=torch.Generator().manual_seed(5))


def logits(model: Model) -> Tensor:
    kv = scheme_cache(model, batch=2)
    with torch.inference_mode():
        first = model(TOKENS.view(2, 13)[:, :9].flatten().to(model.device), kv.positions(9), kv)
        second = model(TOKENS.view(2, 13)[:, 9:].flatten().to(model.device), kv.positions(4), kv)
        return model.logits(torch.cat((first, second))).cpu()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", ["bf16", "w4a16", "nvint4"])
def test_gpu_equals_cpu(name: str, family: str, tmp_path: Path) -> None:
    model, scheme = random_model(CONFIGS[family]), get_scheme(name)
    state, _, _ = quantized_state(model, scheme)
    model.scheme = scheme
    path = save_state(state, model, tmp_path / "model")
    on_cpu, on_gpu = logits(load_model(path)), logits(load_model(path, device="cuda", kernels="reference"))
    # the sums run in another order; where that tips a rounding, one step of one value shows in the logits
    close = torch.isclose(on_gpu, on_cpu, atol=1e-3, rtol=1e-3).float().mean()
    assert close > 0.95
