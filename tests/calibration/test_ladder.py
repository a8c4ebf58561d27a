"""The paper's ablation as schemes."""

from itertools import pairwise

import pytest

from atom.calibration.ladder import ladder, scaled_outliers
from atom.quant.presets import get_scheme
from atom.records import LADDER_STEPS


def test_steps_are_the_records_and_the_last_is_the_preset() -> None:
    steps = ladder()
    assert tuple(step.name for step in steps) == LADDER_STEPS
    assert steps[-1].scheme == get_scheme("w4a4") and steps[-1].gptq and steps[-1].distilled
    assert not steps[0].scheme.is_quantized


def test_each_step_changes_one_thing() -> None:
    """What differs between neighbours, by the scheme's own fields."""
    changed = []
    steps = ladder(64)
    for before, after in pairwise(steps[1:]):
        a, b = before.scheme.to_dict(), after.scheme.to_dict()
        changed.append({key for key in a if a[key] != b[key]})
    assert changed == [
        {"outliers", "reorder"},
        {"outliers"},
        {"weight", "activation"},
        {"weight", "activation"},
        {"weight", "activation"},  # our grids: whole factors under a float32
        {"kv", "kv_offset", "kv_rotation"},
        set(),
    ]
    assert [step.name for step in steps if step.distilled] == ["distill"]


@pytest.mark.parametrize(("hidden", "count"), [(4096, 128), (8192, 256), (576, 16), (896, 32), (2048, 64), (64, 16)])
def test_outliers_scaled_to_the_same_share(hidden: int, count: int) -> None:
    assert scaled_outliers(hidden) == count
