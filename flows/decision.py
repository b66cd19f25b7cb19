"""What retraining came to: a numbered record in the store, which outlives Prefect, and a page for its dashboard.

<store>/pointers/<champion>.retrain/    a file a look at the source; the next look compares with the newest that did not fail
"""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from flows.show import duration
from tasks.artifacts import Manifest, Store, StoreError, canonical
from tasks.manifest import sha256

logger = logging.getLogger(__name__)

TRIES = 50
SMALLEST_SHARE = 0.9
"""A dump with fewer of a site's questions than this share of the champion's was most likely cut on its way. Sites lose a few."""
WORDS = {
    "nothing-new": "Nothing new",
    "refused": "Refused",
    "promoted": "Promoted",
    "kept": "Not promoted",
    "failed": "Failed",
}
CHANGES = {
    "questions": ("before", "now", "new", "gone", "changed", "changed_split"),
    "answers": ("before", "now", "new", "gone", "changed_body", "changed_votes"),
    "pairs": ("before", "now", "new", "gone", "reversed"),
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # a record of a later version can still be read


class File(_Part):
    """A file at the source. `mark`: what differs between two versions of it."""

    where: str
    site: str
    mark: str | None


class Data(_Part):
    """What an ingest artifact holds."""

    key: str
    digest: str
    """Of the questions and pairs alone: the same dump packed anew gives the same."""
    dates: dict[str, str | None]
    """Site -> day of its newest post."""
    questions: dict[str, int]
    """Site -> questions."""


class Decision(_Part):
    """One look at the source, and what followed."""

    word: Literal["nothing-new", "refused", "promoted", "kept", "failed"]
    reason: str
    source: tuple[str, ...] = ()
    files: tuple[File, ...] = ()
    passed_over: tuple[str, ...] = ()
    config: str = ""
    """The preset's name."""
    ingest: str = ""
    """Digest of the settings of ingest: other settings make other data of the same dump."""
    data: Data | None = None
    """What was ingested; of a look that found nothing new: what is known already."""
    against: Literal["champion", "challenger", ""] = ""
    """Whose data the changes are counted from: the champion's, or the last challenger's where there is no champion."""
    changes: dict[str, dict[str, int]] = {}
    moved_into_eval: int = 0
    """Questions that are held out now and were not before: the champion may have learnt from them."""
    verdict: dict[str, Any] | None = None
    champion: str | None = None
    """Key of the champion's policy before; of ppo."""
    challenger: str | None = None
    report: str | None = None
    flow_run: str | None = None
    seconds: float = 0.0

    @property
    def title(self) -> str:
        return WORDS[self.word]


class Record(_Part):
    """A decision as it stands in the store."""

    number: int
    time: str
    decision: Decision


def log_name(pointer: str) -> str:
    return f"{pointer}.retrain"


def write(store: Store, pointer: str, decision: Decision) -> int:
    """Append to the store's records; returns its number. Two at once get two numbers."""
    name = log_name(pointer)
    for _ in range(TRIES):
        number = store.pointer_number(name)
        if store.move_pointer(name, decision.model_dump(mode="json"), number):
            return number + 1
    raise StoreError(f"{store.uri}: pointers/{name} was written by others {TRIES} times in a row: run again")


def records(store: Store, pointer: str) -> Iterator[Record]:
    """The newest first."""
    for one in store.pointer_history(log_name(pointer)):
        try:
            yield Record(number=one.number, time=one.moved, decision=Decision.model_validate(one.to))
        except ValidationError as error:
            logger.warning("%s %d cannot be read (%s); the one before it counts", log_name(pointer), one.number, error.errors()[0])


def settled(store: Store, pointer: str) -> Record | None:
    """The newest look that came to an end."""
    return next((record for record in records(store, pointer) if record.decision.word != "failed"), None)


def last_training(store: Store, pointer: str) -> Record | None:
    """The newest look that trained a challenger."""
    return next((record for record in records(store, pointer) if record.decision.word in {"promoted", "kept"}), None)


# ---- the data


def data_of(manifest: Manifest, folder: Path) -> Data:
    """What an ingest artifact holds."""
    sites = json.loads((folder / "card.json").read_text(encoding="utf-8"))["sites"]
    dates = {site: about["dump_date"] for site, about in sites.items()}
    questions = {site: about["questions"] for site, about in sites.items()}
    return Data(key=manifest.key, digest=_digest(manifest), dates=dates, questions=questions)


def keys_of(manifest: Manifest | None) -> Data | None:
    """What a manifest alone says, so that nothing has to be fetched."""
    return Data(key=manifest.key, digest=_digest(manifest), dates={}, questions={}) if manifest else None


def _digest(manifest: Manifest) -> str:
    """Of questions and pairs; the data card beside them also names files."""
    tables = {path: entry.sha256 for path, entry in manifest.files.items() if path.startswith(("questions/", "pairs/"))}
    return sha256(canonical(tables))


def suspicions(now: Data, before: Data, whose: str) -> list[str]:
    """Why `now` cannot be the newer data, a line a site."""
    lines = []
    for site, questions in before.questions.items():
        date, older = now.dates.get(site), before.dates.get(site)
        if site not in now.questions:
            lines.append(f"{site} is not there, and {whose} data have {questions:,} questions of it")
        elif date and older and date < older:
            lines.append(f"the dump of {site} is older than {whose} data: its newest post is of {date}, theirs of {older}")
        elif now.questions[site] < SMALLEST_SHARE * questions:
            lines.append(f"the dump of {site} gives {now.questions[site]:,} questions and {whose} data {questions:,}: it seems cut")
    return lines


# ---- the page


def page(decision: Decision, pointer: str, store: Store) -> str:
    """Markdown for the dashboard."""
    lines = [f"# {decision.title}", "", decision.reason, ""]
    lines += ["## What was looked at", ""]
    if decision.files:
        files = [(file.site, file.where, file.mark or "not told by the server") for file in decision.files]
        lines += _table(("site", "file", "version"), files)
    else:
        lines += [", ".join(decision.source) or "nothing"]
    lines += ["", *(f"- {line}" for line in decision.passed_over), ""]
    if data := decision.data:
        sites = [(site, date or "", f"{data.questions.get(site, 0):,}") for site, date in data.dates.items()]
        lines += ["## The data", "", *_table(("site", "newest post", "questions"), sites), ""]
    if decision.changes:
        whose = "the champion was trained on" if decision.against == "champion" else "the last challenger was trained on"
        lines += [f"Since the data that {whose}:", ""]
        rows = [
            (part, *(f"{decision.changes[part].get(name, 0):,}" if name in names else "" for name in _columns()))
            for part, names in CHANGES.items()
            if part in decision.changes
        ]
        lines += [*_table(("", *(name.replace("_", " ") for name in _columns())), rows), ""]
        if decision.moved_into_eval:
            lines += [
                f"**{decision.moved_into_eval:,} questions are held out now that were not before: the champion may have learnt "
                "from them, which can only help the champion.**",
                "",
            ]
    if decision.verdict:
        lines += ["## The verdict", "", *_verdict(decision.verdict), ""]
    about = {
        "champion before": decision.champion or "none",
        "challenger": decision.challenger or "none was trained",
        "report": decision.report,
        "ingest": data.key if data else None,
        "preset": decision.config,
        "pointer": pointer,
        "store": store.uri,
        "seconds": duration(decision.seconds),
    }
    lines += ["## Keys", "", *_table(("", ""), [(name, f"`{value}`") for name, value in about.items() if value]), ""]
    return "\n".join(lines)


def _columns() -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for names in CHANGES.values() for name in names))


def _verdict(verdict: dict[str, Any]) -> list[str]:
    rows = []
    for whom, one in (("the champion", verdict.get("champion")), ("its own SFT model", verdict)):
        if one and one.get("interval"):
            low, high = one["interval"]
            rows.append((whom, one["word"], f"{one['gain']:+.3f}", f"{low:+.3f} to {high:+.3f}", one.get("by", "")))
    return _table(("challenger against", "verdict", "gain", "interval", "judged by"), rows)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in (head, ("---",) * len(head), *rows)]


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
