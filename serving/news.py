"""What a step did to its sequences, as the front end is told.

Most sequences of a step go on by a token, and nothing else is to be said of them. Their outputs are made when somebody
reads them: on the reader's thread, while the engine's waits for the GPU.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, repeat
from typing import Any, overload

from .decoding import Bool, Rows
from .result import TokenLogprobs
from .sequence import Output

_new_tuple = tuple.__new__


class News(Sequence[Output]):
    """Outputs, in the order of the step's sequences but for those that are made already, which come last.

    rows      sequences that are told of, each with its token in `tokens`, and its logprobs
    chosen    bool [B], only some of them; None: all
    others    outputs that are made already; only these may have a finish_reason
    """

    def __init__(
        self,
        rows: Rows,
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprobs | None] | None = None,
        chosen: Bool | None = None,
    ) -> None:
        self.others: list[Output] = []
        self._count = len(tokens) if chosen is None else int(chosen.sum())
        self._from = rows, tokens, logprobs, chosen
        self._made: list[Output] | None = None

    def __len__(self) -> int:
        return self._count + len(self.others)

    def __iter__(self) -> Iterator[Output]:
        return iter(self._all())

    @overload
    def __getitem__(self, index: int) -> Output: ...
    @overload
    def __getitem__(self, index: slice) -> list[Output]: ...
    def __getitem__(self, index: int | slice) -> Output | list[Output]:
        return self._all()[index]

    def _all(self) -> list[Output]:
        if self._made is None:
            self._made = [*self._plain(), *self.others]
        return self._made

    def _plain(self) -> Iterable[Output]:
        """Output(...) of each, for all of them at once, without Python's loop."""
        rows, tokens, logprobs, chosen = self._from
        none = repeat(None)
        found = none if logprobs is None else ((each,) if each is not None else None for each in logprobs)
        fields: Iterable[tuple[Any, ...]] = zip(
            rows.request_ids, rows.indices, zip(tokens), none, none, rows.cached_tokens, found, none, strict=False
        )
        if chosen is not None:
            fields = compress(fields, chosen.tolist())
        return map(_new_tuple, repeat(Output), fields)


def ended(outputs: Sequence[Output]) -> list[Output]:
    """Those of sequences that have ended."""
    told = outputs.others if isinstance(outputs, News) else outputs
    return [output for output in told if output.finish_reason is not None]
