"""REPORT.md of the step: what the dashboard shows of it."""

from pathlib import Path
from typing import Any

from tasks.curves import LINES, MUTED, finish, image, plot, points, sheet

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
        "# reward: the reward model and its judge",
        "",
        f"**{main['accuracy']:.1%}** of {main['n_pairs']:,} held-out pairs; best baseline "
        f"{rivals['best']['accuracy']:.1%} ({NAMES[rivals['best']['name']]})"
        + (f"; best possible {rivals['best_possible']:.1%}" if "best_possible" in rivals else "")
        + ".",
        "",
        _figure(curves, calibrations, results, rivals),
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


def _figure(
    curves: list[dict[str, Any]],
    calibrations: dict[str, dict[str, Any]],
    results: dict[str, dict[str, Any]],
    rivals: dict[str, Any],
) -> str:
    """Loss and accuracy while both learnt, reliability, and the accuracies side by side; a Markdown image."""
    figure, (loss, accuracy, reliability, beside) = sheet(2, 2, height=2.3)
    for colour, (name, calibration) in zip(LINES, calibrations.items()):
        rows = [row for row in curves if row["model"] == name]
        label = NAMES[name].partition(" (")[0]
        plot(loss, points(rows, "loss"), colour, label)
        plot(accuracy, points(rows, "eval/accuracy"), colour, label)
        bins = calibration["bins"]
        reliability.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], "o-", color=colour, markersize=3)
    reliability.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=0.8, linestyle="--")
    finish(loss, "Training loss over the steps")
    finish(accuracy, "Accuracy on some eval questions")
    finish(reliability, "How sure it is, how often it is right", x=False)
    shown = {"reward model": results["reward"], "judge": results["judge"]}
    shown |= {NAMES[name].partition(" (")[0]: rivals[name] for name in ("tfidf", "longer_wins", "markup_wins")}
    for place, (row, colour) in enumerate(zip(shown.values(), [LINES[0], LINES[1], *[MUTED] * 3])):
        beside.barh(place, 100 * row["accuracy"], color=colour, height=0.6, alpha=0.85)
        beside.plot([100 * end for end in row["interval"]], [place, place], color="black", linewidth=1)
    if "best_possible" in rivals:
        beside.axvline(100 * rivals["best_possible"], color=LINES[2], linewidth=1.2, linestyle="--")
    beside.set_yticks(range(len(shown)), [name.replace(" Bradley-Terry", "") for name in shown])
    beside.set_xlim(min(45, *(100 * row["accuracy"] - 5 for row in shown.values())), 100)
    beside.invert_yaxis()
    beside.set_title("Pairs ranked as people did (%)", fontsize=9, fontweight="bold", loc="left")
    return image(figure, "training loss, accuracy, calibration, accuracy beside baselines")
