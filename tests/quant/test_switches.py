"""The recipe's steps as switches over a preset."""

from dataclasses import replace
from typing import Any

import pytest

from atom.quant.granularity import Channel, Group, Token
from atom.quant.presets import PRESETS, get_scheme
from atom.quant.schemes import OutlierSpec, RotationSpec, Scheme
from atom.quant.switches import Switches


@pytest.mark.parametrize("name", PRESETS)
def test_no_switch_changes_nothing(name: str) -> None:
    assert Switches().apply(get_scheme(name)) == get_scheme(name)


def test_group_size() -> None:
    found = Switches(group_size=64).apply(get_scheme("w4a4"))
    assert found.weight is not None and found.weight.granularity == Group(64)
    assert found.activation is not None and found.activation.granularity == Group(64)
    found = Switches(group_size=0).apply(get_scheme("w4a4"))
    assert found.weight is not None and found.weight.granularity == Channel()
    assert found.activation is not None and found.activation.granularity == Token()


def test_clips_and_grid() -> None:
    found = Switches(weight_clip="mse", activation_clip=0.8).apply(get_scheme("w4a4"), gptq=False)
    assert found.weight is not None and (found.weight.clip, found.weight.scale_rule) == ("mse", "max")
    assert found.activation is not None and found.activation.clip == 0.8


def test_outliers_bring_the_reordering() -> None:
    found = Switches(outliers=64, outlier_format="bf16").apply(get_scheme("w4a8"))
    assert found.outliers == OutlierSpec(64, "bf16") and found.reorder
    assert Switches(outliers=0).apply(get_scheme("w4a4")).outliers.count == 0
    with pytest.raises(ValueError, match="set reorder=True"):
        Switches(reorder=False).apply(get_scheme("w4a4"))


def test_rotation_and_pre_rope() -> None:
    found = Switches(rotation="block_hadamard", rotation_block=64, kv_pre_rope=True).apply(get_scheme("w4a4"))
    assert found.rotation == RotationSpec("block_hadamard", 64) and found.kv_pre_rope


@pytest.mark.parametrize(
    ("switches", "scheme", "message"),
    [
        ({"weight_clip": 0.9}, "bf16", "--weight-clip needs quantized weights, which bf16 has not"),
        ({"group_size": 64}, "bf16+kv4", "--group-size needs quantized weights"),
        ({"outliers": 16}, "bf16", "--outliers needs quantized weights"),
        ({"activation_clip": 0.9}, "w4a16", "--activation-clip needs quantized activations, which w4a16 has not"),
        ({"kv_pre_rope": True}, "w4a4+kv16", "--kv-pre-rope needs a quantized cache"),
        ({"outliers": 100}, "w4a4", "multiple of 16"),
        ({"group_size": -1}, "w4a4", "at least one column"),
    ],
)
def test_what_does_not_fit_is_refused(switches: dict[str, Any], scheme: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Switches(**switches).apply(get_scheme(scheme))


def test_what_is_asked_of_keys_turns_off_what_does_not_go_with_it() -> None:
    scheme = get_scheme("w4a4")
    assert (scheme.kv_offset, scheme.kv_rotation) == ("centre", "hadamard")
    before = Switches(kv_pre_rope=True).apply(scheme)
    assert (before.kv_offset, before.kv_rotation) == ("mean", "none")
    assert Switches(kv_offset="mean").apply(scheme).kv_rotation == "none"
    assert Switches(kv_offset="none").apply(scheme).kv_rotation == "hadamard"
    assert Switches(kv_rotation="none").apply(scheme).kv_offset == "centre"
    exact = Switches(kv_recent=16).apply(scheme)
    assert exact.kv_recent == 16 and Switches(kv_pre_rope=True).apply(exact).kv_recent == 0
    assert Switches().apply(exact) == exact and Switches(kv_recent=0).apply(exact) == scheme


def test_fast_sums_are_a_switch_of_fp8() -> None:
    found = Switches(fast_sums=True).apply(get_scheme("fp8"))
    assert found.for_linear("x").fast_sums and Scheme.from_dict(found.to_dict()) == found
    assert "fast_sums" not in get_scheme("fp8").to_dict()
    with pytest.raises(ValueError, match="needs FP8 weights, which w8a8 has not"):
        Switches(fast_sums=True).apply(get_scheme("w8a8"))
    with pytest.raises(ValueError, match="those of FP8 products"):
        replace(get_scheme("w8a8").for_linear("x"), fast_sums=True)
