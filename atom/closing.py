"""What is closed, or left as a context manager."""

from types import TracebackType
from typing import Self


class Closes:
    """`with` for what has a `close` that may be called again."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
