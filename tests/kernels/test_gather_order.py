"""Orders in which columns are gathered: every column once, few bank conflicts, codes back in place."""

import pytest
import torch

from atom.kernels.gather_order import gather_orders, selector


def waits(columns: list[int], orders: list[list[int]], run: int, size: int) -> int:
    """How often the banks serve all loads of the warps that gather a row."""
    found = 0
    for warp in range(0, len(orders), 32 * run):
        for j in range(run):
            for e in range(8):
                words: dict[int, set[int]] = {}
                for chunk in range(warp + j, min(warp + 32 * run, len(orders)), run):
                    word = columns[8 * chunk + orders[chunk][e]] * size // 4
                    words.setdefault(word % 32, set()).add(word)
                found += max(len(of_bank) for of_bank in words.values())
    return found


@pytest.mark.parametrize("K,run", [(4096, 1), (4096, 4), (1000, 2)])
@pytest.mark.parametrize("size", [2, 4])
def test_fewer_conflicts(K: int, run: int, size: int) -> None:
    torch.manual_seed(0)
    columns = torch.randperm(K).tolist()
    orders = gather_orders(columns, run, size)
    assert len(orders) == K // 8 and all(sorted(order) == list(range(8)) for order in orders)
    before = waits(columns, [list(range(8))] * len(orders), run, size)
    assert waits(columns, orders, run, size) < 0.68 * before


def test_selectors_put_codes_back() -> None:
    order = [3, 7, 0, 1, 6, 2, 5, 4]
    loaded = [10 + place for place in order]
    word = selector(order)
    assert [loaded[word >> 4 * place & 15] for place in range(8)] == list(range(10, 18))
