"""The linear schemes that the kernels' tests run, by name."""

from atom.quant.presets import get_scheme
from atom.quant.schemes import LinearScheme
from atom.quant.switches import Switches


def linear_scheme(name: str) -> LinearScheme:
    """What the linears of a preset run; `w4a4-bf16` has bfloat16 scales of its groups instead of factors."""
    preset, _, scales = name.partition("-")
    switches = Switches(group_scales="bf16") if scales else Switches()
    return switches.apply(get_scheme(preset)).for_linear("x")
