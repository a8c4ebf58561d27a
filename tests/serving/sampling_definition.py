"""What sampling should do, token by token in float64: the definition that the sampler's tests compare with."""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from atom.serving.sampling_params import SamplingParams


def probabilities(
    logits: NDArray[np.float64],
    params: SamplingParams,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    forbidden: Collection[int] = (),
) -> NDArray[np.float64]:
    """Probability [V] of each token; greedy has 1 for the first of the largest.

    forbidden  tokens that a mask or min_tokens excludes
    """
    x = logits.astype(np.float64).copy()
    for token, bias in params.logit_bias:
        x[token] += bias
    x[list(forbidden)] = -np.inf
    for token in {*prompt, *output}:
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    if params.is_greedy:
        return np.eye(len(x))[int(x.argmax())]
    x /= params.temperature
    x -= x.max()
    kept = np.exp(x) >= params.min_p
    if params.top_k:
        kept &= x >= np.sort(np.where(kept, x, -np.inf))[::-1][min(params.top_k, len(x)) - 1]
    mass = np.where(kept, np.exp(x), 0.0)
    for value in np.unique(x[kept])[::-1]:
        if mass[x >= value].sum() >= params.top_p * mass.sum():
            kept &= x >= value
            break
    mass = np.where(kept, mass, 0.0)
    return np.asarray(mass / mass.sum())
