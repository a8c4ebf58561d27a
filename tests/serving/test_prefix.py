"""The hash chain: a digest stands for all tokens up to its block's end, the salt, and the key."""

from hypothesis import given
from hypothesis import strategies as st

from atom.serving.prefix import PrefixHasher

SIZE = 3
KEY = b"key"
tokens = st.lists(st.integers(0, 1), max_size=10)
salts = st.sampled_from([None, "", "a", "\ud800"])  # a lone surrogate: JSON can spell it, UTF-8 cannot


def digests(token_ids: list[int], salt: str | None = None, key: bytes = KEY) -> list[bytes]:
    found: list[bytes] = []
    PrefixHasher(SIZE, key).extend(found, token_ids, salt)
    return found


@given(tokens, tokens, salts, salts)
def test_equal_exactly_for_equal_prefixes(a: list[int], b: list[int], salt_a: str | None, salt_b: str | None) -> None:
    found_a, found_b = digests(a, salt_a), digests(b, salt_b)
    assert (len(found_a), len(found_b)) == (len(a) // SIZE, len(b) // SIZE)
    for block in range(min(len(found_a), len(found_b))):
        end = (block + 1) * SIZE
        assert (found_a[block] == found_b[block]) == (a[:end] == b[:end] and salt_a == salt_b)


@given(tokens, tokens)
def test_extending_equals_hashing_at_once(first: list[int], more: list[int]) -> None:
    found = digests(first)
    PrefixHasher(SIZE, KEY).extend(found, first + more)
    assert found == digests(first + more)


def test_keys_are_drawn() -> None:
    a: list[bytes] = []
    b: list[bytes] = []
    PrefixHasher(SIZE).extend(a, [1, 2, 3])
    PrefixHasher(SIZE).extend(b, [1, 2, 3])
    assert a != b and digests([1, 2, 3]) == digests([1, 2, 3]) != digests([1, 2, 3], key=b"other")
