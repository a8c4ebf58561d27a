"""The hash chain of the prefix cache: a block's digest stands for its tokens and all tokens before them.

The digests are keyed with bytes drawn at start-up, so that no client can compute two prompts with one digest, and
start from the request's `cache_salt`, so that requests with different salts share nothing.
"""

import hashlib
import os
from array import array

DIGEST_BYTES = 16  # 2**64 blocks before two of them collide by chance


class PrefixHasher:
    """Digests of full blocks of `block_size` tokens."""

    def __init__(self, block_size: int, key: bytes | None = None) -> None:
        self.block_size = block_size
        self._key = os.urandom(32) if key is None else key

    def extend(self, digests: list[bytes], token_ids: list[int], salt: str | None = None) -> None:
        """Append to `digests` those of the full blocks of token_ids beyond len(digests) blocks."""
        size = self.block_size
        root = b"root" if salt is None else b"salt" + salt.encode("utf-8", "surrogatepass")
        for block in range(len(digests), len(token_ids) // size):
            parent = digests[-1] if digests else root
            tokens = array("q", token_ids[block * size : (block + 1) * size]).tobytes()
            digest = hashlib.blake2b(parent, digest_size=DIGEST_BYTES, key=self._key)
            digest.update(len(parent).to_bytes(8, "little"))
            digest.update(tokens)
            digests.append(digest.digest())
