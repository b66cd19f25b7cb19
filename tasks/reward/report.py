"""REPORT.md of the step: what the dashboard shows of it."""

import base64
import io
from pathlib import Path
from typing import Any

NAMES = {
    "reward": "reward model",
    "judge": "judge (other split, other seed)",
    "tfidf": "TF-IDF Bradley-Terry",
    "longer_wins": "longer answer wins",
    "markup_wins": "more markup wins",
    "earlier_wins": "earlier answer wins (exposure; not in the text)",
}


def write_report(
    path: Path,
    *,
    results: dict[str, dict[str, Any]],
    rivals: dict[str, Any],
    calibrations: dict[str, dict[str, Any]],
    scale: dict[str, tuple[float, float]],
    curves: list[dict[str, Any]],
) -> None:
    """Accuracy beside the baselines, by score gap and site, calibration and curves, as Markdown."""
    main = results["reward"]
    rows = [(name, results[name]) for name in ("reward", "judge")]
    rows += [(name, rivals[name]) for name in ("tfidf", "longer_wins", "markup_wins", "earlier_wins")]
    lines = [
        "# reward",
        "",
        f"Share of {main['n_pairs']} held-out pairs of {main['n_questions']} questions in which the preferred answer scores higher "
        f"(ties count half); intervals are 95 %, bootstrapped by question. {_verdict(main, rivals)}",
        "",
        "| ranking | accuracy | 95 % interval |",
        "|---|---|---|",
        *(f"| {NAMES[name]} | {row['accuracy']:.1%} | {_interval(row)} |" for name, row in rows),
    ]
    if "best_possible" in rivals:
        lines.append(f"| best possible (the truth is known) | {rivals['best_possible']:.1%} | |")
    for title, key in (("score gap", "by_gap"), ("site", "by_site")):
        judge = results["judge"][key]
        lines += ["", f"| {title} | pairs | reward model | 95 % interval | judge |", "|---|---|---|---|---|"]
        lines += [
            f"| {label} | {row['n_pairs']} | {row['accuracy']:.1%} | {_interval(row)} | {judge[label]['accuracy']:.1%} |"
            for label, row in main[key].items()
        ]
    lines += [
        "",
        "| | ECE | fitted temperature | ECE with it | score of SFT samples: mean | spread |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {c['ece']:.3f} | {c['temperature']:.2f} | {c['ece_with_temperature']:.3f} | {mean:.3f} | {std:.3f} |"
            for (name, c), (mean, std) in zip(calibrations.items(), scale.values(), strict=True)
        ),
        "",
        f"{main['responses_cut']} of {main['responses']} eval answers were cut to max_length; the baselines read whole answers.",
        "",
        f"![training curves and calibration](data:image/png;base64,{_figure(curves, calibrations)})",
    ]
    path.write_text("\n".join(lines) + "\n")


def _verdict(main: dict[str, Any], rivals: dict[str, Any]) -> str:
    best = rivals["best"]
    relation = (
        "above"
        if main["interval"][0] > best["accuracy"]
        else "below"
        if main["interval"][1] < best["accuracy"]
        else "not told apart from"
    )
    return f"The reward model's interval is {relation} the best baseline that reads the text ({NAMES[best['name']]})."


def _interval(row: dict[str, Any]) -> str:
    return f"{row['interval'][0]:.1%} to {row['interval'][1]:.1%}"


def _figure(curves: list[dict[str, Any]], calibrations: dict[str, dict[str, Any]]) -> str:
    """Loss, accuracy and reliability of both models; a PNG in base64."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, reliability = figure.subplots(1, 3)
    for color, (name, calibration) in zip(("C0", "C1"), calibrations.items(), strict=True):
        rows = [row for row in curves if row["model"] == name]
        loss.plot([r["step"] for r in rows], [r["loss"] for r in rows], color=color, alpha=0.8, label=name)
        watched = [row for row in rows if "eval/accuracy" in row]
        accuracy.plot([r["step"] for r in watched], [r["eval/accuracy"] for r in watched], "o-", color=color, ms=3, label=name)
        bins = calibration["bins"]
        reliability.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], "o-", color=color, ms=3, label=name)
    reliability.plot([0.5, 1], [0.5, 1], color="grey", lw=0.8)
    loss.set(title="training loss", xlabel="step")
    accuracy.set(title="accuracy on some eval questions", xlabel="step")
    reliability.set(title="calibration", xlabel="confidence", ylabel="accuracy")
    loss.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return base64.b64encode(file.getvalue()).decode()
