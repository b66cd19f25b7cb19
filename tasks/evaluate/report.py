"""The report: one page that needs nothing but itself, and a short Markdown one for the dashboard.

Everything that people or models wrote is untrusted and goes through jinja2's escaping; the page allows no scripts and no
connections.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tasks.evaluate.plots import COLOURS, SCORERS

MARKDOWN = "report.md.jinja"
MARKDOWN_IMAGES = 190_000  # bytes of data URIs in REPORT.md
CARD_ROWS = 60
HEADLINES = {"better": "Better", "no-evidence": "No evidence", "worse": "Worse"}

DUEL_LABELS = {**SCORERS, "judge": "This run’s judge", "champion_judge": "The champion’s judge", "judges": "Mean of both judges"}


@dataclass(frozen=True)
class Report:
    """All that the pages show."""

    verdict: Mapping[str, Any]
    tables: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]
    figures: Mapping[str, Path]
    card: Mapping[str, Any]
    manifests: Mapping[str, Mapping[str, Any] | None]
    """manifest.json of each input, by step; None where it is missing."""
    config: Mapping[str, Any]
    notice: str


def html(report: Report) -> str:
    """The self-contained page."""
    images = {name: data_uri(path) for name, path in report.figures.items()}
    return _environment().get_template("report.html.jinja").render(images=images, gauge=gauge(report.verdict), **_shared(report))


def markdown(report: Report) -> str:
    """Verdict, main table and as many figures as fit."""
    images: dict[str, str] = {}
    for name in ("gains", "ppo"):
        if name in report.figures:
            uri = data_uri(report.figures[name])
            if sum(map(len, images.values())) + len(uri) <= MARKDOWN_IMAGES:
                images[name] = uri
    return _environment().get_template(MARKDOWN).render(images=images, **_shared(report))


def data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def gauge(verdict: Mapping[str, Any]) -> dict[str, float]:
    """Where zero, the gain and its interval stand on a line from 0 to 100."""
    low, high = verdict["interval"]
    ends = [0.0, low, high]
    span = (max(ends) - min(ends)) or 1.0
    left, width = min(ends) - 0.12 * span, 1.24 * span
    return {
        name: 100 * (value - left) / width
        for name, value in (("zero", 0.0), ("low", low), ("high", high), ("gain", verdict["gain"]))
    }


def flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested JSON as rows of dotted names and text."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        yield name, f"{len(value)} entries"
    elif isinstance(value, list):
        yield name, ", ".join(map(str, value))
    else:
        yield name, number(value)


def number(value: Any) -> str:
    """A number as people write it; anything else as text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def percent(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def fixed(value: float) -> str:
    """Three decimals, with a minus sign rather than a hyphen."""
    return f"{value:.3f}".replace("-", "−")


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
    )


def sign(interval: Mapping[str, float] | None, zero: float = 0.0) -> str:
    """up, down or unsure: the side of `zero` on which the whole interval lies."""
    return "" if interval is None else "up" if interval["low"] > zero else "down" if interval["high"] < zero else "unsure"


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name != MARKDOWN,  # which holds nothing that people or models wrote
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "percent": percent,
        "duration": duration,
        "signed": signed,
        "fixed": fixed,
    }
    environment.tests["known"] = lambda value: value is not None
    return environment


def _shared(report: Report) -> dict[str, Any]:
    rows = {row["name"]: row for row in report.tables["models"]}
    card = list(flat(report.card))
    return {
        "verdict": report.verdict,
        "headline": HEADLINES[report.verdict["word"]],
        "headlines": HEADLINES,
        "duel_labels": DUEL_LABELS,
        "tables": report.tables,
        "rows": rows,
        "by": report.verdict["by"],
        "scorers": {name: label for name, label in SCORERS.items() if name in rows["sft"]["scores"]},
        "reward_model": report.tables["reward_model"],
        "samples": report.samples,
        "card": card[:CARD_ROWS],
        "card_left_out": max(0, len(card) - CARD_ROWS),
        "manifests": report.manifests,
        "config": report.config,
        "pretty": lambda value: json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True),
        "notice": report.notice,
        "colours": COLOURS,
        "sign": sign,
    }
