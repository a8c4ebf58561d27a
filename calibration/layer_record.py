"""What the report says of one layer: how far weights and outputs went by rounding, and what its inputs are like."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool1d

from atom.quant.mixed import MixedWeight, dequantize_weight
from atom.quant.rotation import rotate
from atom.quant.schemes import LinearScheme

from .observe import Sample
from .plan import InputPlan

ENERGY_BINS = 64  # channel energies in the report: the largest in each of so many runs of adjacent channels


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; 0 for two zeros."""
    size = float(torch.linalg.vector_norm(expected.float()))
    return float(torch.linalg.vector_norm(found.float() - expected.float())) / size if size else 0.0


def weight_error(weight: Tensor, found: MixedWeight, linear: LinearScheme) -> float:
    if linear.rotation is not None:
        normal, _ = linear.split(weight.shape[1])
        weight = torch.cat((rotate(weight[:, :normal], linear.rotation), weight[:, normal:]), 1)
    return relative_error(dequantize_weight(found, linear), weight)


def linear_errors(
    plans: list[InputPlan],
    before: Sample,
    after: Sample,
    weights: dict[str, float],
    factors: dict[str, Tensor],
) -> dict[str, dict[str, Any]]:
    rows = {name: plan.perm for plan in plans if plan.perm is not None for name in plan.group.fold_into_rows}
    records = {}
    for name, expected in before.linears.items():
        if name in factors:
            expected = expected * factors[name]
        if name in rows:
            expected = expected[:, rows[name]]
        records[name] = {
            "weight_error": weights.get(name, 0.0),
            "output_error": relative_error(after.linears[name], expected),
        }
    return records


def input_record(plan: InputPlan, energy: Tensor) -> dict[str, Any]:
    """What the report says of an input: its outlier channels' share of the energy, and the energies themselves."""
    ordered = energy if plan.perm is None else energy[plan.perm]
    _, outliers = plan.linear.split(energy.numel()) if plan.is_quantized else (0, 0)
    total = float(energy.sum())
    return {
        "channels": energy.numel(),
        "outliers": outliers,
        "outlier_share": float(ordered[energy.numel() - outliers :].sum()) / total if total else 0.0,
        "max_over_median": float(energy.max() / energy.median().clamp_min(1e-30)),
        "energy": _bins(energy),
        "energy_ordered": _bins(ordered),
    }


def _bins(energy: Tensor) -> list[float]:
    pooled = adaptive_max_pool1d(energy[None, None], min(ENERGY_BINS, energy.numel()))
    return [float(f"{value:.4g}") for value in pooled.flatten().tolist()]
