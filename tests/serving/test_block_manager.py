"""The block manager against a model of it: random operations, and a memory that remembers what was written where."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from atom.serving.block_manager import BlockManager
from atom.serving.prefix import PrefixHasher

SIZE = 2
prompts = st.builds(lambda a, b: [0] * a + [1] * b, st.integers(1, 8), st.integers(0, 3))  # many common prefixes
picks = st.integers(0, 7)


class BlockMachine(RuleBasedStateMachine):
    """Owners write their tokens into blocks, share full ones, and always read back exactly their own tokens."""

    @initialize(num_blocks=st.integers(2, 9), prefix_cache=st.booleans())
    def start(self, num_blocks: int, prefix_cache: bool) -> None:
        self.manager = BlockManager(num_blocks, SIZE, prefix_cache)
        self.hasher = PrefixHasher(SIZE, b"")
        self.tokens: dict[int, list[int]] = {}  # of each owner
        self.memory: dict[tuple[int, int], int] = {}  # (block, place) -> token
        self.owners = 0

    def pick(self, number: int) -> int:
        """One of the owners. (A precondition would make hypothesis retry most rules.)"""
        owners = sorted(self.tokens)
        return owners[number % len(owners)]

    def digests(self, tokens: list[int]) -> list[bytes]:
        found: list[bytes] = []
        self.hasher.extend(found, tokens)
        return found

    def write(self, owner: int, start: int) -> None:
        """Store the owner's tokens from position `start` on; full blocks are offered to the cache."""
        tokens, table = self.tokens[owner], self.manager.table(owner)
        for position in range(start, len(tokens)):
            block = table[position // SIZE]
            assert self.manager.references(block) == 1, "a shared block is written"
            assert not self.manager.is_registered(block), "a cached block is written"
            self.memory[block, position % SIZE] = tokens[position]
        for index, digest in enumerate(self.digests(tokens)):
            self.manager.register(owner, index, digest)

    def opened(self, tokens: list[int], cached: int | None, free: int, fits: bool) -> None:
        assert (cached is not None) == fits
        if cached is None:
            assert self.manager.num_free == free
            return
        assert cached < len(tokens) and cached % SIZE == 0
        self.tokens[self.owners] = tokens
        self.write(self.owners, cached)
        self.owners += 1

    @rule(tokens=prompts, reserve=st.integers(0, 2))
    def allocate(self, tokens: list[int], reserve: int) -> None:
        manager, free = self.manager, self.manager.num_free
        digests = self.digests(tokens)[: (len(tokens) - 1) // SIZE]
        found = manager.find(digests)
        blocks = [manager._by_digest[digest] for digest in digests[:found]]
        in_use = sum(manager.references(block) > 0 for block in blocks)  # those need no free block
        cached = manager.allocate(self.owners, len(tokens), digests, reserve)
        self.opened(tokens, cached, free, manager.blocks_for(len(tokens)) - in_use + reserve <= free)
        assert cached is None or cached == found * SIZE
        assert manager.prefix_cache or not cached

    @rule(pick=picks, share=picks, more=prompts)
    def fork(self, pick: int, share: int, more: list[int]) -> None:
        if not self.tokens:
            return
        parent = self.pick(pick)
        shared = share % (len(self.tokens[parent]) // SIZE + 1)
        tokens, free = self.tokens[parent][: shared * SIZE] + more, self.manager.num_free
        cached = self.manager.fork(parent, self.owners, shared, len(tokens))
        assert cached in (None, shared * SIZE)
        self.opened(tokens, cached, free, self.manager.blocks_for(len(tokens)) - shared <= free)

    @rule(pick=picks, more=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def append(self, pick: int, more: list[int]) -> None:
        if not self.tokens:
            return
        owner = self.pick(pick)
        before, free = len(self.tokens[owner]), self.manager.num_free
        missing = self.manager.blocks_for(before + len(more)) - self.manager.blocks_for(before)
        assert self.manager.append(owner, before + len(more)) == (missing <= free)
        assert self.manager.num_free == (free - missing if missing <= free else free)
        if missing <= free:
            self.tokens[owner] += more
            self.write(owner, before)

    @rule(pick=picks)
    def free(self, pick: int) -> None:
        if not self.tokens:
            return
        owner = self.pick(pick)
        self.manager.free(owner)
        del self.tokens[owner]

    @rule()
    def reset_cache(self) -> None:
        self.manager.reset_cache()
        assert self.manager.num_cached == 0 and self.manager.find(self.digests([0] * 9)) == 0

    @invariant()
    def books_balance(self) -> None:
        manager = self.manager
        manager.check()
        tables = [manager.table(owner) for owner in self.tokens]
        assert manager.num_used == len({block for table in tables for block in table})
        assert manager.num_used + manager.num_free == manager.num_blocks
        for block in range(manager.num_blocks):
            assert manager.references(block) == sum(block in table for table in tables)

    @invariant()
    def everyone_reads_their_own_tokens(self) -> None:
        for owner, tokens in self.tokens.items():
            table = self.manager.table(owner)
            assert len(table) == self.manager.blocks_for(len(tokens))
            assert [self.memory[table[i // SIZE], i % SIZE] for i in range(len(tokens))] == tokens

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            for owner in self.tokens:
                self.manager.free(owner)
            self.manager.check()
            assert self.manager.num_free == self.manager.num_blocks


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=250, stateful_step_count=30, deadline=None)


def filled(manager: BlockManager, owner: int, digests: list[bytes]) -> None:
    """A table with one block more than `digests`, those registered, given back."""
    assert manager.allocate(owner, (len(digests) + 1) * SIZE) is not None
    for index, digest in enumerate(digests):
        manager.register(owner, index, digest)
    manager.free(owner)


def test_the_block_free_for_longest_is_evicted_and_a_prefix_outlives_what_follows() -> None:
    manager = BlockManager(5, SIZE)
    filled(manager, 0, [b"a0", b"a1"])
    filled(manager, 1, [b"b0"])
    assert manager.num_cached == 3 and manager.num_free == 5
    assert manager.allocate(2, 3 * SIZE) == 0  # two empty blocks, then the oldest: a1, as it was given back before a0
    assert manager.find([b"a0", b"a1"]) == 1 and manager.find([b"b0"]) == 1 and manager.num_evictions == 1
    assert manager.append(2, 4 * SIZE)
    assert manager.find([b"a0"]) == 0 and manager.find([b"b0"]) == 1


def test_use_makes_a_prefix_young_again() -> None:
    manager = BlockManager(3, SIZE)
    filled(manager, 0, [b"a"])
    filled(manager, 1, [b"b"])
    assert manager.allocate(2, 2 * SIZE, [b"a"]) == SIZE
    manager.free(2)
    assert manager.allocate(3, 2 * SIZE) == 0  # one empty block, and b
    assert manager.find([b"a"]) == 1 and manager.find([b"b"]) == 0


def test_a_cached_block_that_is_shared_is_not_counted_as_free_space() -> None:
    manager = BlockManager(2, SIZE)
    filled(manager, 0, [b"a"])
    assert manager.num_free == 2
    assert manager.allocate(1, 3 * SIZE, [b"a"]) is None  # one shared, two fresh: three blocks of two
    manager.check()
    assert manager.allocate(1, 2 * SIZE, [b"a"]) == SIZE


def test_without_the_prefix_cache_nothing_is_kept() -> None:
    manager = BlockManager(2, SIZE, prefix_cache=False)
    filled(manager, 0, [b"a"])
    assert manager.num_cached == 0 and manager.find([b"a"]) == 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("_references", [1, 0], "number of owners"),
        ("_empty", [0], "lost"),
        ("_empty", [0, 0], "free twice"),
        ("_by_digest", {b"a": 0}, "disagree"),
    ],
)
def test_check_finds_damage(field: str, value: object, message: str) -> None:
    manager = BlockManager(2, SIZE)
    manager.check()
    setattr(manager, field, value)
    with pytest.raises(AssertionError, match=message):
        manager.check()
