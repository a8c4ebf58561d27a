"""Stop strings in a text that comes in pieces: found at once, and nothing held back that cannot become one any more."""

from collections.abc import Sequence
from functools import lru_cache


class StopStrings:
    """Searches for several strings at once, by Knuth, Morris and Pratt: one pass over the text, whatever its pieces.

    include  the stop string that is found belongs to the text
    """

    def __init__(self, stop: Sequence[str], include: bool = False) -> None:
        self.include = include
        self.found: str | None = None
        self._stop = tuple(stop)
        self._tables = [_borders(s) for s in self._stop]
        self._matched = [0] * len(self._stop)  # characters of each that the text so far ends with
        self._held = ""

    def feed(self, text: str) -> str:
        """The text that may be shown now; sets `found`, after which there is no more.

        Of several stop strings the one that is complete first counts, and of those that end together the longest.
        """
        if self.found is not None:
            return ""
        if not self._stop:
            return text
        ends = [self._advance(number, text) for number in range(len(self._stop))]
        held, text = self._held, self._held + text
        hits = [(end, -len(stop), stop) for end, stop in zip(ends, self._stop, strict=True) if end is not None]
        if hits:
            end, _, self.found = min(hits)
            self._held = ""
            return text[: len(held) + end - (0 if self.include else len(self.found))]
        settled = len(text) - max(self._matched, default=0)
        self._held = text[settled:]
        return text[:settled]

    def flush(self) -> str:
        """What was held back: the text has ended."""
        text, self._held = self._held, ""
        return text

    def _advance(self, number: int, text: str) -> int | None:
        """Move one string's match through a piece of text; where in it the string is complete, if it is."""
        stop, table, matched = self._stop[number], self._tables[number], self._matched[number]
        if not matched and stop[0] not in text:
            return None
        for place, character in enumerate(text):
            while matched and stop[matched] != character:
                matched = table[matched - 1]
            matched += stop[matched] == character
            if matched == len(stop):
                return place + 1
        self._matched[number] = matched
        return None


@lru_cache(4096)
def _borders(stop: str) -> tuple[int, ...]:
    """For each beginning of the string, the longest proper beginning that it also ends with."""
    table, matched = [0] * len(stop), 0
    for place in range(1, len(stop)):
        while matched and stop[matched] != stop[place]:
            matched = table[matched - 1]
        matched += stop[matched] == stop[place]
        table[place] = matched
    return tuple(table)
