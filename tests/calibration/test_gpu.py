"""Calibration on a GPU: the recorded column steps equal the plain ones, and the result equals the CPU's."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atom.calibration.columns import Block, ColumnRounder, round_columns
from atom.calibration.config import CalibrationConfig
from atom.calibration.gptq import gptq
from atom.calibration.stream import quantize_model
from atom.quant.granularity import Channel
from atom.quant.mixed import dequantize_weight
from atom.quant.presets import PRESETS, get_scheme
from atom.quant.rounding import choose_scale

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
QUANTIZED = [name for name, scheme in PRESETS.items() if scheme.weight is not None]


@pytest.mark.parametrize("name", QUANTIZED)
def test_recorded_steps_are_the_plain_ones(name: str) -> None:
    """Twice with different numbers: a recording that kept the first ones would show."""
    spec = PRESETS[name].weight
    assert spec is not None
    by_row = replace(spec, granularity=Channel())
    rounder = ColumnRounder()
    for seed in (0, 1):
        draw = torch.Generator("cuda").manual_seed(seed)
        W = torch.randn(128, 40, device="cuda", generator=draw)
        R = torch.randn(128, 128, device="cuda", generator=draw).mul(0.05).triu(1) + torch.eye(128, device="cuda")
        outer = None if spec.outer is None else choose_scale(W.T, spec).outer
        outer = None if outer is None else outer.expand(40, 1).contiguous()
        group = spec.group_size if spec.group_size is not None else None
        scale = None if group is not None else choose_scale(W.T, by_row)
        block = Block(W, R, by_row, group, scale, outer)
        recorded = rounder(block)
        plain = round_columns(replace(block, W=W.clone()))
        assert torch.equal(recorded.codes.view(torch.uint8), plain.codes.view(torch.uint8))
        assert torch.equal(recorded.error, plain.error)
        assert all(torch.equal(a.scale, b.scale) for a, b in zip(recorded.scales, plain.scales, strict=True))


@pytest.mark.parametrize("name", QUANTIZED)
def test_gptq_equals_the_cpu(name: str) -> None:
    linear = PRESETS[name].default_linear
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 400, generator=draw)
    x = torch.randn(1600, 400, generator=draw) @ (torch.eye(400) + 0.05 * torch.randn(400, 400, generator=draw))
    H = 2.0 / len(x) * (x.T @ x)
    (here,) = gptq([weight], H.clone(), linear)
    (there,) = gptq([weight.cuda()], H.cuda(), linear)
    a, b = dequantize_weight(here, linear), dequantize_weight(there, linear).cpu()
    assert ((a - b).abs() < 1e-5).float().mean() > 0.97  # a tie may fall either way, and later columns follow it
    losses = [float(((weight - w) @ H * (weight - w)).sum()) for w in (a, b)]
    if linear.rotation is None:
        assert losses[0] == pytest.approx(losses[1], rel=0.03)


@pytest.mark.parametrize("offload", ["on", "off"])
def test_whole_model(
    offload: str,
    tiny: Callable[[str], Path],
    logit_error: Callable[[Path, Path], float],
    quick: CalibrationConfig,
    tmp_path: Path,
) -> None:
    config = replace(quick, device="cuda", offload=offload, distill_steps=0)
    report = quantize_model(tiny("llama"), get_scheme("w4a4"), tmp_path / "out", config)
    assert logit_error(tmp_path / "out", tiny("llama")) < 0.17
    assert report.totals["peak_gpu_bytes"] > 0
