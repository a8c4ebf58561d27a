"""Atom: low-bit quantized LLM serving, one artefact from checkpoint to tokens."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    __version__ = version("atom-serving")
except PackageNotFoundError:  # running from a checkout that was never installed
    __version__ = "0.1.0"

# calibration/, eval/ and serving/ are top-level folders of the checkout and sub-packages of atom; a wheel maps them by
# package-dir, a checkout finds them here.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").exists() and str(_checkout) not in __path__:
    __path__.append(str(_checkout))
