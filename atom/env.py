"""Environment variables. All of them, and where their defaults come from."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`ATOM_CACHE`: where converted GGUF models, fetched packages and compiled kernels are kept (~/.cache/atom)."""
    return Path(os.environ.get("ATOM_CACHE") or Path.home() / ".cache" / "atom")


def unverified_kernels() -> bool:
    """`ATOM_UNVERIFIED_KERNELS`: 1 lets kernels run that compile but have not been checked on a GPU yet."""
    return os.environ.get("ATOM_UNVERIFIED_KERNELS", "0") not in ("", "0")


def api_keys() -> tuple[str, ...]:
    """`ATOM_API_KEY`: what `atom serve` asks of clients and `atom chat URL` sends; several are parted by commas.

    White space around a key is none of it: files of secrets end with a line break. ValueError if nothing else is there.
    """
    given = os.environ.get("ATOM_API_KEY", "")
    keys = tuple(key.strip() for key in given.split(",") if key.strip())
    if given and not keys:
        raise ValueError("ATOM_API_KEY holds no key; unset it to let everybody in, or give one.")
    return keys
