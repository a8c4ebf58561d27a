"""Page-locked memory of the host that kernels read and write themselves, and copies by such kernels.

CUDA takes milliseconds to page-lock memory, so what every step needs is kept and used in turn.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .begin import bring_kernel
from .leading import Leading
from .registry import device_arch

STEPS_KEPT = 16  # steps after which the memory of one may be used again; fewer are ever under way


class HostRing:
    """Memory that is handed out in turn: what was taken stays as it is until `slots` further ones were taken."""

    def __init__(self, slots: int = STEPS_KEPT) -> None:
        self._slots: list[Leading | None] = [None] * slots
        self._turn = 0

    def take(self, count: int) -> Tensor:
        """int64 [count], page-locked, at a multiple of 16 bytes."""
        self._turn = (self._turn + 1) % len(self._slots)
        memory = self._slots[self._turn]
        if memory is None or len(memory.whole) < count:
            whole = torch.empty(1 << max(9, (count - 1).bit_length()), dtype=torch.int64, pin_memory=True)
            memory = self._slots[self._turn] = Leading(whole)
        return memory(count)


def bring(host: Tensor, words: Tensor) -> None:
    """Copy int32 words [n], n a multiple of 4, from page-locked memory that stays as it is meanwhile; does not wait.

    On Hopper a kernel does what the copy engine would do, without the GPU standing still before and after it.
    """
    if words.is_cuda and _has_kernel(words.device):
        bring_kernel()(host.data_ptr(), words)
    else:
        words.copy_(host, non_blocking=True)


@lru_cache
def _has_kernel(device: torch.device) -> bool:
    if device_arch(device) != "sm_90":
        return False
    try:
        bring_kernel()
    except UnsupportedError:  # the compiler is an optional part; all that needs nothing else runs without it
        return False
    return True
