"""Follows one JSON value that arrives in pieces: where it ends, and nothing else."""


class ValueScanner:
    """Feed it text from the value's first character on: an object, an array or a string."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self.is_done = False

    def feed(self, text: str) -> int:
        """How many of these characters belong to the value."""
        for place, c in enumerate(text):
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif c == "\\":
                    self._is_escaped = True
                elif c == '"':
                    self._in_string = False
                    self.is_done = not self._depth
            elif c == '"':
                self._in_string = True
            elif c in "{[":
                self._depth += 1
            elif c in "}]":
                self._depth -= 1
                self.is_done = self._depth <= 0
            if self.is_done:
                return place + 1
        return len(text)
