"""The data card: what was read, what became of it, how far trivial rules get, and whom to credit."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.ingest import changes
from tasks.ingest.config import IngestConfig
from tasks.ingest.partitions import SPLITS
from tasks.ingest.posts import LICENCE_URLS, host_of
from tasks.ingest.rows import Bad
from tasks.ingest.sources import File
from tasks.ingest.writer import MOST_AUTHORS

BASELINES = {
    "longer": "longer answer wins",
    "earlier": "earlier answer wins",
    "more markup": "more markup wins",
}


OTHER_KINDS = {3: "orphaned tag wiki", 4: "tag wiki excerpt", 5: "tag wiki", 6: "moderator nomination", 7: "wiki placeholder",
               8: "privilege wiki"}  # fmt: skip


@dataclass
class Table:
    """What became of a table's rows: rows == used + quarantined."""

    file: str
    rows: int = 0
    repaired: int = 0
    quarantined: int = 0
    first_bad: Bad | None = None
    cut: str | None = None
    """Where and how it ends too early."""


@dataclass
class Summary:
    """One site, after both stages."""

    site: str
    files: list[File]
    tables: dict[str, Table]
    counts: Counter[str]
    authors: set[tuple[str, str]]
    """(name, profile)"""
    newest: str


def write(
    config: IngestConfig, summaries: list[Summary], *, best_possible: float | None, changed: dict[str, Any] | None, out: Path
) -> dict[str, Any]:
    """card.json, CARD.md, NOTICE.md and REPORT.md; the headline metrics come back."""
    card = make_card(config, summaries, best_possible) | {"changes": changed}
    (out / "card.json").write_text(json.dumps(card, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    text = _markdown(card)
    (out / "CARD.md").write_text(text, encoding="utf-8")
    (out / "REPORT.md").write_text(_with_picture(text, card), encoding="utf-8")
    (out / "NOTICE.md").write_text(_notice(card, summaries), encoding="utf-8")
    total, rows = card["total"], card["rows"]
    metrics = {
        "rows": rows["read"],
        "rows/quarantined": rows["quarantined"],
        "rows/repaired": rows["repaired"],
        "questions/read": rows["questions"],
        "answers/read": rows["answers"],
        **{name: total[name] for name in ("questions", "answers", "questions_with_pairs", "pairs")},
        **{f"baseline/{name}": value for name, value in total["baselines"].items()},
        "eval/pairs": card["splits"]["eval"]["pairs"],
    }
    return metrics if best_possible is None else {**metrics, "best_possible_accuracy": best_possible}


def make_card(config: IngestConfig, summaries: list[Summary], best_possible: float | None) -> dict[str, Any]:
    from tasks.ingest.simulated.truth import SITE

    counts = _merged(summary.counts for summary in summaries)
    authors = {author for summary in summaries for author in summary.authors}
    shares = {str(split): share for split, share in config.splits.items()}
    known = all(len(summary.authors) <= MOST_AUTHORS for summary in summaries) and len(authors) <= MOST_AUTHORS
    return {
        "simulated": {summary.site for summary in summaries} == {SITE},
        "best_possible_accuracy": best_possible,
        "incomplete": any(table.cut for summary in summaries for table in summary.tables.values()),
        "settings": {
            "converter": config.converter,
            "questions": config.questions,
            "weights": config.weights,
            "near_duplicates": config.near_duplicates,
            "max_pairs": config.max_pairs,
            "splits": {split: shares[split] for split in SPLITS},
        },
        "sites": {summary.site: _site(summary) for summary in summaries},
        "rows": _rows(summaries, counts),
        "left_out": _left_out(counts),
        "bodies": {"converted": counts["bodies"], "by_markdownify": counts["bodies by markdownify"]},
        "clustered_questions": counts["clustered"],
        "contaminated_questions": sum(counts[f"{split} contaminated"] for split in SPLITS),
        "splits": {split: _split(counts, (split,)) for split in SPLITS},
        "total": _split(counts, SPLITS),
        "score_gaps": {f"{gap}+" if gap == 5 else str(gap): counts[f"gap {gap}"] for gap in range(1, 6)},
        "licences": {name.removeprefix("licence "): counts[name] for name in sorted(counts) if name.startswith("licence ")},
        "authors": len(authors) if known else None,
    }


def _merged(counters: Any) -> Counter[str]:
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return total


def _site(summary: Summary) -> dict[str, Any]:
    return {
        "host": host_of(summary.site),
        "dump_date": summary.newest or None,
        "files": {file.name: file.packed for file in summary.files},
        "tables": {
            name: {
                "file": table.file,
                "rows": table.rows,
                "repaired": table.repaired,
                "quarantined": table.quarantined,
                "cut": table.cut,
            }
            for name, table in summary.tables.items()
        },
        **_split(summary.counts, SPLITS),
    }


def _rows(summaries: list[Summary], counts: Counter[str]) -> dict[str, int]:
    """Of the Posts tables: read == questions + answers + other + quarantined."""
    tables = [summary.tables["posts"] for summary in summaries]
    return {
        "read": sum(table.rows for table in tables),
        "questions": counts["questions"],
        "answers": counts["answers"],
        "other": counts["other"],
        "quarantined": sum(table.quarantined for table in tables),
        "repaired": sum(table.repaired for table in tables),
    }


def _left_out(counts: Counter[str]) -> dict[str, int]:
    """Rows that were read and are in no record, by reason."""
    kinds = {name: count for name, count in counts.items() if name.startswith("kind ")}
    numbers = sorted(int(name.removeprefix("kind ")) for name in kinds)
    return {
        **{f"other: {OTHER_KINDS.get(number, f'post type {number}')}": kinds[f"kind {number}"] for number in numbers},
        "other: fabricated": counts["fabricated"],
        "answers to questions that are not there": counts["orphans"],
        "answers without text": counts["answers without text"],
        "questions without text": counts["questions without text"],
        "questions without an answer": counts["unanswered"],
        "questions without a pair": counts["without a pair"],
        "questions left out by ingest.weights": counts["left out by weight"],
        "questions with a near-duplicate": counts["near-duplicates"],
        "rows that stood there twice": counts["twice"],
    }


def _split(counts: Counter[str], splits: tuple[str, ...]) -> dict[str, Any]:
    def total(name: str) -> int:
        return sum(counts[f"{split} {name}"] for split in splits)

    pairs = total("pairs")
    return {
        "questions": total("questions"),
        "answers": total("answers"),
        "questions_with_pairs": total("questions with pairs"),
        "pairs": pairs,
        # Wins are counted double and ties once: a tie is half a win.
        "baselines": {name.replace(" ", "_"): total(name) / (2 * pairs) for name in BASELINES} if pairs else {},
    }


def _markdown(card: dict[str, Any]) -> str:
    rows = card["rows"]
    names = ", ".join(card["sites"])
    lines = [
        f"# Data card: {names}",
        "",
        *(["**Incomplete**: a dump was cut, and only what stands before the cut was read.", ""] if card["incomplete"] else []),
        *(["Written by the simulator: nobody's content.", ""] if card["simulated"] else []),
        *_table(
            ("split", "questions", "answers", "with pairs", "pairs", *(BASELINES.values())),
            [_line(name, split) for name, split in (*card["splits"].items(), ("total", card["total"]))],
        ),
        "",
        "Baselines: how often a rule that reads nothing picks the answer that people preferred; ties count as half."
        + (f" No reader of the text can be right on more than {card['best_possible_accuracy']:.1%} of the pairs of split eval."
           if card["best_possible_accuracy"] is not None else ""),
        "",
        "## Rows",
        "",
        f"{rows['read']:,} rows of Posts = {rows['questions']:,} questions + {rows['answers']:,} answers + {rows['other']:,} other"
        f" + {rows['quarantined']:,} in quarantine; {rows['repaired']:,} repaired.",
        "",
        *_table(("left out", "rows"), [(name, f"{count:,}") for name, count in card["left_out"].items() if count]),
        "",
        f"{card['bodies']['converted']:,} bodies converted, {card['bodies']['by_markdownify']:,} of them by markdownify. "
        f"{card['clustered_questions']:,} questions have duplicates, which stay in one split."
        + (f" {card['contaminated_questions']:,} share text with the evaluation sets: column `contaminated`."
           if card["contaminated_questions"] else ""),
        "",
        *(changes.lines(card["changes"]) if card["changes"] else []),
        "## Sites",
        "",
        *_table(
            ("site", "last activity", "file", "rows", "repaired", "quarantined", "cut"),
            [
                (name, site["dump_date"] or "", _plain(table["file"]), f"{table['rows']:,}", table["repaired"],
                 table["quarantined"], _plain(table["cut"] or ""))
                for name, site in card["sites"].items()
                for table in site["tables"].values()
            ],
        ),
        "",
        "## Votes and licences",
        "",
        *_table(("pm_score apart by", "pairs"), [(gap, f"{count:,}") for gap, count in card["score_gaps"].items()]),
        "",
        *_table(("licence", "posts"), [(_plain(name), f"{count:,}") for name, count in card["licences"].items()]),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _with_picture(text: str, card: dict[str, Any]) -> str:
    """The card as the dashboard shows it: under its first table, splits, votes and baselines at a glance."""
    if not card["total"]["pairs"]:
        return text
    from tasks.curves import LINES, MUTED, finish, image, sheet

    figure, (splits, gaps, rules) = sheet(1, 3, width=2.7, height=2.3)
    shares = {name: split["questions"] for name, split in card["splits"].items()}
    splits.bar(list(shares), list(shares.values()), color=LINES[0], width=0.7)
    finish(splits, "Questions per split", x=False)
    gaps.bar(list(card["score_gaps"]), list(card["score_gaps"].values()), color=LINES[2], width=0.7)
    finish(gaps, "Pairs by pm_score apart", x=False)
    baselines = {name: 100 * value for name, value in card["total"]["baselines"].items()}
    if card["best_possible_accuracy"] is not None:
        baselines["best possible"] = 100 * card["best_possible_accuracy"]
    rules.barh([name.replace("_", " ") for name in baselines], list(baselines.values()), color=LINES[4], height=0.6)
    rules.axvline(50, color=MUTED, linewidth=1)
    rules.set_xlim(min(40, *baselines.values()) - 5, 100)
    rules.invert_yaxis()
    rules.set_title("Right by a rule (%)", fontsize=9, fontweight="bold", loc="left")
    picture = image(figure, "questions per split, pairs by score gap, baselines")
    text = text.replace("| left out | rows |\n| --- | --- |\n\n", "")  # a table without rows is drawn as a dot
    before, rest = text.split("\n## Rows\n", 1)
    return f"{before}\n{picture}\n\n## Rows\n{rest}"


def _line(name: str, split: dict[str, Any]) -> tuple[str, ...]:
    baselines = [f"{split['baselines'][key.replace(' ', '_')]:.1%}" if split["baselines"] else "" for key in BASELINES]
    return (name, *(f"{split[key]:,}" for key in ("questions", "answers", "questions_with_pairs", "pairs")), *baselines)


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ("---",) * len(head), *rows)]


def _plain(text: str) -> str:
    """Foreign text that cannot become markup."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(text.split()))


def _notice(card: dict[str, Any], summaries: list[Summary]) -> str:
    if card["simulated"]:
        return "# Notice\n\nThis site was written by stackrlhf's simulator. Its text and names are nobody's; use them freely.\n"
    sites = ", ".join(f"{name} (today https://{site['host']})" for name, site in card["sites"].items())
    authors = sorted({author for summary in summaries for author in summary.authors}, key=lambda a: (a[0].casefold(), a))
    link: Callable[[str], str] = lambda url: f" <{url}>" if url else ""  # noqa: E731
    lines = [
        "# Notice",
        "",
        f"The questions and answers in this folder were written by the users of the Stack Exchange Network, on {sites}.",
        "Their text was converted from HTML to Markdown, and pairs of answers were ordered by votes; nothing else was changed.",
        "",
        "## Licences",
        "",
        *(f"- {_plain(name)}: {count:,} posts{link(LICENCE_URLS.get(name, ''))}" for name, count in card["licences"].items()),
        "",
        "Column `licence` says which applies to a post. These licences ask you to name the author and the source, to link to the",
        "licence, to say what you changed, and to share what you adapt under the same licence.",
        "",
        "## How to attribute",
        "",
        "Name and link, for every post that you show or pass on: its author (`author`, `author_profile`), the post (`url` of the",
        "question; `https://<site>/a/<answer_id>` for an answer) and its licence (`licence`). Where an author has no name, the",
        "profile's address stands for it.",
        "",
        "## Authors",
        "",
    ]
    if card["authors"] is None:
        lines.append(f"More than {MOST_AUTHORS:,}; columns `author` and `author_profile` name the author of every post.")
    else:
        lines.extend(f"- {_plain(name) or 'a user'}{link(profile)}" for name, profile in authors)
    return "\n".join(lines) + "\n"
