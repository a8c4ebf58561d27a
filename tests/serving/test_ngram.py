"""Prompt lookup against its definition."""

from hypothesis import given
from hypothesis import strategies as st

from atom.serving.ngram import NgramIndex


def definition(tokens: list[int], min_n: int, max_n: int, most: int) -> tuple[int, ...]:
    for n in range(max_n, min_n - 1, -1):
        tail = tokens[-n:]
        for start in range(len(tokens) - n - 1, -1, -1):  # the latest occurrence before the tail itself
            if len(tail) == n and tokens[start : start + n] == tail:
                return tuple(tokens[start + n : start + n + most])
    return ()


@given(
    tokens=st.lists(st.integers(0, 2), min_size=1, max_size=30),
    steps=st.lists(st.integers(1, 4), max_size=8),
    sizes=st.tuples(st.integers(1, 3), st.integers(0, 3)),
    most=st.integers(0, 5),
)
def test_proposals(tokens: list[int], steps: list[int], sizes: tuple[int, int], most: int) -> None:
    min_n, max_n = sizes[0], sizes[0] + sizes[1]
    index, length = NgramIndex(min_n, max_n), 1
    for step in [0, *steps]:
        length = min(len(tokens), length + step)
        known = tokens[:length]
        found = definition(known, min_n, max_n, most) if most else ()
        assert index.propose(known, most) == found


def test_an_answer_that_quotes() -> None:
    index = NgramIndex(2, 3)
    assert index.propose([5, 6, 7, 8, 9, 1, 6, 7], 3) == (8, 9, 1)
    assert index.propose([5, 6, 7, 8, 9, 1, 6, 7, 8], 2) == (9, 1)
    assert index.propose([5, 6, 7, 8, 9, 1, 6, 7, 8, 0], 2) == ()
