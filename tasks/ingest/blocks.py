"""Cutting a table into blocks that can be scanned apart: ranges of a plain file, or the bytes that come out of a stream."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Queue
from threading import Event, Thread
from typing import Any

from tasks.ingest import sources
from tasks.ingest.rows import MAX_ROW, RowScanner
from tasks.ingest.scan import LAYOUTS, Block

ROW_AFTER = re.compile(rb"\n[ \t]*<row ")
AHEAD = 4_000_000  # bytes looked at in one go for the end of a line
CHUNKS = 8  # that a stream may be ahead of whoever cuts it


class Awkward(Exception):
    """The table cannot be cut: a row is too long, or it is not written in lines."""


@dataclass
class Head:
    """What stands before the first row of a table."""

    lines: int = 0


def blocks(
    file: sources.File, start: Callable[[str, str], Block], heads: dict[str, Head], size: int, early: dict[str, str | None]
) -> Iterator[Block]:
    """The blocks of all tables in a file, in order; Awkward where it cannot be cut. `start` makes the empty block of a table.

    The last block of each table says so. `heads` gets the lines before the first row; `early` why a stream ended too early.
    """
    if file.plain:
        ((table, name),) = sources.inside(file)
        scanner = _opened(file, table, name)
        if scanner.ended:
            raise Awkward
        if not scanner.recoded:
            heads[table] = Head(scanner.lines)
            yield from _ranges(file, start(table, name), scanner.offset, size)
            return
    yield from _streams(file, start, heads, size, early)


def _opened(file: sources.File, table: str, name: str) -> RowScanner:
    """A scanner that stands behind the table's root element."""
    scanner = RowScanner(LAYOUTS[table], name, lambda _: None, lambda _: None)
    with sources.open_file(file.path) as stream:
        chunk = stream.read(65_536)
        while not scanner.begin(chunk, final=not chunk):
            chunk = stream.read(65_536)
    return scanner


def _ranges(file: sources.File, empty: Block, begin: int, size: int) -> Iterator[Block]:
    whole = Path(file.path).stat().st_size
    with open(file.path, "rb") as stream:
        while True:
            end = _border(stream, begin + size, whole)
            yield replace(empty, path=file.path, begins=begin, ends=end, last=end == whole)
            if end == whole:
                return
            begin, empty = end, replace(empty, number=empty.number + 1, folder=_next(empty))


def _border(stream: Any, nominal: int, whole: int) -> int:
    """Where the first row begins whose line begins behind `nominal`, or the end of the file."""
    at = nominal
    while at < whole:
        stream.seek(at)
        ahead = stream.read(AHEAD)
        if match := ROW_AFTER.search(ahead):
            return int(at + match.start() + 1)
        at += max(len(ahead) - 1000, 1)
        if at - nominal > MAX_ROW:
            raise Awkward
    return whole


def _next(block: Block) -> Path:
    return block.folder.with_name(f"{block.table}-{block.number + 1:05}")


class _Cutter:
    """Bytes of one table in, blocks out; the last is held back until it is known to be the last."""

    def __init__(self, empty: Block, size: int, heads: dict[str, Head]) -> None:
        self._empty, self._size, self._heads = empty, size, heads
        self._scanner = RowScanner(LAYOUTS[empty.table], empty.name, lambda _: None, lambda _: None)
        self._held = bytearray()
        self._begins: int | None = None

    def feed(self, chunk: bytes, final: bool = False) -> Iterator[Block]:
        if self._begins is None:
            if not self._scanner.begin(chunk, final):
                return
            if self._scanner.ended:
                raise Awkward
            self._begins, self._heads[self._empty.table] = self._scanner.offset, Head(self._scanner.lines)
            self._held += self._scanner.rest()
        else:
            self._held += self._scanner.decoded(chunk, final)
        if len(self._held) > self._size + AHEAD:
            match = ROW_AFTER.search(self._held, self._size)
            if match:
                yield self._cut(match.start() + 1)
            elif len(self._held) > self._size + MAX_ROW:
                raise Awkward

    def end(self) -> Iterator[Block]:
        yield from self.feed(b"", final=True)
        yield replace(self._cut(len(self._held)), last=True)

    def _cut(self, at: int) -> Block:
        assert self._begins is not None
        block = replace(self._empty, begins=self._begins, data=bytes(self._held[:at]))
        del self._held[:at]
        self._begins += at
        self._empty = replace(self._empty, number=block.number + 1, folder=_next(block))
        return block


def _streams(
    file: sources.File, start: Callable[[str, str], Block], heads: dict[str, Head], size: int, early: dict[str, str | None]
) -> Iterator[Block]:
    cutters = {table: _Cutter(start(table, name), size, heads) for table, name in sources.inside(file)}
    why: list[str | None] = []
    for table, chunk in _pulled(file, why):
        yield from cutters[table].feed(chunk)
    for table, cutter in cutters.items():
        early[table] = why[0]
        yield from cutter.end()


def _pulled(file: sources.File, why: list[str | None]) -> Iterator[tuple[str, bytes]]:
    """sources.read pushes; this pulls: (table, chunk), unpacked in a thread of its own. `why` gets what read returns."""
    queue: Queue[tuple[str, Any]] = Queue(CHUNKS)
    gone = Event()

    def feed(table: str, chunk: bytes) -> None:
        if gone.is_set():
            raise EOFError("nobody reads on")
        queue.put((table, chunk))

    def work() -> None:
        try:
            queue.put(("", sources.read(file, feed)))
        except BaseException as error:
            queue.put(("", error))

    thread = Thread(target=work, daemon=True, name=f"unpacking {file.name}")
    thread.start()
    try:
        while True:
            table, chunk = queue.get()
            if table:
                yield table, chunk
            elif isinstance(chunk, BaseException):
                raise chunk
            else:
                why.append(chunk)
                return
    finally:
        gone.set()
        while thread.is_alive():  # it may stand before a full queue
            while not queue.empty():
                queue.get()
            thread.join(0.01)
