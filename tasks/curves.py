"""Curves of a training run: written as JSON without nan, drawn small enough for a dashboard."""

import base64
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

Row = dict[str, float]


def write_curves(path: Path, rows: Sequence[Row]) -> None:
    """One flat object a logged step; what is not a finite number is left out."""
    clean = [{key: value for key, value in row.items() if math.isfinite(value)} for row in rows]
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in clean) + "\n]\n")


def draw(rows: Sequence[Row], names: Sequence[str]) -> str:
    """A Markdown image of the named curves over the steps, as a data URI."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), dpi=90, layout="constrained")
    axes = figure.subplots()
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row and math.isfinite(row[name])]
        if points:
            axes.plot(*zip(*points), label=name, marker="o" if len(points) < 15 else None, markersize=3)
    axes.set_xlabel("step")
    axes.legend()
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return f"![{', '.join(names)}](data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()})"
