"""The linear schemes that the kernels' tests run, by name."""

from dataclasses import replace

from atom.quant.granularity import Group
from atom.quant.presets import PRESETS, get_scheme
from atom.quant.schemes import LinearScheme
from atom.quant.switches import Switches


def linear_scheme(name: str) -> LinearScheme:
    """What the linears of a preset run.

    `fp8-fast` leaves sums to the tensor cores; `w4a4-bf16` has bfloat16 scales of its groups instead of factors;
    `w4a8-g32` groups of 32, of its activations too if they have any.
    """
    if name in PRESETS:
        return get_scheme(name).for_linear("x")
    preset, _, more = name.partition("-")
    switches = Switches(group_scales="bf16" if more == "bf16" else None, fast_sums=more == "fast")
    linear = switches.apply(get_scheme(preset)).for_linear("x")
    if not more.startswith("g"):
        return linear
    group, activation = Group(int(more[1:])), linear.activation
    assert linear.weight is not None
    if activation is not None and activation.group_size is not None:
        activation = replace(activation, granularity=group)
    return replace(linear, weight=replace(linear.weight, granularity=group), activation=activation)


def gemm_schemes() -> dict[str, LinearScheme]:
    """What the GEMM's tests run: the linears of every preset, and groups of other sizes and scales."""
    names = [name for name in PRESETS if name != "bf16"]
    others = ("w4a4-bf16", "w4a16-bf16", "w4a4-g32", "w4a4-g64", "w4a8-g32", "fp8-fast")
    return {name: linear_scheme(name) for name in (*names, *others)}
