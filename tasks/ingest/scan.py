"""Stage one: every row of a site's tables, once, in any order: questions and answers into partitions, names into the index."""

import datetime
import hashlib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from tasks.ingest import posts, sources
from tasks.ingest.index import Index
from tasks.ingest.partitions import Spill, count_partitions
from tasks.ingest.rows import Bad, RowScanner
from tasks.ingest.writer import QUARANTINE, open_parquet

OTHER_KINDS = {3: "orphaned tag wiki", 4: "tag wiki excerpt", 5: "tag wiki", 6: "moderator nomination", 7: "wiki placeholder",
               8: "privilege wiki"}  # fmt: skip
QUARANTINE_ROWS = 200  # held before they are written


class Quarantine:
    """The rows that could not be read, in the artifact, so that anyone can see what is missing."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = open_parquet(path, QUARANTINE)
        self._rows: list[dict[str, Any]] = []
        self.count = 0

    def add(self, site: str, file: str, bad: Bad) -> None:
        self._rows.append({"site": site, "file": file, **asdict(bad)})
        self.count += 1
        if len(self._rows) >= QUARANTINE_ROWS:
            self._flush()

    def close(self) -> None:
        if self._rows or not self.count:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=QUARANTINE))
        self._rows = []


@dataclass
class TableCount:
    """What became of a table's rows: rows == used + quarantined."""

    file: str
    rows: int = 0
    repaired: int = 0
    quarantined: int = 0
    first_bad: Bad | None = None
    cut: str | None = None
    """Where and how the file ends too early."""


@dataclass
class Scanned:
    """A site, ready for the second stage."""

    site: sources.Site
    spill: Spill
    index: Path
    tables: dict[str, TableCount]
    counts: Counter[str] = field(default_factory=Counter)
    """questions, answers, other; of the other: each kind, fabricated; of the answers: without a question's id."""
    newest: str = ""
    """Day of the last activity."""


def scan(site: sources.Site, scratch: Path, quarantine: Quarantine, tell: Callable[[int], None]) -> Scanned:
    """Read all tables of a site. `tell` gets the bytes of every chunk."""
    index_path = scratch / f"{site.name}.sqlite"
    index = Index(index_path)
    spill = Spill(scratch / site.name, site.name, count_partitions(sum(f.unpacked for f in site.files if "posts" in f.tables)))
    result = Scanned(site, spill, index_path, {})
    posts_reader = _Posts(result, index)
    readers: dict[str, Callable[[bytes, re.Match[bytes]], str | None]] = {
        "posts": posts_reader.accept,
        "users": _Users(index).accept,
        "postlinks": _PostLinks(index).accept,
    }
    layouts = {"posts": posts.POSTS, "users": posts.USERS, "postlinks": posts.POSTLINKS}
    for file in site.files:
        scanners: dict[str, RowScanner] = {}
        for table, name in sources.inside(file):
            scanners[table] = RowScanner(layouts[table], name, readers[table], partial(quarantine.add, site.name, name))

        def feed(table: str, chunk: bytes, scanners: dict[str, RowScanner] = scanners) -> None:
            scanners[table].feed(chunk)
            tell(len(chunk))

        early = sources.read(file, feed)
        for table, name in sources.inside(file):
            scanner = scanners[table]
            scanner.close()
            cut = early
            if cut is None and scanner.cut is not None:
                cut = f"it ends at byte {scanner.cut} without </{table}>"
            result.tables[table] = TableCount(name, scanner.rows, scanner.repaired, scanner.quarantined, scanner.first_bad, cut)
    spill.flush()
    result.newest = posts_reader.newest
    result.counts["clustered"] = index.close()
    return result


class _Posts:
    def __init__(self, result: Scanned, index: Index) -> None:
        self._counts, self._index, self._add = result.counts, index, result.spill.add
        self._newest = b""

    @property
    def newest(self) -> str:
        """Day of the last activity, such as 2020-05-31."""
        return self._newest.decode()

    def accept(self, line: bytes, match: re.Match[bytes]) -> str | None:
        kind, number = match[posts.KIND], int(match[posts.ID])
        question = kind == posts.QUESTION
        if number >= posts.FABRICATED_FROM:
            self._counts["other"] += 1
            self._counts["fabricated"] += 1
            return None
        if not question and kind != posts.ANSWER:
            self._counts["other"] += 1
            self._counts[f"kind {int(kind)}"] += 1
            return None
        if not match[posts.CREATED]:
            return "no CreationDate"
        if not match[posts.SCORE]:
            return "no Score"
        created, active = match[posts.CREATED], match[posts.ACTIVE] or b""
        try:
            posts.parse_moment(created)
            day = max(created[:10], active[:10])
            if day > self._newest:
                datetime.date.fromisoformat(day.decode())
                self._newest = day
        except ValueError:
            return f"a date that no calendar has: {created.decode()} {active.decode()}".rstrip()
        if question:
            self._counts["questions"] += 1
            title, body = match[posts.TITLE] or b"", match[posts.BODY] or b""
            self._add(number, line)
            if title or body:
                self._index.add_text(hashlib.blake2b(title + b'"' + body, digest_size=16).digest(), number)
            return None
        self._counts["answers"] += 1
        if match[posts.PARENT]:
            self._add(int(match[posts.PARENT]), line)
        else:
            self._counts["orphans"] += 1
        return None


class _Users:
    def __init__(self, index: Index) -> None:
        self._index = index

    def accept(self, line: bytes, match: re.Match[bytes]) -> None:
        if name := posts.unescape(match[2]).strip():
            self._index.add_user(int(match[1]), " ".join(name.split()))


class _PostLinks:
    def __init__(self, index: Index) -> None:
        self._index = index

    def accept(self, line: bytes, match: re.Match[bytes]) -> None:
        if match[4] == posts.DUPLICATE_LINK:
            self._index.add_link(int(match[2]), int(match[3]))
