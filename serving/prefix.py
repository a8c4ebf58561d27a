"""The hash chain of the prefix cache: a block's digest stands for its tokens and all tokens before them.

The digests are keyed with bytes drawn at start-up, so that no client can compute two prompts with one digest, and
start from the request's `cache_salt`, so that requests with different salts share nothing.
"""

import hashlib
import os
import struct

from .block_manager import BlockManager
from .sequence import Sequence

DIGEST_BYTES = 16  # 2**64 blocks before two of them collide by chance


class PrefixHasher:
    """Digests of full blocks of `block_size` tokens."""

    def __init__(self, block_size: int, key: bytes | None = None) -> None:
        self.block_size = block_size
        self._new = hashlib.blake2b(digest_size=DIGEST_BYTES, key=os.urandom(32) if key is None else key).copy
        self._pack = struct.Struct(f"{block_size}i").pack

    def extend(self, digests: list[bytes], token_ids: list[int], salt: str | None = None) -> None:
        """Append to `digests` those of the full blocks of token_ids beyond len(digests) blocks."""
        size, begun = self.block_size, len(digests)
        if begun:
            parent = digests[-1]
        else:
            root = b"root" if salt is None else b"salt" + salt.encode("utf-8", "surrogatepass")
            parent = root + len(root).to_bytes(8, "little")
        for start in range(begun * size, len(token_ids) // size * size, size):
            state = self._new()
            state.update(parent + self._pack(*token_ids[start : start + size]))
            parent = state.digest()
            digests.append(parent)


class Prefixes:
    """The prefix cache as sequences use it: what they may share, and what they offer to others."""

    def __init__(self, blocks: BlockManager, key: bytes | None = None) -> None:
        self.enabled = blocks.prefix_cache
        self.block_size = blocks.block_size
        self._blocks = blocks
        self._hasher = PrefixHasher(blocks.block_size, key)

    def digests(self, sequence: Sequence) -> list[bytes]:
        """What to look up for a sequence: at least its last token is left to compute, for its logits."""
        if not self.enabled or sequence.computes_prompt:
            return []
        self._hasher.extend(sequence.digests, sequence.token_ids, sequence.request.cache_salt)
        return sequence.digests[: (sequence.length - 1) // self.block_size]

    def offer(self, sequence: Sequence, computed: int) -> None:
        """Offer what is new among the full blocks of a sequence's `computed` tokens."""
        full = computed // self.block_size
        if not self.enabled or full <= sequence.registered:
            return
        self._hasher.extend(sequence.digests, sequence.token_ids, sequence.request.cache_salt)
        for index in range(sequence.registered, full):
            self._blocks.register(sequence.sequence_id, index, sequence.digests[index])
        sequence.registered = full
