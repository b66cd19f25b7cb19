"""Figures of the report: small PNGs, drawn without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from tasks import curves as look
from tasks.curves import INK, MUTED, finish
from tasks.ppo.report import PANELS

COLOURS = {
    "human": "#8a6d3b", "base": "#98a2ad", "sft": "#3d7ab8", "best-of-n": "#7b5ea7", "ppo": "#1b8a6b", "champion": "#d9a514",
    "worse": "#c0492b",
}  # fmt: skip
SCORERS = {"true": "True reward", "judge": "Judge", "reward": "Training reward model"}
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}


def draw(
    folder: Path,
    *,
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    calibration: Mapping[str, Any],
    tables: Mapping[str, Any],
    scores: dict[str, dict[str, np.ndarray]],
    by: str,
) -> dict[str, Path]:
    """Draw whatever there is data for into `folder`; -> path by name."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "gains": gains(tables, by),
        "scores": distributions(scores, by),
        "reward_accuracy": reward_accuracy(tables["reward_model"]),
        "reliability": reliability(calibration),
        "losses": losses(curves),
        "ppo": ppo_curves(curves.get("ppo", ())),
    }
    return {name: save(figure, folder / f"{name}.png") for name, figure in figures.items() if figure is not None}


def gains(tables: Mapping[str, Any], by: str) -> Figure:
    """Paired gain over SFT of every writer, with its interval; a panel per scorer, because their units differ."""
    rows = [row for row in tables["models"] if row["gain"]]
    scorers = [name for name in SCORERS if name in rows[0]["gain"]]
    figure, panels = sheet(1, len(scorers), width=3.6 * len(scorers), height=0.5 * len(rows) + 1.1)
    for axis, scorer in zip(panels, scorers):
        for place, row in enumerate(reversed(rows)):
            gain, colour = row["gain"][scorer], COLOURS[row["name"]]
            axis.plot([gain["low"], gain["high"]], [place, place], color=colour, linewidth=3, solid_capstyle="round")
            axis.plot([gain["value"]], [place], "o", color=colour, markersize=7, markeredgecolor="white")
        axis.axvline(0, color=MUTED, linewidth=1)
        axis.set_yticks(range(len(rows)), [row["label"] for row in reversed(rows)] if axis is panels[0] else [""] * len(rows))
        axis.set_ylim(-0.6, len(rows) - 0.4)
        decides = " (decides)" if scorer == by else ""
        title(axis, f"{SCORERS[scorer]}{decides}")
        axis.set_xlabel("gain over SFT", color=MUTED)
        axis.xaxis.set_major_locator(MaxNLocator(5))
    return figure


def distributions(scores: dict[str, dict[str, np.ndarray]], by: str) -> Figure:
    """Distribution of the scores of each writer's answers, by the scorer that decides and by the training reward model."""
    scorers = [by, "reward"]
    figure, panels = sheet(1, 2, width=9, height=2.8)
    labels = {"human": "Human", "base": "Base", "sft": "SFT", "best-of-n": "Best of n", "ppo": "PPO", "champion": "Champion"}
    for axis, scorer in zip(panels, scorers):
        everyone = np.concatenate([s[scorer].ravel() for s in scores.values()])
        low, high = np.quantile(everyone, [0.005, 0.995])
        grid = np.linspace(low, high if high > low else low + 1, 200)
        for place, (name, values) in enumerate(reversed(scores.items())):
            flat = np.clip(values[scorer].ravel(), grid[0], grid[-1])
            density = kernel_density(flat, grid, everyone.std())
            axis.fill_between(grid, place, place + 0.85 * density / density.max(), color=COLOURS[name], alpha=0.75, linewidth=0)
            axis.plot([flat.mean()] * 2, [place, place + 0.85], color=INK, linewidth=1.2)
        axis.set_yticks(np.arange(len(scores)) + 0.15, [labels[name] for name in reversed(scores)])
        axis.tick_params(axis="y", length=0)
        title(axis, f"Scores by the {SCORERS[scorer].lower()}")
        axis.set_xlabel("line: mean", color=MUTED)
    return figure


def kernel_density(values: np.ndarray, grid: np.ndarray, spread: float) -> np.ndarray:
    """Gaussian kernel density on the grid; the width follows Scott's rule for the pooled spread, so that all look alike."""
    width = max(1e-9, 1.06 * spread * len(values) ** -0.2, 0.015 * (grid[-1] - grid[0]))
    return np.exp(-0.5 * ((grid[:, None] - values[None]) / width) ** 2).sum(1)


def reward_accuracy(model: Mapping[str, Any]) -> Figure | None:
    """Accuracy on held-out human pairs, beside what needs no language model at all."""
    if model["accuracy"] is None:
        return None
    rows = [(name.replace("_", " "), value, COLOURS["base"]) for name, value in model["baselines"].items()]
    rows.sort(key=lambda row: row[1]["accuracy"])
    if model["judge"]["accuracy"] is not None:
        rows.append(("judge", model["judge"], COLOURS["best-of-n"]))
    rows.append(("reward model", model, COLOURS["ppo"]))
    figure, (axis,) = sheet(1, 1, width=5, height=0.38 * len(rows) + 1.1)
    for place, (_, value, colour) in enumerate(rows):
        axis.barh(place, value["accuracy"] - 0.5, left=0.5, color=colour, height=0.66)
        end = value["accuracy"]
        if value["interval"]:
            axis.plot(value["interval"], [place, place], color=INK, linewidth=1.2)
            end = max(end, value["interval"][1])
        axis.text(end + 0.008, place, f"{100 * value['accuracy']:.1f} %", va="center", fontsize=8, color=INK, bbox=LABEL_BOX)
    best = model["best_possible"]
    if best is not None:
        axis.axvline(best, color=COLOURS["worse"], linewidth=1.2, linestyle="--")
        axis.text(best, len(rows) - 0.5, "best possible ", ha="right", fontsize=8, color=COLOURS["worse"])
    values = [row[1]["accuracy"] for row in rows]
    axis.set_xlim(min(0.48, min(values) - 0.03), min(1.0, max([*values, best or 0.5]) + 0.12))
    axis.set_yticks(range(len(rows)), [row[0] for row in rows])
    axis.set_ylim(-0.6, len(rows) - 0.15)
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    title(axis, "Which answer did people prefer?")
    return figure


def reliability(calibration: Mapping[str, Any]) -> Figure | None:
    """How often the reward model is right against how sure it is."""
    own = calibration.get("reward", calibration)
    bins = own.get("bins")
    if not bins:
        return None
    figure, (axis,) = sheet(1, 1, width=3.6, height=3.2)
    axis.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=1, linestyle="--")
    largest = max(row["n"] for row in bins)
    lines = (("bins_with_temperature", "base", "with fitted temperature"), ("bins", "ppo", "as trained"))
    for name, colour, label in ((name, COLOURS[who], label) for name, who, label in lines):
        rows = own.get(name) or []
        x, y = [row["confidence"] for row in rows], [row["accuracy"] for row in rows]
        axis.plot(x, y, color=colour, linewidth=1.2, label=label)
        axis.scatter(x, y, s=[12 + 90 * row["n"] / largest for row in rows], color=colour, edgecolor="white", zorder=3)
    axis.set_xlim(0.49, 1.01)
    axis.set_ylim(min(0.45, *(row["accuracy"] - 0.03 for row in bins)), 1.02)
    axis.set_xlabel("how sure it is", color=MUTED)
    axis.set_ylabel("how often it is right", color=MUTED)
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    title(axis, f"Reliability (ECE {own['ece']:.3f})" if "ece" in own else "Reliability")
    return figure


def losses(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure | None:
    """Training losses of base, sft, and the reward model with its judge."""
    reward = curves.get("reward", ())
    panels: list[tuple[str, list[tuple[str, Sequence[Mapping[str, Any]], str]]]] = [
        ("Base: loss (nats per token)", [(COLOURS["base"], curves.get("base", ()), "")]),
        ("SFT: loss (nats per token)", [(COLOURS["sft"], curves.get("sft", ()), "")]),
        (
            "Reward model: loss",
            [
                (COLOURS["ppo"], [row for row in reward if row.get("model", "reward") == "reward"], "reward model"),
                (COLOURS["best-of-n"], [row for row in reward if row.get("model") == "judge"], "judge"),
            ],
        ),
    ]
    shown = [(name, lines) for name, lines in panels if any(series(rows, "loss")[0].size for _, rows, _ in lines)]
    if not shown:
        return None
    figure, axes = sheet(1, len(shown), width=3.3 * len(shown), height=2.5)
    for axis, (name, lines) in zip(axes, shown):
        for colour, rows, label in lines:
            curve(axis, *series(rows, "loss"), colour, label)
            for held_out in ("eval/loss", "eval_loss"):
                steps, values = series(rows, held_out)
                if steps.size:
                    axis.plot(steps, values, "o-", color=COLOURS["worse"], linewidth=1, markersize=3, label="held out")
        finish(axis, name)
    return figure


def ppo_curves(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """The eight numbers that tell how PPO went."""
    palette = (COLOURS["ppo"], COLOURS["worse"], COLOURS["best-of-n"])
    shown = []
    for name, candidates in PANELS:
        lines = [(series(rows, key), label) for key, label in candidates.items()]
        lines = [(line, label) for line, label in lines if line[0].size]
        if lines:
            shown.append((name, lines))
    if not shown:
        return None
    columns = min(4, len(shown))
    height = -(-len(shown) // columns)
    figure, axes = sheet(height, columns, width=2.75 * columns, height=2.15 * height)
    for axis, (name, lines) in zip(axes, shown):
        for colour, ((steps, values), label) in zip(palette, lines):
            curve(axis, steps, values, colour, label)
        finish(axis, name)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    return figure


def series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric, where it was logged."""
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    steps, values = zip(*points) if points else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def curve(axis: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    look.plot(axis, list(zip(steps, values)), colour, label)


def sheet(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, Sequence[Axes]]:
    """A figure of this size in our look, and its axes in a row."""
    figure, axes = look.sheet(rows, columns, width / columns, height / rows)
    for axis in axes:
        axis.xaxis.label.set_fontsize(8)
        axis.yaxis.label.set_fontsize(8)
        for label in axis.get_yticklabels():
            label.set_color(INK)
    return figure, axes


def title(axis: Axes, text: str) -> None:
    axis.set_title(text, fontsize=9, fontweight="bold", color=INK, loc="left")


def save(figure: Figure, path: Path) -> Path:
    path.write_bytes(look.png(figure))
    return path
