"""Loss against bits as a picture, one panel a model."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atom.plots import load_matplotlib

from .frontier import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT = "loss_against_bits.png"
COLUMNS = 3  # of panels
LEAST = 1e-3  # nats: what loses less, or gains, lies on the lower edge


def draw_frontier(points: Sequence[Point], directory: Path) -> Path:
    """Write a plot of loss against bits into `directory`; its path.

    Methods of a comparison are circles, presets squares; a grey line joins what no other beats in bits and loss at
    once. The cache alone has no place on this axis: it is left out.
    Raises UnsupportedError where matplotlib is not there.
    """
    load_matplotlib()
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    points = [point for point in points if point.bits < 16] or list(points)
    models = list(dict.fromkeys(point.model for point in points))
    styles = _styles(dict.fromkeys(point.way for point in points))
    panels = len(models) + 1  # the last one holds the legend
    columns = min(panels, COLUMNS)
    rows = -(-panels // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.6 * columns, 3.8 * rows), squeeze=False)
    for axis in axes.flat[len(models) :]:
        axis.set_axis_off()
    highest = max(point.loss for point in points)
    for axis, model in zip(axes.flat, models, strict=False):
        here = [point for point in points if point.model == model]
        _draw_panel(axis, here, styles)
        axis.set(title=model, xlabel="bits, mean of weights and activations", ylabel="loss, nats a token")
        axis.set(xlim=(3.7, max(8.6, *(point.bits + 0.3 for point in points))), ylim=(0.7 * LEAST, 1.6 * highest))
    handles = [Line2D([], [], linestyle="none", label=way, **style) for way, style in styles.items()]
    axes.flat[len(models)].legend(handles=handles, loc="center", ncols=2, fontsize="small", frameon=False)
    figure.suptitle("loss against full precision on each model's first text, by bits")
    figure.tight_layout()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / PLOT
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def best_of(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in bits and loss at once, by bits."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bits, p.loss)):
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return best


def _draw_panel(axis: "Axes", points: Sequence[Point], styles: dict[str, dict[str, Any]]) -> None:
    line = best_of(points)
    axis.plot([p.bits for p in line], [max(p.loss, LEAST) for p in line], color="0.75", zorder=0)
    for point in points:
        axis.plot([point.bits], [max(point.loss, LEAST)], linestyle="none", **styles[point.way])
    axis.set_yscale("log")
    axis.grid(alpha=0.3)


def _styles(ways: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each way is drawn: presets, whose name has a cache behind a plus, as squares, methods as circles, ours as a
    star. A marker's second ten are filled by half: colours come again.
    """
    styles: dict[str, dict[str, Any]] = {}
    for way in ways:
        marker = "s" if "+" in way else "*" if way.startswith("ours") else "o"
        number = sum(style["marker"] == marker for style in styles.values())
        look = {"marker": marker, "markersize": {"s": 5, "o": 6, "*": 11}[marker]}
        styles[way] = {**look, "color": f"C{number % 10}", "fillstyle": ("full", "left", "top")[number // 10 % 3]}
    return styles
