from hypothesis import example, given
from hypothesis import strategies as st

from atom.serving.stop_strings import StopStrings

SMALL = st.text("ab", min_size=1, max_size=5)


def definition(text: str, stop: list[str]) -> tuple[str, str | None]:
    """The text before the first end of a stop string, the longest of those that end there."""
    for end in range(len(text) + 1):
        hits = [s for s in stop if text[:end].endswith(s)]
        if hits:
            longest = max(hits, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.text("abc", max_size=40), st.lists(SMALL, max_size=4), st.lists(st.integers(0, 6), max_size=40))
@example("aabab", ["abab", "ba"], [1, 1, 1, 1, 1])
def test_any_pieces_give_the_definition(text: str, stop: list[str], sizes: list[int]) -> None:
    strings, shown, start = StopStrings(stop), "", 0
    for size in [*sizes, len(text)]:
        if strings.found is None:
            shown += strings.feed(text[start : start + size])
            start += size
            so_far = text[:start]
            if strings.found is None:
                held = max((n for s in stop for n in range(len(s)) if so_far.endswith(s[:n])), default=0)
                assert shown == so_far[: len(so_far) - held], "held back too much or too little"
    expected, found = definition(text, stop)
    assert strings.found == found
    assert (shown if found else shown + strings.flush()) == expected


@given(st.text("ab", max_size=30), st.lists(SMALL, min_size=1, max_size=3))
def test_included(text: str, stop: list[str]) -> None:
    strings = StopStrings(stop, include=True)
    shown = strings.feed(text) + strings.flush()
    before, found = definition(text, stop)
    assert shown == before + (found or "")


def test_no_stop_strings_hold_nothing_back() -> None:
    strings = StopStrings(())
    assert strings.feed("anything") == "anything"
    assert strings.flush() == ""
