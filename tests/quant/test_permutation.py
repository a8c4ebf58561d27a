"""Channel permutations: sorting by energy, inverse, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atom.quant.permutation import check_permutation, dealt_order, energy_order, invert


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 2.5, 7.0, 1e30]), max_size=40))
def test_order_is_stable_and_ascending_and_inverts(energies: list[float]) -> None:
    energy = torch.tensor(energies)
    perm = energy_order(energy)
    assert perm.tolist() == sorted(range(len(energies)), key=lambda i: (energies[i], i))
    check_permutation(perm, len(energies), "p")
    for dtype in (torch.int64, torch.int32):
        inverse = invert(perm.to(dtype))
        assert inverse.dtype == dtype and torch.equal(energy[perm][inverse.long()], energy)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        energy_order(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match=r"q\.input_perm has shape \(3,\), needed is \(4,\)"):
        check_permutation(torch.arange(3), 4, "q.input_perm")
    for bad in ([0, 1, 1], [0, 1, 3], [-1, 0, 1]):
        with pytest.raises(ValueError, match=r"no permutation of 0\.\.2"):
            check_permutation(torch.tensor(bad), 3, "p")


def test_dealt_blocks_have_one_loud_channel_each() -> None:
    energy = torch.tensor([1.0, 90.0, 3.0, 80.0, 0.5, 70.0, 2.0, 4.0, 100.0, 5.0, 0.1])
    order = dealt_order(energy, block=4, outliers=1)
    assert order[-1] == 8  # the outlier
    assert order[8:10].tolist() == [10, 4]  # the quietest, beyond the last whole block
    assert sorted(order.tolist()) == list(range(11))
    blocks = energy[order[:8]].view(2, 4)
    assert blocks[:, 0].tolist() == [90.0, 80.0] and blocks[:, 1].tolist() == [5.0, 70.0]


def test_dealing_fewer_channels_than_a_block_is_sorting() -> None:
    energy = torch.rand(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dealt_order(energy, 32), energy_order(energy))
