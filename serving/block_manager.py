"""Paged KV memory: who owns which block, which blocks still hold a known prefix, and what is free.

A block is in exactly one of three places:

    used     in one or more tables; its reference count is the number of tables it is in
    empty    in no table, contents worthless
    cached   in no table, but its contents are known by their digest: free, and the oldest is evicted when no empty
             block is left

Only full blocks whose contents have been computed get a digest, and they are never written again, so sharing them
copies nothing. A sequence writes to blocks that it alone owns. Nothing here knows a device.
"""

from collections import OrderedDict
from collections.abc import Sequence


class BlockManager:
    """Tables of blocks by sequence id, for `num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.num_evictions = 0
        self._tables: dict[int, list[int]] = {}
        self._references = [0] * num_blocks
        self._digest: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}
        self._empty = list(reversed(range(num_blocks)))
        self._cached: OrderedDict[int, None] = OrderedDict()  # free blocks with a digest, oldest first

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, cached ones included."""
        return len(self._empty) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        """Free blocks that still hold a known prefix."""
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def table(self, owner: int) -> Sequence[int]:
        """The blocks of a sequence, in order of position."""
        return self._tables[owner]

    def references(self, block: int) -> int:
        """Tables that the block is in."""
        return self._references[block]

    def is_registered(self, block: int) -> bool:
        """Whether the block's contents are known by a digest, so that it must not be written."""
        return self._digest[block] is not None

    def find(self, digests: Sequence[bytes]) -> int:
        """How many leading blocks of a sequence with these digests are there to be shared."""
        if not self.prefix_cache:
            return 0
        for count, digest in enumerate(digests):
            if digest not in self._by_digest:
                return count
        return len(digests)

    def allocate(self, owner: int, num_tokens: int, digests: Sequence[bytes] = (), reserve: int = 0) -> int | None:
        """Open a table for num_tokens, its leading blocks shared with the cache as far as `digests` are found there.

        Returns the tokens that need no computing, or None (nothing changed) if that would leave fewer than `reserve`
        blocks free.
        """
        shared = [self._by_digest[digest] for digest in digests[: self.find(digests)]]
        return self._open(owner, num_tokens, shared, reserve)

    def fork(self, parent: int, owner: int, num_shared: int, num_tokens: int, reserve: int = 0) -> int | None:
        """Open a table for num_tokens whose first num_shared blocks are the parent's; returns as `allocate` does.

        Those blocks must be full: the parent writes to them no more.
        """
        return self._open(owner, num_tokens, self._tables[parent][:num_shared], reserve)

    def append(self, owner: int, num_tokens: int) -> bool:
        """Extend a table to num_tokens; False (nothing changed) if there are not enough free blocks."""
        table = self._tables[owner]
        missing = -(-num_tokens // self.block_size) - len(table)
        if missing == 1 and self._empty:  # as a rule
            block = self._empty.pop()
            self._references[block] = 1
            table.append(block)
            return True
        if missing > len(self._empty) + len(self._cached):
            return False
        for _ in range(missing):
            table.append(self._take())
        return True

    def register(self, owner: int, index: int, digest: bytes) -> None:
        """Say that block `index` of a table is full, computed, and holds what `digest` stands for.

        If another block holds the same already, that one stays the one to be shared.
        """
        block = self._tables[owner][index]
        if self.prefix_cache and self._digest[block] is None and digest not in self._by_digest:
            self._digest[block] = digest
            self._by_digest[digest] = block

    def free(self, owner: int) -> None:
        """Give a table back. Later blocks become the older ones: a prefix outlives what was built on it."""
        for block in reversed(self._tables.pop(owner)):
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._digest[block] is None:
                    self._empty.append(block)
                else:
                    self._cached[block] = None

    def reset_cache(self) -> None:
        """Forget all known prefixes; tables stay as they are."""
        self._empty.extend(self._cached)
        self._cached.clear()
        self._by_digest.clear()
        self._digest = [None] * self.num_blocks

    def check(self) -> None:
        """Assert what must hold between any two calls; what breaks it is a bug here."""
        owners = [0] * self.num_blocks
        for table in self._tables.values():
            assert len(set(table)) == len(table), "a block is in one table twice"
            for block in table:
                owners[block] += 1
        assert owners == self._references, "a reference count is not the number of owners"
        free = [*self._empty, *self._cached]
        assert len(set(free)) == len(free), "a block is free twice"
        assert all(owners[block] == 0 for block in free), "a free block has an owner"
        assert len(free) + sum(count > 0 for count in owners) == self.num_blocks, "a block is lost"
        assert all(self._digest[block] is None for block in self._empty), "an empty block has a digest"
        known = {digest: block for block, digest in enumerate(self._digest) if digest is not None}
        assert known == self._by_digest, "digests and blocks disagree"
        assert all(self._digest[block] is not None for block in self._cached), "a cached block has no digest"

    def _open(self, owner: int, num_tokens: int, shared: list[int], reserve: int) -> int | None:
        assert owner not in self._tables, f"sequence {owner} has a table already"
        fresh = self.blocks_for(num_tokens) - len(shared)
        assert fresh > 0, "a sequence needs a block of its own to write to"
        revived = sum(self._references[block] == 0 for block in shared)
        if fresh + revived + reserve > self.num_free:
            return None
        for block in shared:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1
        self._tables[owner] = shared + [self._take() for _ in range(fresh)]
        return len(shared) * self.block_size

    def _take(self) -> int:
        """A block without contents, for one owner; evicts the block that has been free for longest if it must."""
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            digest, self._digest[block] = self._digest[block], None
            assert digest is not None
            del self._by_digest[digest]
            self.num_evictions += 1
        self._references[block] = 1
        return block
