"""Curves of a training run: written as JSON without nan, drawn small enough for a dashboard."""

import base64
import io
import json
import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, float]
Panel = tuple[str, Mapping[str, str]]
"""A title, and the names of the curves in it with their labels."""

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e4e8ec"
LINES = ("#3d7ab8", "#c0492b", "#1b8a6b", "#7b5ea7", "#8a6d3b")
SMOOTHED = 40
"""Curves longer than this are drawn faint, under their running mean."""
LARGEST_IMAGE = 200_000
"""Bytes of a data URI."""
_drawing = threading.RLock()  # the dashboard draws from a thread of its own, and matplotlib's caches are shared


def write_curves(path: Path, rows: Sequence[Row]) -> None:
    """One flat object a logged step; what is not a finite number is left out."""
    clean = [{key: value for key, value in row.items() if math.isfinite(value)} for row in rows]
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in clean) + "\n]\n")


def draw_panels(
    rows: Sequence[Mapping[str, Any]], panels: Sequence[Panel], *, columns: int = 2, width: float = 3.6, height: float = 2.1
) -> str:
    """A Markdown image with a panel for each that has points; empty where none has."""
    shown = [(title, {name: label for name, label in names.items() if points(rows, name)}) for title, names in panels]
    shown = [(title, names) for title, names in shown if names]
    if not shown:
        return ""
    with _drawing:
        columns = min(columns, len(shown))
        figure, axes = sheet(-(-len(shown) // columns), columns, width, height)
        for axis, (title, names) in zip(axes, shown):
            for colour, (name, label) in zip(LINES, names.items()):
                plot(axis, points(rows, name), colour, label if len(names) > 1 or not title else "")
            finish(axis, title)
        for axis in axes[len(shown) :]:
            axis.set_visible(False)
        alt = ", ".join(title or next(iter(names)) for title, names in shown)
        return image(figure, alt)


def points(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of one metric, where it was logged and is a number."""
    return [
        (row["step"], row[name])
        for row in rows
        if "step" in row and isinstance(row.get(name), int | float) and math.isfinite(row[name])
    ]


def plot(axis: "Axes", line: Sequence[tuple[float, float]], colour: str, label: str = "") -> None:
    """A curve; with dots where it has few points, faint under its running mean where it has many."""
    steps, values = [step for step, _ in line], [value for _, value in line]
    if len(values) <= SMOOTHED:
        few = len(values) < 15
        axis.plot(
            steps, values, color=colour, linewidth=1.6, marker="o" if few else None, markersize=3, label=label or None
        )  # fmt: skip
        return
    axis.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
    axis.plot(steps, running_mean(values), color=colour, linewidth=1.8, label=label or None)


def running_mean(values: Sequence[float]) -> list[float]:
    """Of the neighbours within a twentieth of the curve; at the ends, of those that there are."""
    reach = max(1, len(values) // 40)
    around = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in around]


def sheet(rows: int, columns: int, width: float = 3.6, height: float = 2.1) -> "tuple[Figure, list[Axes]]":
    """A figure in our look and its axes in a row; width and height are a panel's, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.09)  # type: ignore[union-attr, call-arg]
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.grid(color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.spines["bottom"].set_color(GRID)
        axis.tick_params(colors=MUTED, labelsize=8, length=0)
    return figure, list(axes)


def finish(axis: "Axes", title: str, *, x: bool = True) -> None:
    """Title, few ticks (of x only where it counts something), a legend where there are labels."""
    from matplotlib.ticker import MaxNLocator

    axis.set_title(title, fontsize=9, fontweight="bold", color=INK, loc="left")
    if x:
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(5))
    if axis.get_legend_handles_labels()[1]:
        axis.legend(frameon=False, fontsize=8)


def image(figure: "Figure", alt: str, dpi: int = 150) -> str:
    """The figure as Markdown: a PNG in a data URI, coarser where it would be larger than the dashboard takes."""
    uri = data_uri(png(figure, dpi))
    while len(uri) > LARGEST_IMAGE and dpi > 40:
        dpi = round(dpi * 0.75)
        uri = data_uri(png(figure, dpi))
    return f"![{alt}]({uri})"


def png(figure: "Figure", dpi: int = 150) -> bytes:
    """In at most 128 colours: a third of the size, and no visible difference. No date or version inside."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    with _drawing:
        FigureCanvasAgg(figure)
        drawn, small = io.BytesIO(), io.BytesIO()
        figure.savefig(drawn, format="png", dpi=dpi)
        Image.open(drawn).convert("RGB").quantize(128, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            small, format="PNG", optimize=True
        )
        return small.getvalue()


def data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")
