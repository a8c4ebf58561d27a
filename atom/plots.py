"""matplotlib where it is wanted: it is an extra, loaded only to draw."""

from .errors import UnsupportedError


def load_matplotlib(otherwise: str = "or read the table above") -> None:
    """Import matplotlib and let it draw into files, without a display; `otherwise`: what to do without it.

    Raises UnsupportedError where it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UnsupportedError(
            "plots are drawn with the package matplotlib, which is not installed; pip install 'atom-serving[report]', "
            f"{otherwise}"
        ) from None
    matplotlib.use("Agg")
