"""Random numbers by counter: a draw is a function of (seed, sample, index of the output token, candidate) alone.

No generator has a state that a batch, a preemption or another request could move, so a request with a seed gets the
same tokens alone, in any batch and on any device, up to the rounding of its logits. The mixing function is SplitMix64
(Steele, Lea, Flood 2014): a bijection of 64 bits that passes the usual test batteries when fed with a counter.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd: steps of a Weyl sequence
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SALTS = (0x6A09E667F3BCC908, 0xBB67AE8584CAA73B)  # digits of the roots of 2 and 3: 0 is a fixed point of `mix`, and
# seeds and candidates must not run through the same sequence
_MASK = 2**64 - 1
_LOG_RANGE = 52 * math.log(2) + 2e-14  # a little more than any logarithm that is taken from it, whatever its rounding


def mix(value: int) -> int:
    """SplitMix64's finalizer of an integer modulo 2**64."""
    value &= _MASK
    value = (value ^ (value >> 30)) * _MULTIPLIERS[0] & _MASK
    value = (value ^ (value >> 27)) * _MULTIPLIERS[1] & _MASK
    return value ^ (value >> 31)


def sample_seed(seed: int, sample: int) -> int:
    """The 64-bit seed of a request's sample number `sample`."""
    return mix(mix(seed + _SALTS[0]) + sample * GOLDEN)


def step_keys(seeds: NDArray[np.uint64], indices: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Keys [S] of the draws of output tokens `indices` of sequences with `seeds`."""
    with np.errstate(over="ignore"):
        value = seeds + indices * np.uint64(GOLDEN)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(_MULTIPLIERS[0])
        value = (value ^ (value >> np.uint64(27))) * np.uint64(_MULTIPLIERS[1])
        keys: NDArray[np.uint64] = value ^ (value >> np.uint64(31))
    return keys


def counters(number: int, device: torch.device) -> Tensor:
    """int64 [number], what `log_exponential` adds to a key for each candidate."""
    return torch.tensor([_signed(mix(place * GOLDEN + _SALTS[1])) for place in range(number)], device=device)


def log_exponential(keys: Tensor, counters: Tensor) -> Tensor:
    """Logarithms of standard exponential variables, float64 [S, C], for keys int64 [S] and counters int64 [C].

    argmax(log p - log_exponential) is distributed as p (their negatives are Gumbel variables). 52 bits each. Shifts
    keep the sign, which is one kernel less than masking it off and mixes as well.
    """
    value = keys[:, None] + counters
    value = (value ^ (value >> 32)).mul_(_signed(_MULTIPLIERS[0]))
    value = (value ^ (value >> 29)).mul_(_signed(_MULTIPLIERS[1]))
    value = (value >> 12).bitwise_and_(2**52 - 1)
    return (_LOG_RANGE - value.to(torch.float64).add_(0.5).log_()).log_()


def _signed(value: int) -> int:
    """The int64 of the same bits."""
    return value - 2**64 if value >= 2**63 else value
