"""Requests that an engine with random weights finds under way, without the prefill that brought them there.

A windowed run (window.py) begins with sequences in the middle of their lives. Their keys and values would be computed
for nothing: with random weights no speed depends on which they are. So the cache is filled once with copies of blocks
that the warm-up really computed, and those sequences are admitted as if all but their last token had been computed.
What follows them is prefilled like anything else, and so are they after a preemption.
"""

import torch

from ..kv_pool import KVPool
from ..scheduler import Scheduler
from ..sequence import Sequence

MARK = "under-way-"  # how ids of such requests begin
PIECE = 1024  # blocks that are copied at once


class UnderWayScheduler(Scheduler):
    """A scheduler that believes of marked requests that they have run before.

    written  blocks whose tokens were really computed, of sequences that have ended
    """

    written: tuple[int, ...] = ()

    def _admit(self, sequence: Sequence) -> bool:
        if not super()._admit(sequence):
            return False
        if sequence.epoch == 1 and sequence.request.request_id.startswith(MARK):
            sequence.scheduled = sequence.computed = sequence.length - 1
        return True

    def _release(self, sequence: Sequence) -> None:
        if not sequence.request.request_id.startswith(MARK):
            full = sequence.computed // self.config.block_size
            self.written += tuple(self.blocks.table(sequence.sequence_id)[:full]) if len(self.written) < PIECE else ()
        super()._release(sequence)


def fill_pool(pool: KVPool, written: tuple[int, ...]) -> None:
    """Fill the cache with copies of those blocks, while no step is under way."""
    source = torch.tensor(written, device=pool.device)
    for index in range(pool.config.num_layers):
        layer = pool.layer(index)
        piece = layer[source[torch.arange(PIECE, device=pool.device) % len(source)]]
        for start in range(0, len(layer), PIECE):
            part = layer[start : start + PIECE]
            part.copy_(piece[: len(part)])
    if pool.device.type == "cuda":
        torch.cuda.synchronize(pool.device)
