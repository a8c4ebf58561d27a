"""Balance between activations and weights: a factor per channel that the producer gains and the weight's column loses.

Behind a Hadamard block, what a channel adds to the rounding error of activations is shared by all channels of the
block, and so is what a weight column adds to that of weights. With r_j the root mean square of channel j and w_j the
norm of the columns that read it, either error in the output goes with

    (sum over the block of r_j^2 s_j^2) (sum over the block of w_j^2 / s_j^2)

for factors s_j on the channels, which is least at s_j^2 = w_j / r_j (Cauchy and Schwarz). The factors fold into what
produces the input: the gain of a norm, the rows of v (one factor for all query heads that share a value), those of up.
The function stays the same and run time pays nothing. SmoothQuant (arXiv:2211.10438) with its share of 1/2 has the
same form, with maxima for norms.
"""

import torch
from torch import Tensor, nn

from atom.models.layers import DecoderLayer
from atom.models.norm import RMSNorm

from .plan import InputPlan, linear_of

REACH = 64.0  # no factor is further than this from their geometric mean, either way


def balance_layer_(
    layer: DecoderLayer, plans: list[InputPlan], energies: dict[str, Tensor], norm_dtype: torch.dtype
) -> dict[str, Tensor]:
    """Fold the factors of every quantized input into the layer's weights, in place.

    energies    channel energies [K] of every input by its group's name; become those after folding
    norm_dtype  in which gains will be stored: factors are such that a gain is exact in it
    returns     the factors [N] on the rows of linears whose outputs changed, by name
    """
    rows: dict[str, Tensor] = {}
    for plan in plans:
        if not plan.is_quantized:
            continue
        energy = energies[plan.group.name]
        linears = [linear_of(layer, name) for name in plan.group.linears]
        sizes = torch.stack([linear.weight.square().sum(0) for linear in linears]).sum(0)
        producer = layer.get_submodule(plan.group.producer)
        if isinstance(producer, RMSNorm):
            gain = producer.gain()
            stored = (gain * choose_factors(energy, sizes) - producer.offset).to(norm_dtype).float()
            factors = torch.where(gain == 0, 1.0, (stored + producer.offset) / gain)
            producer.weight = nn.Parameter(torch.where(gain == 0, -producer.offset, stored), requires_grad=False)
        elif plan.group.fold_into_rows:
            name = plan.group.fold_into_rows[-1]  # up: the gate goes through its activation
            factors = rows[name] = choose_factors(energy, sizes)
            _scale_rows(linear_of(layer, name), factors)
        else:
            name = "self_attn.v_proj"
            head_dim = layer.self_attn.head_dim
            heads = linear_of(layer, name).weight.shape[0] // head_dim
            shared = [x.view(heads, -1, head_dim).sum(1).flatten() for x in (energy, sizes)]
            rows[name] = choose_factors(*shared)
            _scale_rows(linear_of(layer, name), rows[name])
            repeats = energy.numel() // (heads * head_dim)
            factors = rows[name].view(heads, 1, head_dim).expand(-1, repeats, -1).flatten()
        for linear in linears:
            linear.weight = nn.Parameter(linear.weight / factors, requires_grad=False)
        energies[plan.group.name] = energy * factors.square()
    return rows


def choose_factors(energy: Tensor, sizes: Tensor) -> Tensor:
    """s [K] with s^2 = w / r for energies r^2 and squared column norms w^2, their geometric mean 1.

    Channels that never fire, or that no weight reads, keep 1.
    """
    live = (energy > 0) & (sizes > 0)
    logs = torch.where(live, (sizes.clamp_min(1e-30).log() - energy.clamp_min(1e-30).log()) / 4, 0.0)
    mean = logs.sum() / live.sum().clamp_min(1)
    reach = torch.tensor(REACH).log().item()
    return torch.where(live, (logs - mean).clamp(-reach, reach), 0.0).exp()


def _scale_rows(linear: nn.Linear, factors: Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight * factors[:, None], requires_grad=False)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias * factors, requires_grad=False)
