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
    """`ATOM_API_KEY`: what `atom serve` asks of clients and `atom chat URL` sends; several are parted by commas."""
    return tuple(key for key in os.environ.get("ATOM_API_KEY", "").split(",") if key)
