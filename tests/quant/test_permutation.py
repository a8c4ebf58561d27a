"""Channel permutations: sorting by energy, inverse, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atom.quant.permutation import check_permutation, energy_order, invert


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
