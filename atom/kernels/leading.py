"""First rows of tensors that keep their place.

A view takes torch 2 us, and several times that in the first moments after the thread has slept; a decode step would
make a dozen of them.
"""

from torch import Tensor


class Leading:
    """`Leading(whole)(count)` is whole[:count], made once for each count."""

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole
        self._found: dict[int, Tensor] = {}

    def __call__(self, count: int) -> Tensor:
        found = self._found.get(count)
        if found is None:
            found = self._found[count] = self.whole[:count]
        return found
