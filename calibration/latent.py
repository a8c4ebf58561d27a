"""Where a code that learns starts: the weight in steps of its grid, not the code it was rounded to.

A code moves once its latent value has crossed the middle to the next code. Latents that start at the codes are all half
a step away from it; those that start at the weight are not, and the nearest to a middle are those whose rounding costs
the least to turn over. Where GPTQ chose another code than the nearest, the latent starts at that code's edge.
Between rounding and training it travels as a tensor of its own beside the codes, and is gone afterwards.
"""

import torch
from torch import Tensor

from atom.quant.formats import Format, get_format
from atom.quant.mixed import MixedWeight
from atom.quant.rotation import rotate
from atom.quant.rounding import code_values, expand_scale
from atom.quant.schemes import LinearScheme

REST = "weight_rest"  # float16 [N, normal columns], in units of the grid
EDGE = 0.01  # of the way to the next code's middle that is left


def rest_of(weight: Tensor, found: MixedWeight, linear: LinearScheme) -> Tensor | None:
    """What rounding left of the normal columns of weight [N, K], ordered as the checkpoint's, in units of the grid.

    None for codes under zero points and for 8-bit floats.
    """
    spec = linear.weight
    assert spec is not None
    grid = _grid(get_format(spec.format))
    if grid is None or not spec.symmetric:
        return None
    normal, _ = linear.split(weight.shape[1])
    columns = weight[:, :normal].float()
    if linear.rotation is not None:
        columns = rotate(columns, linear.rotation)
    scale = expand_scale(found.normal.scale.effective, normal, spec)
    values = code_values(found.normal.codes, get_format(spec.format))
    rest = columns / torch.where(scale == 0, 1.0, scale) - values
    grid = grid.to(values.device)
    place = torch.searchsorted(grid, values)
    gaps = grid.diff()
    half = torch.cat((gaps[:1], gaps, gaps[-1:])) * (1 - EDGE) / 2  # below and above each value; at the ends alike
    return rest.clamp(-half[place], half[place + 1]).half()


def _grid(fmt: Format) -> Tensor | None:
    """All values of a format, ascending."""
    if fmt.is_integer:
        low, high = fmt.code_range(True)
        return torch.arange(low, high + 1).float()
    if fmt.name == "e2m1":
        values: Tensor = code_values(torch.arange(16, dtype=torch.uint8), fmt).unique()
        return values
    return None
