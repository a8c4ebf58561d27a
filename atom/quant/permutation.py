"""Channel permutation: which channels share a group, and which are the outliers.

y = x[..., perm]. Atom sorts all channels ascending by energy (the mean square over the calibration tokens): the last
ones are the outlier channels, and each group holds channels of like size. Source: arXiv:2310.19102.
"""

import torch
from torch import Tensor


def energy_order(energy: Tensor) -> Tensor:
    """Permutation int64 [K] that sorts channels ascending by energy [K]; equal energies keep their order."""
    if not bool(torch.isfinite(energy).all()):
        raise ValueError("channel energies hold NaN or infinity; sorting needs finite ones. Check the calibration data")
    return torch.sort(energy, stable=True).indices


def dealt_order(energy: Tensor, block: int, outliers: int = 0) -> Tensor:
    """Permutation int64 [K] that deals loud channels out, one to each block of `block` columns, before any gets two.

    For rotations within blocks, which spread a loud channel over its own block alone: with the ascending order all loud
    channels meet in the last ones. The loudest `outliers` channels stay last, ascending; of the others the quietest
    fill what is left over when K is cut into blocks, and the rest are dealt back and forth, loudest first.
    """
    order = energy_order(energy)
    normal = order.numel() - outliers
    blocks = normal // block
    if blocks == 0:
        return order
    quiet = normal - blocks * block
    rows = order[quiet:normal].flip(0).view(block, blocks).clone()  # one row goes round the blocks
    rows[1::2] = rows[1::2].flip(1)
    return torch.cat((rows.T.flatten(), order[:quiet], order[normal:]))


def invert(perm: Tensor) -> Tensor:
    """The permutation that undoes perm [K]: y[..., invert(perm)] is x."""
    inverse = torch.empty_like(perm)
    inverse[perm.long()] = torch.arange(perm.numel(), dtype=perm.dtype, device=perm.device)
    return inverse


def check_permutation(perm: Tensor, K: int, name: str) -> None:
    """Raise ValueError unless perm holds each of 0..K-1 once."""
    if perm.shape != (K,):
        raise ValueError(f"{name} has shape {tuple(perm.shape)}, needed is ({K},), one index a channel; quantize again")
    if not torch.equal(torch.sort(perm.long()).values, torch.arange(K, device=perm.device)):
        raise ValueError(f"{name} is no permutation of 0..{K - 1}: an index is missing or doubled; quantize again")
