"""Stage one: every row of a table, once, block by block, in any order and in any process.

A block is a stretch of whole lines: a range of bytes where the table is a plain file, the bytes themselves where they come out of
a stream. What a block gives lies in a scratch folder of its own, whole when it has its name, so that a run that was killed goes on
behind the blocks that were finished.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from tasks.ingest import posts
from tasks.ingest.partitions import Spill
from tasks.ingest.rows import Bad, RowScanner, Values
from tasks.ingest.unit import leave, left, unit
from tasks.ingest.writer import QUARANTINE

if TYPE_CHECKING:
    from tasks.ingest import sources

LAYOUTS = {"posts": posts.POSTS, "users": posts.USERS, "postlinks": posts.POSTLINKS}
READ = 2_000_000  # bytes of a range in memory at once
QUARANTINE_ROWS = 200  # held before they are written


@dataclass(frozen=True)
class Block:
    """What a worker needs to scan a stretch of a table."""

    site: str
    table: str
    number: int
    folder: Path
    """For what comes out; is not there before it is whole."""
    name: str
    """Of the table, as people know it: beer.stackexchange.com.7z/Posts.xml"""
    partitions: int
    pack: bool
    begins: int = 0
    """Offset of the first byte."""
    path: str = ""
    ends: int = 0
    """A range of a plain file; else `data`, or the whole `file`."""
    data: bytes | None = None
    file: "sources.File | None" = None
    last: bool = False
    """Whether the table ends with this block."""


@dataclass
class Scanned:
    """What became of a block's rows: rows == used + quarantined. Everything else is in its folder."""

    table: str
    number: int
    folder: Path
    size: int = 0  # bytes
    lines: int = 0
    rows: int = 0
    repaired: int = 0
    quarantined: int = 0
    first_bad: Bad | None = None
    cut: str | None = None
    """Where and how the table ends too early."""
    awkward: bool = False
    """The next block does not begin where this one ends: a comment or a row goes across. The table is to be read in one piece."""
    newest: str = ""
    """Of posts, the day of the last activity."""
    counts: Counter[str] = field(default_factory=Counter)
    """questions, answers, other; of the other: each kind, fabricated; of the answers: those without a question's id."""


def scan(block: Block) -> Scanned:
    """Read a block: rows into partitions, names, links and digests of texts into files, what cannot be read into quarantine."""
    with unit(block.folder) as work:
        result = _scan(block, work)
        bad = result.first_bad and {**asdict(result.first_bad), "raw": ""}
        leave(work, vars(result) | {"folder": "", "first_bad": bad})
    return result


def finished(block: Block) -> Scanned | None:
    """What an earlier run left of this block."""
    if (kept := left(block.folder)) is None:
        return None
    bad = kept["first_bad"]
    return Scanned(
        **{
            **kept,
            "folder": block.folder,
            "first_bad": bad and Bad(**{**bad, "raw": b""}),
            "counts": Counter(kept["counts"]),
        }
    )


def _scan(block: Block, work: Path) -> Scanned:
    result = Scanned(block.table, block.number, block.folder)
    readers: dict[str, type[_Posts | _Users | _PostLinks]] = {"posts": _Posts, "users": _Users, "postlinks": _PostLinks}
    reader = readers[block.table](block, work, result)
    quarantine = _Quarantine(work / "quarantine.arrow", block)
    begins = None if block.file else block.begins
    scanner = RowScanner(LAYOUTS[block.table], block.name, reader.accept, quarantine.add, begins)
    early = None
    if block.file:
        from tasks.ingest import sources  # most workers do without what that loads

        early = sources.read(block.file, lambda table, chunk: scanner.feed(chunk) if table == block.table else None)
    elif block.data is not None:
        scanner.feed(block.data)
    else:
        with open(block.path, "rb") as file:
            file.seek(block.begins)
            left = block.ends - block.begins
            while left and (chunk := file.read(min(READ, left))):
                left -= len(chunk)
                scanner.feed(chunk)
    if block.last or block.file:
        scanner.close()
        result.cut = early
        if early is None and scanner.cut is not None:
            result.cut = f"it ends at byte {scanner.cut} without </{block.table}>"
    else:
        result.awkward = not scanner.pause()
    quarantine.close()
    reader.close()
    result.size = len(block.data) if block.data is not None else block.ends - block.begins
    result.lines, result.rows, result.repaired = scanner.lines, scanner.rows, scanner.repaired
    result.quarantined, result.first_bad = scanner.quarantined, scanner.first_bad
    return result


class _Quarantine:
    """The rows of a block that could not be read; lines are counted from the block's first."""

    def __init__(self, path: Path, block: Block) -> None:
        self._path, self._where = path, {"site": block.site, "file": block.name}
        self._writer: pa.ipc.RecordBatchStreamWriter | None = None
        self._rows: list[dict[str, Any]] = []

    def add(self, bad: Bad) -> None:
        self._rows.append({**self._where, **asdict(bad)})
        if len(self._rows) >= QUARANTINE_ROWS:
            self._flush()

    def close(self) -> None:
        if self._rows:
            self._flush()
        if self._writer:
            self._writer.close()

    def _flush(self) -> None:
        self._writer = self._writer or pa.ipc.new_stream(self._path, QUARANTINE)
        self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=QUARANTINE))
        self._rows = []


def quarantined(folder: Path) -> Iterator[pa.RecordBatch]:
    """The rows of a block's quarantine."""
    if (folder / "quarantine.arrow").exists():
        with pa.ipc.open_stream(folder / "quarantine.arrow") as stream:
            yield from stream


class _Posts:
    def __init__(self, block: Block, work: Path, result: Scanned) -> None:
        self._spill = Spill(work, block.site, block.partitions, block.pack)
        self._texts, self._path, self._result = bytearray(), work / "texts", result
        self.accept = self._accepting(result)

    def close(self) -> None:
        self._spill.close()
        self._path.write_bytes(self._texts)

    def _accepting(self, result: Scanned) -> Callable[[Values], str | None]:
        """A closure, because it is called for every row of a dump."""
        counts, add, texts = result.counts, self._spill.add, self._texts
        days: set[bytes] = set()

        def accept(values: Values) -> str | None:
            number, kind, _, parent, created, score, _, body, _, _, active, title, _, _ = values
            question = kind == posts.QUESTION
            if (question or kind == posts.ANSWER) and (len(number) < 10 or int(number) < posts.FABRICATED_FROM):
                if not created:
                    return "no CreationDate"
                if not score:
                    return "no Score"
                day = created[:10]
                if day not in days or (active[:10] not in days and active):
                    if not (_is_day(day) and (not active or _is_day(active[:10]))):
                        return f"a date that no calendar has: {created.decode()} {active.decode()}".rstrip()
                    days.add(day)
                    if active:
                        days.add(active[:10])
                    result.newest = max(result.newest, day.decode(), active[:10].decode())
                if question:
                    counts["questions"] += 1
                    qid = int(number)
                    add(qid, values)
                    if title or body:
                        text = title + b'"' + body
                        if b">" in text or b"&apos;" in text or text.count(b"&#") != text.count(b"&#xA;"):
                            text = _spelled_as_usual(title) + b'"' + _spelled_as_usual(body)
                        digest = hashlib.blake2b(text, digest_size=16).digest()
                        texts.extend(digest + qid.to_bytes(8, "little", signed=True))
                else:
                    counts["answers"] += 1
                    if parent:
                        add(int(parent), values)
                    else:
                        counts["orphans"] += 1
                return None
            counts["other"] += 1
            counts["fabricated" if int(number) >= posts.FABRICATED_FROM else f"kind {int(kind)}"] += 1
            return None

        return accept


def _spelled_as_usual(value: bytes) -> bytes:
    """The one spelling of a text that dumps use: `>` and `'` can be written in several ways, and any character as a number."""
    text = posts.unescape(value).encode()
    for character, reference in ((b"&", b"&amp;"), (b"<", b"&lt;"), (b">", b"&gt;"), (b'"', b"&quot;"), (b"\n", b"&#xA;")):
        text = text.replace(character, reference)
    return text


def _is_day(day: bytes) -> bool:
    try:
        date.fromisoformat(day.decode())
    except ValueError:
        return False
    return True


class _Users:
    def __init__(self, block: Block, work: Path, result: Scanned) -> None:
        self._path = work / "names.json"
        self._names: list[tuple[int, str]] = []

    def accept(self, values: Values) -> None:
        if name := " ".join(posts.unescape(values[1]).split()):
            self._names.append((int(values[0]), name))

    def close(self) -> None:
        self._path.write_text(json.dumps(self._names))


class _PostLinks:
    def __init__(self, block: Block, work: Path, result: Scanned) -> None:
        self._links, self._path = bytearray(), work / "links"

    def accept(self, values: Values) -> None:
        _, post, related, kind = values
        if kind == posts.DUPLICATE_LINK:
            self._links += int(post).to_bytes(8, "little", signed=True) + int(related).to_bytes(8, "little", signed=True)

    def close(self) -> None:
        self._path.write_bytes(self._links)
