"""HTTP connections that are given up when no request comes.

uvicorn closes a connection that has had an answer and then says nothing. For the head of a first request, and for what
comes byte by byte, it waits for ever: whoever opens sockets enough takes them all, without a key.
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


def connection_class(timeout_s: float) -> type[H11Protocol]:
    """uvicorn's connection, closed when it has waited `timeout_s` for the whole head of a request."""

    class Connection(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._is_busy:
                self._stop_waiting()
            elif self._timer is None:  # uvicorn's own timer has ended with the first byte
                self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        @property
        def _is_busy(self) -> bool:
            """A request is being answered; its body has a time limit of its own."""
            return self.cycle is not None and not self.cycle.response_complete

        def _wait(self) -> None:
            self._timer = self.loop.call_later(timeout_s, self._give_up)

        def _stop_waiting(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _give_up(self) -> None:
            self._timer = None
            if not self._is_busy:
                self.transport.close()

    return Connection
