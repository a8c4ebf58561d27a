"""Converting a GGUF file, transformers parses it four times, each string through a memory map of numpy's: minutes for a
vocabulary of 150,000. Within `one_reading()` a file is parsed once, and as plain bytes."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def one_reading() -> Iterator[None]:
    """Until it ends, `gguf.GGUFReader(path)` is fast and returns the same reader for the same path.

    transformers takes the class from the package at every call, and only reads what it finds there.
    """
    import gguf

    original = gguf.GGUFReader

    class Reader(original):  # type: ignore[misc, valid-type]
        @property
        def data(self) -> np.ndarray[Any, Any]:
            return self._data

        @data.setter
        def data(self, mapped: np.ndarray[Any, Any]) -> None:
            self._data = mapped.view(np.ndarray)  # every slice of a numpy.memmap is one, made in Python

    gguf.GGUFReader = functools.cache(Reader)
    try:
        yield
    finally:
        gguf.GGUFReader = original
