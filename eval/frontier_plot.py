"""Loss against bits as a picture, one panel a model."""

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atom.plots import load_matplotlib

from .frontier import OPTION, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT = "loss_against_bits.png"
COLUMNS = 3  # of panels
LEAST = 1e-3  # nats: what loses less, or gains, lies on the lower edge
NEAR = 0.5  # bits: what is better for so few more is named instead
CHOSEN = ", chosen by place"
SIZES = {"o": 6, "s": 5, "D": 5, "*": 11}  # of markers


def draw_frontier(points: Sequence[Point], directory: Path) -> Path:
    """Write a plot of loss against bits into `directory`; its path.

    Methods of a comparison are circles, ours a star, presets squares, and what budgets chose diamonds, all of one base
    alike. A grey line joins what no other beats in bits and loss at once, and names it. The cache alone has no place on
    this axis: it is left out.
    Raises UnsupportedError where matplotlib is not there.
    """
    load_matplotlib()
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    points = [point for point in points if point.bits < 16] or list(points)
    models = list(dict.fromkeys(point.model for point in points))
    styles = _styles(dict.fromkeys(series_of(point.way) for point in points))
    panels = len(models) + 1  # the last one holds the legend
    columns = min(panels, COLUMNS)
    rows = -(-panels // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.8 * columns, 4.2 * rows), squeeze=False)
    for axis in axes.flat[len(models) :]:
        axis.set_axis_off()
    losses = [max(point.loss, LEAST) for point in points]
    limits = {
        "xlim": (3.7, max(8.6, *(point.bits + 0.3 for point in points))),
        "ylim": (min(losses) / 2, 2 * max(losses)),
    }
    for axis, model in zip(axes.flat, models, strict=False):
        axis.set(title=model, xlabel="bits, mean of weights and activations", ylabel="loss, nats a token", **limits)
        _draw_panel(axis, [point for point in points if point.model == model], styles)
    handles = [Line2D([], [], linestyle="none", label=name, **style) for name, style in styles.items()]
    axes.flat[len(models)].legend(handles=handles, loc="center", ncols=2, fontsize="small", frameon=False)
    figure.suptitle("loss against full precision on each model's first text, by bits; the best at their bits are named")
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


def series_of(way: str) -> str:
    """What the legend calls a way: what was chosen under limits is one series for each base."""
    base, option, _ = way.partition(OPTION)
    return f"{base}{CHOSEN}" if option else way


def _draw_panel(axis: "Axes", points: Sequence[Point], styles: dict[str, dict[str, Any]]) -> None:
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    line = best_of(points)
    axis.plot([p.bits for p in line], [max(p.loss, LEAST) for p in line], color="0.75", zorder=0)
    for point in points:
        axis.plot([point.bits], [max(point.loss, LEAST)], linestyle="none", **styles[series_of(point.way)])
    for point, following in zip_longest(line, line[1:]):
        if following is not None and following.bits - point.bits < NEAR:
            continue
        place = (point.bits, max(point.loss, LEAST))
        axis.annotate(point.way, place, (-6, -14), textcoords="offset points", fontsize=7, color="0.25")


def _styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each series is drawn. A marker's second ten are filled by half: colours come again."""
    styles: dict[str, dict[str, Any]] = {}
    for name in names:
        marker = "D" if name.endswith(CHOSEN) else "s" if "+" in name else "*" if name.startswith("ours") else "o"
        number = sum(style["marker"] == marker for style in styles.values())
        look = {"marker": marker, "markersize": SIZES[marker]}
        styles[name] = {**look, "color": f"C{number % 10}", "fillstyle": ("full", "left", "top")[number // 10 % 3]}
    return styles
