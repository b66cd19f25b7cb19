"""The two stages between a dump and its records: rows into hash partitions, then each partition to records on its own.

Nothing here depends on the order of rows, on how many partitions there are, or on which process takes which.
"""

import datetime
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import zstandard

from tasks.ingest import posts
from tasks.ingest.index import look_up
from tasks.ingest.markdown import convert
from tasks.ingest.pairs import choose_pairs, key, markup, split_of
from tasks.ingest.posts import Post
from tasks.ingest.writer import Pieces

PARTITION_BYTES = 48_000_000  # of Posts.xml; a worker needs some 420 MB at that
SPILL_BYTES = 32_000_000  # rows held before they are written out
Row = re.Match[bytes]  # of posts.POSTS.strict: much smaller than what it says
SPLITS = ("sft", "reward", "rl", "eval")
MOST_AUTHORS = 20_000  # named in NOTICE.md; beyond that the columns have to do


def count_partitions(size: int) -> int:
    """Partitions for a Posts.xml of `size` bytes."""
    return max(1, math.ceil(size / PARTITION_BYTES))


class Spill:
    """Rows by hash of their question, packed, in one scratch file a partition."""

    def __init__(self, folder: Path, site: str, partitions: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.paths = [folder / f"rows-{number:05}.zst" for number in range(partitions)]
        self._site = site
        self._held: list[list[bytes]] = [[] for _ in self.paths]
        self._size = 0
        self._packer = zstandard.ZstdCompressor(level=1)

    def add(self, qid: int, row: bytes) -> None:
        # By the hash's high end: partitions in their order, each sorted by hash, are the site sorted by hash.
        self._held[key(self._site, qid) * len(self.paths) >> 64].append(row)
        self._size += len(row) + 100
        if self._size > SPILL_BYTES:
            self.flush()

    def flush(self) -> None:
        for path, rows in zip(self.paths, self._held, strict=True):
            if rows:
                with path.open("ab") as file:
                    file.write(self._packer.compress(b"\n".join(rows) + b"\n"))
        self._held, self._size = [[] for _ in self.paths], 0


@dataclass(frozen=True)
class Partition:
    """All that a worker needs to turn one partition into records: small, and the same for every executor."""

    number: int
    site: str
    rows: Path
    index: Path
    pieces: Path  # folder for what it makes
    converter: Literal["stackexchange", "markdownify"]
    max_pairs: int
    shares: Mapping[str, float]
    dump_date: datetime.date


@dataclass
class Outcome:
    """What a worker hands back: counts, the authors' names, and how many questions of each split it wrote."""

    number: int
    counts: Counter[str]
    authors: set[tuple[str, str]]
    records: dict[str, int]


def piece(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:05}.arrow"


def process(partition: Partition) -> Outcome:
    """Join, score and pair the answers; convert what is kept; write the records, sorted by the hash of the question."""
    counts: Counter[str] = Counter()
    authors: set[tuple[str, str]] = set()
    questions, answers = _load(partition.rows, counts)
    everyone = itertools.chain(questions.values(), *(group.values() for group in answers.values()))
    users = {int(row[posts.OWNER]) for row in everyone if row[posts.OWNER]}
    names, clusters = look_up(partition.index, users, set(questions))
    out = {split: Pieces(piece(partition.pieces, split, partition.number)) for split in SPLITS}
    maker = _Maker(partition, names, clusters, counts)
    for qid in sorted(questions, key=lambda q: key(partition.site, q)):
        if qid not in answers:
            counts["unanswered"] += 1
            continue
        answered = [posts.parse_post(row) for _, row in sorted(answers.pop(qid).items())]
        record = maker.record(posts.parse_post(questions.pop(qid)), answered)
        if record is None:
            continue
        out[record["split"]].add(record)
        if len(authors) <= MOST_AUTHORS:
            credited = [record, *record["answers"]]
            authors |= {(c["author"] or "", c["author_profile"] or "") for c in credited if c["author"] or c["author_profile"]}
    counts["orphans"] += sum(map(len, answers.values()))
    for pieces in out.values():
        pieces.close()
    return Outcome(partition.number, counts, authors, {name: pieces.rows for name, pieces in out.items()})


def _load(path: Path, counts: Counter[str]) -> tuple[dict[int, Row], dict[int, dict[int, Row]]]:
    """Questions by id, and answers by question and id. Of a post that stands there twice, the one active last stays."""
    questions: dict[int, Row] = {}
    answers: defaultdict[int, dict[int, Row]] = defaultdict(dict)
    for line in _lines(path):
        row = posts.POSTS.strict.fullmatch(line)
        assert row is not None, line[:200]
        question = row[posts.KIND] == posts.QUESTION
        counts["questions read" if question else "answers read"] += 1
        place, number = questions if question else answers[int(row[posts.PARENT])], int(row[posts.ID])
        if number in place:
            counts["twice"] += 1
            row = max(row, place[number], key=lambda r: (r[posts.ACTIVE] or b"", r[0]))
        place[number] = row
    return questions, dict(answers)


def _lines(path: Path) -> Iterator[bytes]:
    if not path.exists():
        return
    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as stream:
        rest = b""
        while chunk := stream.read(4_000_000):
            *rows, rest = (rest + chunk).split(b"\n")
            yield from rows
    assert not rest, path


class _Maker:
    """Makes the records of one partition."""

    def __init__(self, partition: Partition, names: dict[int, str], clusters: dict[int, int], counts: Counter[str]) -> None:
        self.partition, self.names, self.clusters, self.counts = partition, names, clusters, counts
        self.base = f"https://{posts.host_of(partition.site)}"

    def record(self, question: Post, answers: list[Post]) -> dict[str, Any] | None:
        """One row of `questions`; None when the question, or every answer to it, has no text."""
        partition, site = self.partition, self.partition.site
        text = "\n\n".join(part for part in (question.title, self.markdown(question.html)) if part)
        if not text:
            self.counts["questions without text"] += 1
            return None
        kept = []
        for answer in answers:
            body = self.markdown(answer.html)
            if not body:
                self.counts["answers without text"] += 1
                continue
            selected = answer.id == question.accepted
            kept.append(
                {
                    "answer_id": answer.id,
                    "text": body,
                    "pm_score": posts.pm_score(answer.votes, selected),
                    "votes": answer.votes,
                    "selected": selected,
                    **self.credit(answer),
                    "created": answer.created,
                }
            )
        if not kept:
            self.counts["unanswered"] += 1
            return None
        root = self.clusters.get(question.id, question.id)
        split = split_of(site, root, partition.shares)
        pairs = choose_pairs(site, question.id, [(a["answer_id"], a["pm_score"]) for a in kept], partition.max_pairs)
        url, credit = f"{self.base}/questions/{question.id}", self.credit(question)
        self._count(split, kept, pairs)
        return {
            "site": site,
            "qid": question.id,
            "title": question.title,
            "question": text,
            "split": split,
            "cluster": root,
            "answers": kept,
            "pairs": [{"j": j, "k": k} for j, k in pairs],
            "tags": question.tags,
            "votes": question.votes,
            "views": question.views,
            "created": question.created,
            "date": question.created.strftime("%Y/%m/%d"),
            "url": url,
            "metadata": [url, self.base, credit["author_profile"] or ""],
            **credit,
            "dump_date": partition.dump_date,
        }

    def markdown(self, html: str) -> str:
        text, fell_back = convert(html, self.partition.converter)
        self.counts["bodies"] += 1
        self.counts["bodies by markdownify"] += fell_back
        return text.strip()

    def credit(self, post: Post) -> dict[str, Any]:
        """Whom to name for a post, and under which licence."""
        self.counts[f"licence {post.licence}"] += 1
        user = post.author_id
        return {
            "author": (None if user is None else self.names.get(user)) or post.author,
            "author_id": user,
            "author_profile": None if user is None else f"{self.base}/users/{user}",
            "licence": post.licence,
        }

    def _count(self, split: str, answers: list[dict[str, Any]], pairs: list[tuple[int, int]]) -> None:
        """Counts of a split; a baseline's wins are counted double, so that a tie is one."""
        counts = self.counts
        counts[f"{split} questions"] += 1
        counts[f"{split} answers"] += len(answers)
        counts[f"{split} questions with pairs"] += bool(pairs)
        counts[f"{split} pairs"] += len(pairs)
        if not pairs:
            return
        marks = [markup(answer["text"]) for answer in answers]
        for j, k in pairs:
            chosen, rejected = answers[j], answers[k]
            counts[f"{split} longer"] += _wins(len(chosen["text"]), len(rejected["text"]))
            counts[f"{split} earlier"] += _wins(rejected["created"], chosen["created"])
            counts[f"{split} more markup"] += _wins(marks[j], marks[k])
            counts[f"gap {min(chosen['pm_score'] - rejected['pm_score'], 5)}"] += 1


def _wins(chosen: Any, rejected: Any) -> int:
    return 2 if chosen > rejected else 1 if chosen == rejected else 0
