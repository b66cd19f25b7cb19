"""REPORT.md of `ppo`: what a person wants to see first, with the curves as one small picture."""

import base64
import io
from pathlib import Path
from typing import Any

from tasks.ppo.config import PPOConfig
from tasks.ppo.guards import Guard
from tasks.ppo.preflight import Check

PANELS = (("eval/score", "eval/judge"), ("objective/kl", "objective/kl_k3"), ("response_length",), ("policy/entropy",))


def write_report(
    path: Path,
    config: PPOConfig,
    metrics: dict[str, Any],
    curves: list[dict[str, float]],
    samples: list[dict[str, Any]],
    checks: list[Check],
    guard: Guard,
) -> None:
    """A short Markdown page."""
    rows = [
        ("held-out score (normalised reward)", f"{metrics['score_before']:.3f}", f"{metrics['score_after']:.3f}"),
        ("held-out judge score", f"{metrics['judge_before']:.3f}", f"{metrics['judge_after']:.3f}"),
    ]
    lines = [
        "# ppo",
        "",
        f"Best checkpoint: step {metrics['best_step']} of {metrics['steps']}, by held-out score. "
        f"KL to the reference {metrics['kl']:.2f} nats per response, {metrics['response_length']:.1f} tokens, "
        f"{metrics['eos_rate']:.0%} end by themselves.",
        "",
        "| | before | after |",
        "|---|---|---|",
        *(f"| {name} | {before} | {after} |" for name, before, after in rows),
        "",
        f"![curves](data:image/png;base64,{_figure(curves)})",
        "",
        f"Preflight: {sum(c.ok for c in checks)} of {len(checks)} checks hold; "
        + ", ".join(f"{c.name} {c.value:.2g}" for c in checks if "ratio" in c.name or "KL" in c.name)
        + f". Alarms: {len(guard.alarms)}.",
        *(f"- step {alarm.step}: {alarm.what} -> {alarm.action}" for alarm in guard.alarms),
        "",
        "## Samples",
        *(line for sample in samples[:4] for line in _sample(sample)),
    ]
    path.write_text("\n".join(lines) + "\n")


def _sample(sample: dict[str, Any]) -> list[str]:
    def quote(text: str) -> list[str]:
        return [f"    {line}" for line in text.splitlines() or [""]]  # indented code: nothing in it is Markdown or HTML

    return [
        "",
        "Question:",
        "",
        *quote(sample["question"]),
        "",
        f"Before (score {sample['score_before']:.2f}):",
        "",
        *quote(sample["before"]),
        "",
        f"After (score {sample['score_after']:.2f}):",
        "",
        *quote(sample["after"]),
    ]


def _figure(curves: list[dict[str, float]]) -> str:
    """The panels as base64 PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.2), layout="constrained", dpi=80)
    for axes, names in zip(figure.subplots(1, len(PANELS)), PANELS):
        for name in names:
            points = [(row["step"], row[name]) for row in curves if name in row]
            axes.plot([x for x, _ in points], [y for _, y in points], marker=".", label=name)
        axes.legend(fontsize=6)
        axes.tick_params(labelsize=6)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()
