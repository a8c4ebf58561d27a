import numpy as np
import pytest
import torch

from atom.serving.random import _LOG_RANGE, GOLDEN, counters, log_exponential, mix, sample_seed, step_keys


def test_mix_is_splitmix64() -> None:
    """The first outputs of the published generator with seed 1234567 (Vigna, splitmix64.c)."""
    state, outputs = 1234567, []
    for _ in range(3):
        state += GOLDEN
        outputs.append(mix(state))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_the_vectorised_forms_are_the_same_function() -> None:
    seeds = np.array([0, 1, 2**63, 2**64 - 1], dtype=np.uint64)
    indices = np.array([0, 7, 1, 2**40], dtype=np.uint64)
    keys = step_keys(seeds, indices)
    assert keys.tolist() == [mix(int(s) + int(i) * GOLDEN) for s, i in zip(seeds, indices, strict=True)]
    noise = log_exponential(torch.from_numpy(keys.view(np.int64)), counters(5, torch.device("cpu")))
    for row, key in enumerate(keys.tolist()):
        for c in range(5):
            value = (key + mix(c * GOLDEN + 0xBB67AE8584CAA73B)) % 2**64
            for shift, factor in ((32, 0xBF58476D1CE4E5B9), (29, 0x94D049BB133111EB)):
                sign = 0 if value < 2**63 else 2**64 - 2 ** (64 - shift)
                value = (value ^ ((value >> shift) + sign)) * factor % 2**64
            uniform = ((value >> 12) + 0.5) / 2**52
            assert noise[row, c].item() == pytest.approx(np.log(-np.log(uniform)), rel=1e-9)


def test_the_ends_of_the_range_are_numbers() -> None:
    for value in (0, 2**52 - 1):
        logarithm = torch.tensor([value], dtype=torch.float64).add_(0.5).log_()
        assert 0 < (_LOG_RANGE - logarithm).item() < 37


def test_noise_is_exponential_and_independent() -> None:
    """Against the distribution function, its mean and variance, and neighbours in seed, sample, index and candidate."""
    keys = np.stack(
        [
            step_keys(np.array([sample_seed(seed, sample)] * 50, dtype=np.uint64), np.arange(50, dtype=np.uint64))
            for seed in range(20)
            for sample in range(2)
        ]
    )
    assert len(np.unique(keys)) == keys.size
    noise = log_exponential(torch.from_numpy(keys.reshape(-1).view(np.int64)), counters(100, torch.device("cpu")))
    assert noise.isfinite().all()
    assert len(noise.unique()) == noise.numel(), "two draws share a number"
    uniform = (-noise.exp()).exp().flatten()
    number = len(uniform)
    distance = (uniform.sort().values - (torch.arange(number) + 0.5) / number).abs().max()
    assert distance < 1.95 / number**0.5  # Kolmogorov and Smirnov, 0.001
    cube = (-noise.exp()).exp().view(20, 2, 50, 100) - 0.5
    for axis in range(4):
        count = cube.shape[axis]
        product = (cube.narrow(axis, 0, count - 1) * cube.narrow(axis, 1, count - 1)).flatten()
        correlation = product.mean() * 12
        assert abs(correlation) < 4 / len(product) ** 0.5, f"neighbours along axis {axis} are correlated"
