"""What changed between an older ingest artifact and a newer one: questions, answers, votes, pairs, and where a split moved."""

import heapq
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from tasks.ingest.pairs import key

COLUMNS = (
    "qid", "title", "question", "split", "cluster", "cluster_site", "pairs",
    *(f"answers.list.element.{name}" for name in ("answer_id", "text", "pm_score", "votes", "selected")),
)  # fmt: skip
ROWS = 256  # of one file, held at once
BUFFER = 1 << 20  # bytes of a column, held at once
MOST_LISTED = 1_000  # questions that moved between splits
MOST_VOTES = 6  # larger changes are counted together
JOINED, PARTED, SHARES = "joined a cluster", "left a cluster", "ingest.splits is another"
QUESTIONS = ("before", "now", "same", "changed", "changed title", "changed body", "new", "gone", "changed split")
ANSWERS = (
    "before", "now", "same body", "changed body", "new", "new with the question", "gone", "gone with the question", "changed votes",
    "changed pm_score", "accepted now", "accepted no more",
)  # fmt: skip
PAIRS = ("before", "now", "kept", "reversed", "new", "gone")
VOTES = (f"-{MOST_VOTES} or less", *map(str, range(1 - MOST_VOTES, 0)), *map(str, range(1, MOST_VOTES)), f"{MOST_VOTES} or more")
GAPS, ORDERS = ("1", "2", "3 or more"), ("kept", "tied", "reversed")


def check(folder: Path) -> None:
    """ValueError where the folder is not that of an ingest artifact: before a long run, not at its end."""
    remedy = "ingest.previous must be the folder of an older ingest artifact, with questions/ and card.json in it"
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder; {remedy}")
    missing = [name for name in ("questions", "card.json") if not (folder / name).exists()]
    if missing:
        raise ValueError(f"{folder}: {' and '.join(missing)} not found; {remedy}")
    manifest = folder / "manifest.json"
    if manifest.exists():
        step = json.loads(manifest.read_text(encoding="utf-8"))["identity"]["step"]
        if step != "ingest":
            raise ValueError(f"{folder}: this is an artifact of {step}; {remedy}")


def compare(previous: Path, now: Path) -> dict[str, Any]:
    """The changes of every site and their total, as plain numbers; ValueError where `previous` is no ingest artifact.

    Both are read side by side, in their common order (the hash of the question): memory is a row group of each split and side,
    some 330 MB, however large the site. An answer that was moved to another question counts as gone there and new here.
    """
    check(previous)
    counts: dict[str, Counter[str]] = {}
    moved: list[dict[str, Any]] = []
    for site in sorted({path.name.removeprefix("site=") for folder in (previous, now) for path in folder.glob("questions/site=*")}):
        counts[site] = Counter()
        for before, after in _joined(_questions(previous, site), _questions(now, site)):
            _count(site, before, after, counts[site], moved)
    total = sum(counts.values(), Counter[str]())
    return {
        "sites": {site: _numbers(count) for site, count in counts.items()},
        "total": _numbers(total),
        "moved": moved[:MOST_LISTED],
        "moved_reasons": {reason: total[f"moved: {reason}"] for reason in (JOINED, PARTED, SHARES)},
    }


class _Question(NamedTuple):
    place: int
    """The hash that the rows are sorted by."""
    qid: int
    row: dict[str, Any]


def _questions(folder: Path, site: str) -> Iterator[_Question]:
    """The questions of all splits of a site, by hash."""
    splits = sorted(folder.glob(f"questions/site={site}/split=*"))
    return heapq.merge(*(_stream(sorted(split.glob("*.parquet")), site) for split in splits), key=lambda q: q[:2])


def _stream(files: Sequence[Path], site: str) -> Iterator[_Question]:
    last = (-1, -1)
    for path in files:
        with pq.ParquetFile(path, buffer_size=BUFFER) as file:
            known = {file.schema.column(number).path for number in range(len(file.schema))}
            columns = [name for name in COLUMNS if name in known or f"{name}.list.element.j" in known]
            for batch in file.iter_batches(ROWS, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    question = _Question(key(site, row["qid"]), row["qid"], row)
                    if question[:2] <= last:
                        raise ValueError(
                            f"{path}: its rows are not in the order of this version of ingest: make it anew to compare"
                        )
                    last = question[:2]
                    yield question


def _joined(
    before: Iterator[_Question], after: Iterator[_Question]
) -> Iterator[tuple[dict[str, Any] | None, dict[str, Any] | None]]:
    """The rows of the same question on both sides, or of one that stands on one side."""
    old, new = next(before, None), next(after, None)
    while old or new:
        if new is None or (old and old[:2] < new[:2]):
            assert old
            yield old.row, None
            old = next(before, None)
        elif old is None or new[:2] < old[:2]:
            yield None, new.row
            new = next(after, None)
        else:
            yield old.row, new.row
            old, new = next(before, None), next(after, None)


def _count(
    site: str, before: dict[str, Any] | None, after: dict[str, Any] | None, counts: Counter[str], moved: list[dict[str, Any]]
) -> None:
    for row, when in ((before, "before"), (after, "now")):
        if row:
            counts[f"questions {when}"] += 1
            counts[f"answers {when}"] += len(row["answers"])
            counts[f"pairs {when}"] += len(row["pairs"])
    if before is None or after is None:
        what, row = ("gone", before) if before else ("new", after)
        assert row
        counts[f"questions {what}"] += 1
        counts[f"answers {what}"] += len(row["answers"])
        counts[f"answers {what} with the question"] += len(row["answers"])
        counts[f"pairs {what}"] += len(row["pairs"])
        return
    title = before["title"] != after["title"]
    body = _body(before) != _body(after)
    counts["questions changed title"] += title
    counts["questions changed body"] += body
    counts["questions changed" if title or body else "questions same"] += 1
    if before["split"] != after["split"]:
        roots = [(row.get("cluster_site") or site, row["cluster"]) for row in (before, after)]
        reason = SHARES if roots[0] == roots[1] else JOINED if roots[1] < roots[0] else PARTED
        counts["questions changed split"] += 1
        counts[f"moved: {reason}"] += 1
        if len(moved) < MOST_LISTED:
            names = [f"{root_site}/{root}" for root_site, root in roots]
            moved.append(
                {"site": site, "qid": before["qid"], "from": before["split"], "to": after["split"], "reason": reason,
                 "root_before": names[0], "root_now": names[1]}
            )  # fmt: skip
    old, new = ({answer["answer_id"]: answer for answer in row["answers"]} for row in (before, after))
    _count_answers(old, new, counts)
    _count_pairs(before, after, old, new, counts)


def _body(row: dict[str, Any]) -> str:
    """The Markdown without the title above it."""
    question: str = row["question"]
    return question.removeprefix(row["title"] or "").lstrip("\n")


def _count_answers(old: dict[int, dict[str, Any]], new: dict[int, dict[str, Any]], counts: Counter[str]) -> None:
    counts["answers gone"] += len(old.keys() - new.keys())
    counts["answers new"] += len(new.keys() - old.keys())
    for number in old.keys() & new.keys():
        was, now = old[number], new[number]
        counts["answers same body" if was["text"] == now["text"] else "answers changed body"] += 1
        if change := now["votes"] - was["votes"]:
            counts["answers changed votes"] += 1
            most = f"{MOST_VOTES} or more" if change > 0 else f"-{MOST_VOTES} or less"
            counts[f"votes {most if abs(change) >= MOST_VOTES else change}"] += 1
        counts["answers changed pm_score"] += was["pm_score"] != now["pm_score"]
        if was["selected"] != now["selected"]:
            counts["answers accepted now" if now["selected"] else "answers accepted no more"] += 1


def _count_pairs(
    before: dict[str, Any], after: dict[str, Any], old: dict[int, Any], new: dict[int, Any], counts: Counter[str]
) -> None:
    drawn, now = (
        {(row["answers"][pair["j"]]["answer_id"], row["answers"][pair["k"]]["answer_id"]) for pair in row["pairs"]}
        for row in (before, after)
    )
    kept, reversed_ = len(drawn & now), sum((k, j) in now for j, k in drawn)
    counts["pairs kept"] += kept
    counts["pairs reversed"] += reversed_
    counts["pairs gone"] += len(drawn) - kept - reversed_
    counts["pairs new"] += len(now) - kept - reversed_
    for j, k in drawn:
        if j in new and k in new:
            gap = old[j]["pm_score"] - old[k]["pm_score"]
            today = new[j]["pm_score"] - new[k]["pm_score"]
            counts[f"gap {GAPS[min(gap, 3) - 1]} {'kept' if today > 0 else 'reversed' if today else 'tied'}"] += 1


def _numbers(counts: Counter[str]) -> dict[str, Any]:
    def part(name: str, fields: Sequence[str]) -> dict[str, int]:
        return {field.replace(" ", "_"): counts[f"{name} {field}"] for field in fields}

    return {
        "questions": part("questions", QUESTIONS),
        "answers": part("answers", ANSWERS),
        "votes": {change: counts[f"votes {change}"] for change in VOTES},
        "pairs": part("pairs", PAIRS),
        # Of the pairs drawn before whose two answers are both still there, whatever was drawn now: people's order today.
        "order": {gap: {order: counts[f"gap {gap} {order}"] for order in ORDERS} for gap in GAPS},
    }


def lines(changes: dict[str, Any]) -> list[str]:
    """The changes for CARD.md, from what compare gave."""
    columns = {"total": changes["total"], **(changes["sites"] if len(changes["sites"]) > 1 else {})}
    rows = [
        (f"{part} {field.replace('_', ' ')}".replace("pm score", "pm\\_score"), [f"{n[part][field]:,}" for n in columns.values()])
        for part in ("questions", "answers", "pairs")
        for field in changes["total"][part]
    ]  # fmt: skip
    total = changes["total"]
    moved = total["questions"]["changed_split"]
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in changes["moved_reasons"].items() if count)
    return [
        "## Since the previous dump",
        "",
        f"| | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
        *(f"| {name} | {' | '.join(values)} |" for name, values in rows if set(values) != {"0"}),
        "",
        f"Votes of answers changed by: {_listed(total['votes']) or 'nothing'}.",
        "",
        "Order of the pairs drawn before, by their pm\\_score gap then: "
        + "; ".join(f"{gap}: {_listed(orders) or 'none'}" for gap, orders in total["order"].items())
        + ".",
        "",
        f"{moved:,} questions stand in another split than before" + (f": {reasons}." if moved else "."),
        *(
            f"- {entry['site']}/{entry['qid']}: {entry['from']} to {entry['to']}, {entry['reason']} "
            f"(root {entry['root_before']}, now {entry['root_now']})"
            for entry in changes["moved"][:20]
        ),
        "",
    ]


def _listed(numbers: dict[str, int]) -> str:
    return ", ".join(
        f"{name} ({count:,})" if name not in ORDERS else f"{count:,} {name}" for name, count in numbers.items() if count
    )
