"""Drafts by prompt lookup: what followed the last few tokens when they last occurred in the same text.

Source: prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding). It costs no model and pays where an
answer repeats its prompt: summaries, edits of code, answers from given documents.
"""

from collections.abc import Sequence

from .request import Request


def can_speculate(request: Request) -> bool:
    """Whether several tokens of its sequences can be sampled in one step: none may depend on how the others turn out.

    Greedy ones, without penalties (which count the tokens so far) and without a guide (whose mask follows them).
    """
    params = request.params
    penalties = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
    return params.is_greedy and not penalties and request.guide is None


class NgramIndex:
    """The n-grams of one sequence, min_n to max_n tokens long, each with the place after its latest occurrence."""

    def __init__(self, min_n: int, max_n: int) -> None:
        self._sizes = range(max_n, min_n - 1, -1)
        self._places: dict[tuple[int, ...], int] = {}
        self._length = 0  # tokens seen

    def propose(self, token_ids: Sequence[int], most: int) -> tuple[int, ...]:
        """At most `most` tokens that may follow; none if nothing repeats. The longest n-gram that was seen decides.

        token_ids  the sequence; every call's begins with the one before's
        """
        for end in range(max(self._length, 1), len(token_ids)):  # what ends there has a successor now
            for n in self._sizes:
                if n <= end:
                    self._places[tuple(token_ids[end - n : end])] = end
        self._length = len(token_ids)
        if most < 1:
            return ()
        for n in self._sizes:
            place = self._places.get(tuple(token_ids[-n:])) if n <= len(token_ids) else None
            if place is not None:
                return tuple(token_ids[place : place + most])
        return ()
