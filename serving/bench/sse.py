"""Server-sent events, read from bytes as they arrive, wherever the network cut them.

Source: the WHATWG HTML standard, section 9.2 (event streams): lines end in LF, CRLF or CR, a line that begins with a
colon is a comment, several data lines of one event are joined by newlines, an empty line ends the event.
"""

DONE = b"[DONE]"


class EventReader:
    """`feed` bytes, get the data of the events they complete."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> list[bytes]:
        """The data of every event that `received` ends, in order."""
        text = self._rest + received
        held = b""
        if text.endswith(b"\r"):  # perhaps half of a CRLF
            text, held = text[:-1], b"\r"
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, rest = text.split(b"\n")
        self._rest = rest + held
        events = []
        for line in lines:
            if not line:
                if self._data:
                    events.append(b"\n".join(self._data))
                    self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
        return events

    @property
    def is_between_events(self) -> bool:
        """Nothing is left over: a stream that ends here was not cut within an event."""
        return not self._data and not self._rest.strip()
