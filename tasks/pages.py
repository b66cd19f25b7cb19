"""Markdown for the dashboard: the page of a running step, the facts under a report. Pure text, whoever shows it.

Both of Prefect's interfaces, at / and at /v2/, render tables, images as data URIs and code blocks, and follow links relative to a
page (../../artifacts/...). What only one of them does is not used: Mermaid, folded details, cells that break long lines.
"""

import html
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tasks.manifest import Manifest
from tasks.progress import MOST_POINTS, Pace, Update, in_words

LARGEST_PAGE = 850_000
"""Bytes of Markdown; the API refuses much larger ones."""
CURVES_FROM = 3
"""Points, before a curve says anything."""
CURVES = (
    "loss",
    "accuracy",
    "objective/scores",
    "objective/kl",
    "policy/entropy",
    "response_length",
    "policy/clipfrac",
    "val/loss",
)
"""What is drawn of a running step, the most telling first."""
SHORT = 12
"""Characters of a key that people read."""
SECRET = re.compile(r"SECRET|PASSW|TOKEN|API_KEY|AUTH(?!OR)|CREDENTIAL|ACCESS_KEY", re.IGNORECASE)


@dataclass
class Live:
    """What is known of a running step: fed by its updates, told as a page."""

    step: str
    pace: Pace = field(default_factory=Pace)
    update: Update | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _every: int = 1
    _heard: int = 0

    def hear(self, update: Update) -> None:
        if update.note:
            self.notes = [*self.notes[-9:], update.note]
            return
        self.pace.hear(update)
        if update.total <= 0:
            return
        self.update = update
        if update.metrics:
            if self._heard % self._every == 0:
                self.rows.append({"step": update.done, "phase": update.phase, **update.metrics})
            self._heard += 1
            if len(self.rows) > MOST_POINTS:
                self.rows = self.rows[::2]
                self._every *= 2

    @property
    def percent(self) -> float:
        return min(100.0, 100.0 * self.update.done / self.update.total) if self.update else 0.0

    def line(self) -> str:
        """Such as: ppo 34/120, 28 %, about 3 min 20 s left in this phase; objective/kl 3.21."""
        if self.update is None:
            return "starting"
        left = self.pace.left()
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in list(_first(self.update.metrics).items())[:4])
        return (
            f"{self.update.phase or self.step} {_count(self.update.done, self.update.total)}, {self.percent:.0f} %"
            + (f", about {in_words(left)} left" if left is not None and self.update.done < self.update.total else "")
            + (f"; {numbers}" if numbers else "")
        )

    def page(self, memory: int, now: datetime | None = None, state: str = "") -> str:
        """Markdown. `memory`: bytes that the step's processes hold now; `state`: how it ended."""
        at = (now or datetime.now(UTC)).strftime("%H:%M:%S UTC")
        update, left, each = self.update, self.pace.left(), self.pace.each()
        rows: list[tuple[str, str]] = []
        if update is not None:
            rows += [("phase", code(update.phase or self.step)), ("done", _count(update.done, update.total))]
            if not state:
                rows.append(("left in this phase", f"about {in_words(left)}" if left is not None else "not known yet"))
            rows += [("seconds each", f"{each:.3g}")] if each is not None and update.total < 10**6 else []
        rows += [("running for", in_words(self.pace.elapsed)), ("memory now", f"{memory / 2**20:,.0f} MiB")]
        parts = [f"# {self.step}: {state or (f'{self.percent:.0f} %' if update else 'starting')}"]
        if update is not None and not state:
            parts.append(code(bar(self.percent)))
        parts.append(table(("as of", at), rows))
        parts.append(self.curves())
        if update is not None and update.metrics:
            parts.append(table(("metric", "newest"), [(code(n), f"{v:.5g}") for n, v in _first(update.metrics).items()], "lr"))
        if self.notes:
            parts += ["## Said", "\n".join(f"- {escape(note)[:400]}" for note in self.notes)]
        return "\n\n".join(part for part in parts if part)

    def curves(self) -> str:
        """The first four telling metrics of the present phase as one picture."""
        from tasks.curves import draw_panels

        phase = self.update.phase if self.update else ""
        rows = [row for row in self.rows if row["phase"] == phase]
        names = [name for name in CURVES if sum(name in row for row in rows) >= CURVES_FROM][:4]
        return draw_panels(rows, [(name, {name: ""}) for name in names], height=1.6) if names else ""


def bar(percent: float, width: int = 40) -> str:
    full = round(width * min(100.0, max(0.0, percent)) / 100)
    return "█" * full + "░" * (width - full)


def facts(manifest: Manifest, links: Mapping[str, str] | None = None) -> str:
    """What every report ends with: cost, key, lineage, settings. `links`: address of each input's report."""
    identity = manifest.identity
    lineage = [
        (f"[{name}]({links[name]})" if links and name in links else name, code(key[:SHORT]))
        for name, key in identity.inputs.items()
    ] + [(f"{escape(name)} (from outside)", code(digest[:SHORT])) for name, digest in identity.external.items()]
    about = [
        ("took", in_words(manifest.seconds) if manifest.seconds >= 60 else f"{manifest.seconds:.1f} s"),
        ("peak memory", f"{manifest.peak_memory_bytes / 2**20:,.0f} MiB"),
        ("key", code(manifest.key)),
        ("files", f"{len(manifest.files)}, {manifest.bytes / 1e6:,.1f} MB"),
        ("made", f"{manifest.created[:16].replace('T', ' ')} UTC on {escape(manifest.host)}"),
    ]
    return "\n\n".join(
        part
        for part in (
            table((f"this {identity.step}", ""), about),
            table(("made from", "key"), lineage),
            listed("All metrics", manifest.metrics),
            listed("Settings", identity.config),
            f"Made with {escape(', '.join(f'{name} {version}' for name, version in manifest.libraries.items()))}.",
        )
        if part
    )


def report(manifest: Manifest, own: str | None, links: Mapping[str, str] | None = None, more: str = "") -> str:
    """A step's own REPORT.md where it wrote one, else its metrics; under it the facts."""
    if own is None:
        own = f"# {manifest.step}"
    return "\n\n".join(part for part in (own.strip(), more, facts(manifest, links)) if part) + "\n"


def report_place(key: str, path: str, environment: Mapping[str, str] = os.environ) -> str:
    """Where the full HTML report of an evaluation opens, as Markdown. A page from http cannot open file://, so without a
    server of files it is the path and a command."""
    base = environment.get("STACKRLHF_REPORTS_URL", "").rstrip("/")
    if base:
        return f"[The full report]({base}/evaluate/{key}/report.html) with every table, sample and plot"
    command = code(f"stackrlhf report {key[:SHORT]} --open")
    return f"The full report with every table, sample and plot: {command}, or this file:\n\n```text\n{path}\n```"


def bounded(text: str, most: int = LARGEST_PAGE) -> str:
    """Within what the API takes: the last pictures go first, then the end of the text."""
    picture = re.compile(r"!\[([^\]]*)\]\(data:[^)]*\)")
    while len(text.encode()) > most and (found := list(picture.finditer(text))):
        last = found[-1]
        text = f"{text[: last.start()]}*{last[1]}: too large to show here*{text[last.end() :]}"
    if len(text.encode()) > most:
        text = text.encode()[: most - 100].decode(errors="ignore") + "\n\n*The rest is too large to show here.*\n"
    return text


def without_secrets(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """No password in an address, no signature after one, no value that this process's environment holds as a secret."""
    for name, value in environment.items():
        if SECRET.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    text = re.sub(r"(://)[^/\s@:]*:[^/\s@]*@", r"\1***@", text)
    return re.sub(r"((?:X-Amz-[A-Za-z]+|Signature|sig|token|access_token|api_key|password)=)[^&\s\"'|)\]]+", r"\1***", text)


# ---- Markdown


def table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> str:
    """Cells are Markdown already; `align`: a letter a column, r for numbers."""
    if not rows:
        return ""
    dashes = ["---:" if align[i : i + 1] == "r" else "---" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, dashes, *rows))


def listed(title: str, values: Mapping[str, Any]) -> str:
    """Many names with their values, a line each."""
    rows = [(name, " ".join(plain(value).split())) for name, value in flat(values)]
    if not values:
        return ""
    width = max(len(name) for name, _ in rows)
    lines = "\n".join(f"{name:{width}}  {value}" for name, value in rows).replace("```", "'''")
    return f"## {title}\n\n```text\n{lines}\n```"


def escape(text: str) -> str:
    """Text of people, models or files in a line of Markdown: nothing in it is markup or a tag."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def cell(text: str, width: int = 40, most: int = 1200) -> str:
    """Such text in a table's cell, with its lines, broken at `width` because cells do not break; cut where longer than `most`."""
    cut = text[:most] + ("…" if len(text) > most else "")
    lines = [part for line in cut.strip().splitlines() for part in textwrap.wrap(line, width, replace_whitespace=False) or [""]]
    return "<br>".join(escape(line) for line in lines)


def code(text: str) -> str:
    """As code, in a line or a cell."""
    return f"`{' '.join(text.replace('`', chr(39)).replace('|', '/').split())}`"


def plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else "none" if value is None else str(value)


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as rows of dotted names."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _count(done: int, total: int) -> str:
    """Of steps as they are; of bytes, in MB."""
    return f"{done:,} of {total:,}" if total < 10**7 else f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB"


def _first(metrics: Mapping[str, float]) -> dict[str, float]:
    """The telling ones first."""
    return {name: metrics[name] for name in (*(n for n in CURVES if n in metrics), *(n for n in metrics if n not in CURVES))}
