"""RoPE by its properties; its frequencies are compared with transformers' in test_families.py."""

import pytest
import torch

from atom.errors import UnsupportedError
from atom.models.rope import Rope, RopeConfig

CONFIGS = {
    "default": RopeConfig(theta=100.0),
    "linear": RopeConfig("linear", 100.0, 4.0),
    "dynamic": RopeConfig("dynamic", 100.0, 4.0, original_max_positions=8),
    "yarn": RopeConfig("yarn", 100.0, 4.0, 16),
    "llama3": RopeConfig("llama3", 100.0, 8.0, 16),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_depend_on_distance_alone(name: str) -> None:
    rope = Rope(CONFIGS[name], 16)
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    length = torch.tensor([40])

    def score(i: int, j: int) -> float:
        turned = [rope(torch.tensor([at]), length).apply(x) for x, at in ((q, i), (k, j))]
        return float((turned[0] * turned[1]).sum())

    assert score(7, 3) == pytest.approx(score(30, 26), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-2)


@pytest.mark.parametrize("name", CONFIGS)
def test_position_zero_turns_nothing(name: str) -> None:
    x = torch.randn(1, 3, 16)
    turned = Rope(CONFIGS[name], 16)(torch.tensor([0])).apply(x)
    torch.testing.assert_close(turned, x * CONFIGS[name].attention_factor)


def test_linear_is_a_slower_clock() -> None:
    plain, slow = Rope(CONFIGS["default"], 16), Rope(CONFIGS["linear"], 16)
    torch.testing.assert_close(slow(torch.tensor([8])).cos, plain(torch.tensor([2])).cos)


def test_dynamic_ntk_knows_each_sequences_length() -> None:
    """Tokens of a packed batch turn as they would alone; up to the pretrained length nothing is stretched."""
    rope = Rope(CONFIGS["dynamic"], 16)
    alone = [rope(torch.arange(length)) for length in (5, 8, 31)]
    positions = torch.cat([rotation.positions for rotation in alone])
    lengths = torch.cat([torch.full_like(rotation.positions, len(rotation.positions)) for rotation in alone])
    packed = rope(positions, lengths)
    torch.testing.assert_close(packed.cos, torch.cat([rotation.cos for rotation in alone]))
    torch.testing.assert_close(packed.sin, torch.cat([rotation.sin for rotation in alone]))
    plain = Rope(CONFIGS["default"], 16)
    torch.testing.assert_close(alone[1].cos, plain(torch.arange(8)).cos)
    assert not torch.allclose(alone[2].cos, plain(torch.arange(31)).cos)


def test_no_tokens() -> None:
    assert Rope(CONFIGS["dynamic"], 16)(torch.empty(0, dtype=torch.int64)).cos.shape == (0, 8)


def test_odd_heads_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="head_dim 15 is odd"):
        Rope(CONFIGS["default"], 15)
