"""REPORT.md of `ppo`: what a person wants to see first: the gain, the curves, and answers side by side."""

from pathlib import Path
from typing import Any

from tasks.curves import Panel, draw_panels
from tasks.pages import cell, table
from tasks.ppo.config import PPOConfig
from tasks.ppo.guards import Guard
from tasks.ppo.preflight import Check

PANELS: tuple[Panel, ...] = (
    (
        "Score (std. deviations)",
        {"objective/scores": "rollouts", "eval/score": "held out", "eval/judge": "held out, judge"},
    ),
    ("KL to reference (nats per answer)", {"objective/kl": ""}),
    ("Entropy (nats per token)", {"policy/entropy": ""}),
    ("Share of ratios clipped", {"policy/clipfrac": ""}),
    ("Response length (tokens)", {"response_length": ""}),
    ("Value loss", {"val/loss": ""}),
    ("KL coefficient", {"kl_coef": ""}),
    ("Ended by itself (share)", {"eos_rate": ""}),
)
SAMPLES = 6


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

    def change(name: str, digits: int = 3) -> tuple[str, str, str]:
        before, after = metrics[f"{name}_before"], metrics[f"{name}_after"]
        return f"{before:.{digits}f}", f"{after:.{digits}f}", f"{after - before:+.{digits}f}"

    score, judge = change("score"), change("judge")
    kl_checks = ", ".join(f"{c.name} {c.value:.2g}" for c in checks if "ratio" in c.name or "KL" in c.name)
    lines = [
        "# ppo: before and after",
        "",
        f"Held-out score **{score[0]}** before, **{score[1]}** after ({score[2]} standard deviations of SFT's answers); "
        f"the judge, which PPO never sees: {judge[0]} to {judge[1]}.",
        "",
        draw_panels(curves, PANELS, height=1.75),
        "",
        table(
            ("", "before (sft)", "after (ppo)", "change"),
            [("held-out score (normalised reward)", *score), ("held-out judge score", *judge)],
            "lrrr",
        ),
        "",
        f"Best checkpoint: step {metrics['best_step']} of {metrics['steps']}, by held-out score. "
        f"KL to the reference {metrics['kl']:.2f} nats per response, {metrics['response_length']:.1f} tokens, "
        f"{metrics['eos_rate']:.0%} end by themselves.",
        "",
        f"Preflight: {sum(c.ok for c in checks)} of {len(checks)} checks hold; {kl_checks}. Alarms: {len(guard.alarms)}.",
        "",
        *(f"- step {alarm.step}: {alarm.what} -> {alarm.action}" for alarm in guard.alarms),
        "",
        "## Answers side by side",
        "",
        f"The first {min(SAMPLES, len(samples))} held-out questions, not chosen.",
        "",
        *(part for number, sample in enumerate(samples[:SAMPLES], 1) for part in _sample(number, sample)),
    ]
    path.write_text("\n".join(lines) + "\n")


def _sample(number: int, sample: dict[str, Any]) -> list[str]:
    """A question and a table of its two answers; nothing in the texts is Markdown or HTML."""
    head = [
        f"{name}: score {sample[f'score_{when}']:+.2f}" for name, when in (("before (sft)", "before"), ("after (ppo)", "after"))
    ]
    answers = [cell(sample[when]) or "(nothing)" for when in ("before", "after")]
    return [f"**{number}.** {cell(sample['question'], 100)}", "", table(head, [answers]), ""]
