"""Environment variables. All of them, and where their defaults come from."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`ATOM_CACHE`: where converted GGUF models, fetched packages and compiled kernels are kept (~/.cache/atom)."""
    return Path(os.environ.get("ATOM_CACHE") or Path.home() / ".cache" / "atom")
