"""Read a dump's XML row by row from bytes: strict and fast where rows are as they should be, careful where they are not.

No XML parser: the usual ones die at the first bad character, and lxml's `recover` loses text in silence. A row that can be
mended without guessing is repaired and counted; any other goes to quarantine with its offset, line and reason.
"""

import codecs
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter

BLOCK = 250_000  # bytes looked at together: what fits in a core's own cache is read several times for the price of once
MAX_ROW = 64_000_000  # bytes
KEPT = 64_000  # bytes of a bad row that quarantine keeps
MAX_PROLOG = 1_000_000  # bytes before the root element
MAX_LINES = 4_000_000  # bytes of a row that goes over several lines

CONTROL = bytes(code for code in range(32) if code not in (10, 13))  # with tabs, which XML reads as blanks
CONTROL_OR_NONCHARACTER = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
REFERENCE = re.compile(r"&(?:(lt|gt|amp|quot|apos);|#([0-9]{1,9});|#x([0-9a-fA-F]{1,8});)?")
CLOSING = (b"/>", b"</row>")
ANOTHER_ROW = re.compile(rb"(?:/>|</row\s*>)\s*(?=<row )")
UNCOMMON_REFERENCE = re.compile(rb"&(?!(?:lt|gt|quot|amp|apos|#xA|#xD|#x9);)")

VALUE = r"""(?:"[^"<]*+"|'[^'<]*+')"""
GENERIC = re.compile(rf"<row((?:\s+[A-Za-z_:][\w:.-]*\s*=\s*{VALUE})*+)\s*(?:/>|>\s*</row\s*>)")
ATTRIBUTE = re.compile(rf"\s+([A-Za-z_:][\w:.-]*)\s*=\s*({VALUE})")

PROLOG = re.compile(
    rb"\s*(?:(?P<declaration><\?[^>]*?\?>)|(?P<comment><!--.*?-->)|(?P<doctype><!DOCTYPE[^\[>]*(?:\[.*?\]\s*)?>)"
    rb"|<(?P<root>[A-Za-z_][\w.-]*)[^<>]*?(?P<empty>/)?>)",
    re.DOTALL,
)
ENCODINGS = {"utf-8", "utf-16", "us-ascii", "ascii", "iso-8859-1", "latin-1", "windows-1252"}

NUMBER = rb"0|-?[1-9]\d{0,17}"
SMALL_NUMBER = rb"0|-?[1-9]\d{0,8}"
LEADING_ZEROS = re.compile(rb"\A(-?)0+(?=\d)")
MOMENT = rb"\d{4}-[01]\d-[0-3]\dT(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,9})?Z?"
TEXT = rb'[^"]*+'
PLANS = 10_000  # shapes of rows remembered; dumps have some dozens
LONGEST_SHAPE = 2_000  # bytes; one in single quotes holds the whole body


@dataclass(frozen=True)
class Field:
    """An attribute of a table's rows: its name, what its value looks like, and whether a row must have it."""

    name: str
    pattern: bytes | None = None  # None: known, and of no interest
    required: bool = False
    what: str = "text"


@dataclass(frozen=True)
class Bad:
    """A row that could not be read."""

    offset: int  # byte where it starts, in the unpacked file (as UTF-8 where that was another encoding)
    line: int
    reason: str
    raw: bytes  # at most KEPT bytes
    sha256: str  # of the whole row


Values = tuple[bytes, ...]
"""The values of a row that a layout wants, in its order, still escaped; b"" where the row has none."""


def _picking(places: list[int]) -> Callable[[Sequence[bytes]], Values]:
    """operator.itemgetter, which gives no tuple for one place."""
    return itemgetter(*places) if len(places) > 1 else lambda values: tuple(values[place] for place in places)


class Layout:
    """A table: its root element and the attributes in the order that dumps write them in."""

    def __init__(self, root: str, fields: Sequence[Field]) -> None:
        self.root = root
        self.fields = tuple(fields)
        self.wanted = [f for f in fields if f.pattern is not None]
        # An attribute that need not be there may also be empty.
        self.patterns = {f.name: re.compile(f.pattern if f.required else f.pattern + b"|") for f in self.wanted if f.pattern}
        checked = [n for n, f in enumerate(self.wanted) if f.pattern is not TEXT]
        self._checked = _picking(checked)
        self._check = re.compile(b'"'.join(b"(?:" + self.patterns[self.wanted[n].name].pattern + b")" for n in checked))
        self._plans: dict[bytes, Callable[[list[bytes]], Values] | None] = {}

    def read(self, line: bytes) -> Values | None:
        """The values of a row written just as dumps write them; None for any other line, which takes the careful way.

        Every attribute at most once, in order, and none that is not known. A raw < in a value is not looked for.
        Splitting at the quotes and looking the rest up, whole, takes a third of what a regex over the line takes.
        """
        parts = line.split(b'"')
        if len(parts) % 2 == 0:  # a quote that is not closed
            return None
        shape = b'"'.join(parts[::2])
        try:
            plan = self._plans[shape]
        except KeyError:
            plan = self._plan(shape) if len(self._plans) < PLANS and len(shape) < LONGEST_SHAPE else None
        if plan is None:
            return None
        parts.append(b"")  # what absent attributes point to
        values = plan(parts)
        return values if self._check.fullmatch(b'"'.join(self._checked(values))) else None

    def _plan(self, shape: bytes) -> Callable[[list[bytes]], Values] | None:
        """How to pick the values out of a line, from what stands between them: `  <row Id=" PostTypeId=" />`."""
        *names, end = shape.split(b'"')
        place = {}
        if names and end.rstrip(b"\r") in (b" />", b"/>"):
            first = names[0].lstrip(b" ")
            names[0] = first[4:] if first.startswith(b"<row") else first
            written = [name[1:-1].decode("ascii", "replace") if name[:1] + name[-1:] == b" =" else "" for name in names]
            place = {name: 2 * n + 1 for n, name in enumerate(written)}
        known = [f.name for f in self.fields if f.name in place]
        strict = list(place) == known and len(place) == len(names) and all(f.name in place for f in self.fields if f.required)
        plan = _picking([place.get(f.name, -1) for f in self.wanted]) if strict and place else None
        self._plans[shape] = plan
        return plan

    def values(self, attributes: dict[str, str]) -> Values | str:
        """What `read` gives, from parsed attributes (values still escaped); a `str` is the reason why it cannot be."""
        values = []
        for f in self.wanted:
            value = attributes.get(f.name)
            if value is None and f.required:
                return f"no {f.name}"
            values.append((value or "").encode())
            if f.pattern in (NUMBER, SMALL_NUMBER):
                values[-1] = LEADING_ZEROS.sub(rb"\1", values[-1])
            if not self.patterns[f.name].fullmatch(values[-1]):
                return f"{f.name} is not {f.what}: {(value or '')[:40]!r}"
        return tuple(values)


class RowScanner:
    """Feed it chunks of a file in any size, then close it. Every row is accepted, or lands in quarantine; none is lost.

    accept(values): the values of a row; returns None, or the reason why the row cannot be used. With `begins` the bytes come from
    the middle of a table, as UTF-8, from the start of a line at that offset; lines are then counted from there.
    """

    def __init__(
        self,
        layout: Layout,
        where: str,
        accept: Callable[[Values], str | None],
        quarantine: Callable[[Bad], None],
        begins: int | None = None,
    ) -> None:
        self.layout, self.where, self.accept, self.quarantine = layout, where, accept, quarantine
        self.rows = 0
        self.repaired = 0
        self.quarantined = 0
        self.first_bad: Bad | None = None
        self.cut: int | None = None  # offset at which the file ends without its end
        self._root_end = b"</" + layout.root.encode()
        self._pending = b""
        self._offset = begins or 0  # of the pending bytes
        self._line = 1
        self._decoder: codecs.IncrementalDecoder | None = None
        self._sniffed = self._started = begins is not None
        self._ended = self._in_comment = False
        self._open: list[bytes] = []  # lines of a row that goes on in the next line
        self._open_size = 0  # bytes
        self._opened = (0, 1)  # its offset and line
        self._skipping: tuple[int, int, bytes, hashlib._Hash] | None = None  # a row beyond MAX_ROW

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        at = 0
        while at < len(view):
            size = max(BLOCK, len(self._pending))  # of a row that goes on and on ever more, so that it is not copied ever again
            self._advance(bytes(view[at : at + size]))
            at += size

    @property
    def lines(self) -> int:
        """Lines read so far."""
        return self._line - 1

    @property
    def offset(self) -> int:
        """Where the bytes stand that have not been used up: behind the prolog, before any rows."""
        return self._offset

    def pause(self) -> bool:
        """The end of the bytes, but not of the table: whether a scanner that begins there reads on as this one would."""
        self._advance(b"", final=True)
        return not (self._pending or self._open or self._in_comment or self._ended or self._skipping)

    def close(self) -> None:
        """The file's end: what has not been closed by now was cut."""
        self._advance(b"", final=True)
        rest, self._pending = self._pending, b""
        if self._skipping is not None:
            self.cut = self._skipping[0]
        elif rest.strip():
            self._line_odd(rest)
        if self._open:
            self.cut = self._opened[0]
        elif not self._ended and self.cut is None:
            self.cut = self._offset + len(rest)

    def begin(self, data: bytes, final: bool = False) -> bool:
        """Take in bytes until the root element is open; whether it is."""
        self._pending += self.decoded(data, final)
        return (self._sniffed or self._sniff(final)) and (self._started or self._prolog(final))

    @property
    def ended(self) -> bool:
        """Whether the root element is closed."""
        return self._ended

    @property
    def recoded(self) -> bool:
        """Whether the file is in another encoding than UTF-8, so that its bytes are not those that are scanned."""
        return self._decoder is not None

    def decoded(self, data: bytes, final: bool = False) -> bytes:
        """The bytes as UTF-8."""
        return data if self._decoder is None else self._decoder.decode(data, final).encode()

    def rest(self) -> bytes:
        """What was taken in and not used up, for somebody else to scan."""
        rest, self._pending = self._pending, b""
        return rest

    def _advance(self, data: bytes, final: bool = False) -> None:
        """Take in more bytes, and use up all whole lines."""
        if not self.begin(data, final):
            return
        if self._skipping is not None and not self._skip():
            return
        cut = self._pending.rfind(b"\n") + 1
        if cut:
            block, self._pending = self._pending[:cut], self._pending[cut:]
            self._block(block)
        if len(self._pending) > MAX_ROW:
            self._skipping = (self._offset, self._line, self._pending[:KEPT], hashlib.sha256(self._pending))
            self._offset += len(self._pending)
            self._pending = b""

    def _sniff(self, final: bool = False) -> bool:
        """Find the encoding from the first bytes; from then on the bytes are UTF-8."""
        head = self._pending[:200]
        if len(head) < 200 and not final:
            return False
        self._sniffed = True
        encoding = ""
        if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
            raise ValueError(f"{self.where}: UTF-32 is not supported: convert the file to UTF-8")
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            encoding = "utf-16"
        elif head.startswith((b"<\0?\0", b"<\0p\0")):
            encoding = "utf-16-le"
        elif head.startswith((b"\0<\0?", b"\0<\0p")):
            encoding = "utf-16-be"
        elif head.startswith(codecs.BOM_UTF8):
            self._pending, self._offset = self._pending[3:], 3
        declared = re.search(rb"""^\s*<\?xml[^>]*encoding=["']([\w.-]+)["']""", self._pending)
        if not encoding and declared:
            name = declared[1].decode().lower()
            if name not in ENCODINGS:
                raise ValueError(f"{self.where}: encoding {name!r} is not supported: convert the file to UTF-8")
            encoding = "" if name in {"utf-8", "utf-16", "us-ascii", "ascii"} else name
        if encoding:
            self._decoder = codecs.getincrementaldecoder(encoding)(errors="noncharacter")
            self._pending = self._decoder.decode(self._pending, final).encode()
        return True

    def _prolog(self, final: bool = False) -> bool:
        """Read up to the root element. No DTD is loaded, and one that declares entities is refused."""
        data, at = self._pending, 0
        while match := PROLOG.match(data, at):
            if match["doctype"] and b"<!ENTITY" in match["doctype"]:
                raise ValueError(f"{self.where}: the DOCTYPE declares entities, which no dump does: refused")
            at = match.end()
            if match["root"]:
                if match["root"].decode() != self.layout.root:
                    raise ValueError(f"{self.where}: the root element is <{match['root'].decode()}>, not <{self.layout.root}>")
                self._started = True
                self._ended = bool(match["empty"])
                self._line += data.count(b"\n", 0, at)
                self._offset += at
                self._pending = data[at:]
                return True
        if b"<!ENTITY" in data[at:MAX_PROLOG]:
            raise ValueError(f"{self.where}: the DOCTYPE declares entities, which no dump does: refused")
        if final or len(data) > MAX_PROLOG:
            raise ValueError(f"{self.where}: no <{self.layout.root}> element found: this is not that table of a dump")
        return False

    def _skip(self) -> bool:
        """Drop the rest of a row that is too long; True when its end was found."""
        assert self._skipping is not None
        offset, line, raw, digest = self._skipping
        cut = self._pending.find(b"\n") + 1
        gone = self._pending[: cut or len(self._pending)]
        digest.update(gone.rstrip(b"\r\n") if cut else gone)
        self._offset += len(gone)
        self._pending = self._pending[len(gone) :]
        if not cut:
            return False
        self._skipping = None
        self._line += 1
        self._bad(Bad(offset, line, f"longer than {MAX_ROW} bytes", raw, digest.hexdigest()))
        return True

    def _block(self, block: bytes) -> None:
        """Whole lines. What a look at the whole block rules out needs no look at its rows."""
        lines = block.split(b"\n")
        lines.pop()
        clean = _is_clean(block)
        begin_rows = block.count(b"\n  <row ") + block.startswith(b"  <row ")
        one_each = clean and block.count(b"<") == begin_rows  # no value holds a raw <
        read, accept = self.layout.read, self.accept
        for line in lines:
            values = None
            if not self._open and not self._in_comment and not self._ended and len(line) <= MAX_ROW:
                values = read(line)
            if (
                values is not None
                and (one_each or (line.count(b"<") == 1 and (clean or _is_clean(line))))
                and line.find(b"\r", 0, -1) < 0  # which XML reads as a line feed, and so as a blank
            ):
                self.rows += 1
                if reason := accept(values):
                    row = line.lstrip()
                    self._bad_row(row, self._offset + len(line) - len(row), self._line, reason, counted=True)
            else:
                self._line_odd(line)
            self._offset += len(line) + 1
            self._line += 1

    def _line_odd(self, line: bytes) -> None:
        """A line that is not one strict row: blank, a comment, the end, several rows, part of a row, or damaged."""
        offset, number = self._offset, self._line
        if self._open:
            goes_on = not line.lstrip().startswith((b"<row ", self._root_end))
            if goes_on:
                self._open.append(line)
                self._open_size += len(line) + 1
                if not line.rstrip().endswith(CLOSING) and self._open_size < MAX_LINES:
                    return
            opened, self._open = b"\n".join(self._open), []
            if goes_on and self._open_size < MAX_LINES:
                line, (offset, number) = opened, self._opened
            else:
                self._bad_row(opened, *self._opened, "the row is not closed")
                if goes_on:
                    return
        at = 0
        while at < len(line):
            if self._in_comment:
                end = line.find(b"-->", at)
                if end < 0:
                    return
                self._in_comment, at = False, end + 3
                continue
            rest = line[at:]
            here = offset + at, number + line.count(b"\n", 0, at)
            blank = len(rest) - len(rest.lstrip())
            if blank:
                at += blank
            elif rest.startswith(b"<!--"):
                self._in_comment, at = True, at + 4
            elif rest.startswith(self._root_end) and b">" in rest:
                self._ended, at = True, at + rest.index(b">") + 1
            elif self._ended:
                self._bad_row(rest, *here, f"after the end of <{self.layout.root}>")
                return
            elif rest.startswith(b"<row") or self._root_end.startswith(rest) or b"<row".startswith(rest):
                used = self._row_odd(rest, *here)
                if not used:
                    return
                at += used
            else:
                self._bad_row(rest, *here, "not a row")
                return

    def _row_odd(self, rest: bytes, offset: int, number: int) -> int:
        """Read one row at the start of `rest` the careful way; the bytes it took, 0 when the rest of the line is used up."""
        used = _end_of_row(rest) if len(rest) < MAX_LINES else 0
        rest = rest[: used or len(rest)]
        try:
            text = rest.decode()
        except UnicodeDecodeError as error:
            if not used and self._goes_on(rest, offset, number):
                return 0
            self._bad_row(rest, offset, number, f"invalid UTF-8 at byte {offset + error.start}")
            return used
        if len(rest) > MAX_ROW:
            self._bad_row(rest, offset, number, f"longer than {MAX_ROW} bytes")
            return used
        mended, repairs = CONTROL_OR_NONCHARACTER.subn("\ufffd", text)
        match = GENERIC.match(mended)
        if match is None:
            if used or not self._goes_on(rest, offset, number):
                self._bad_row(rest, offset, number, _diagnose(mended))
            return used
        used = len(text[: match.end()].encode())
        row = rest[:used]
        attributes: dict[str, str] = {}
        for name, quoted in ATTRIBUTE.findall(match[1]):
            if name in attributes:
                self._bad_row(row, offset, number, f"attribute {name} stands twice")
                return used
            value, count = _mend_references(quoted[1:-1])
            attributes[name] = value.replace('"', "&quot;").replace("\r\n", " ").replace("\n", " ").replace("\t", " ")
            repairs += count
        values = self.layout.values(attributes)
        if isinstance(values, str):
            self._bad_row(row, offset, number, values)
            return used
        self.rows += 1
        self.repaired += repairs > 0
        if reason := self.accept(values):
            self._bad_row(row, offset, number, reason, counted=True)
        return used

    def _goes_on(self, rest: bytes, offset: int, number: int) -> bool:
        """Whether the row at the start of `rest` may be closed in a later line; it is kept then."""
        if rest.rstrip().endswith(CLOSING):
            return False
        self._open, self._open_size, self._opened = [rest], len(rest), (offset, number)
        return True

    def _bad_row(self, raw: bytes, offset: int, number: int, reason: str, counted: bool = False) -> None:
        raw = raw.rstrip()
        self._bad(Bad(offset, number, reason, raw[:KEPT], hashlib.sha256(raw).hexdigest()), counted)

    def _bad(self, bad: Bad, counted: bool = False) -> None:
        self.rows += not counted
        self.quarantined += 1
        self.first_bad = self.first_bad or bad
        self.quarantine(bad)


# What cannot be decoded becomes a character that XML does not allow, so that it is mended and counted where it stands.
codecs.register_error("noncharacter", lambda error: ("\ufffe", error.end))  # type: ignore[attr-defined]


def _is_clean(block: bytes) -> bool:
    """Valid UTF-8 without characters or references that XML does not allow, or reads as others."""
    try:
        text = block.decode()
    except UnicodeDecodeError:
        return False
    if len(block.translate(None, CONTROL)) != len(block):
        return False
    if "\ufffe" in text or "\uffff" in text:
        return False
    return UNCOMMON_REFERENCE.search(block) is None


def _end_of_row(rest: bytes) -> int:
    """Where another row begins in the same line, so that a damaged one hides no other; 0 where none does for certain.

    What looks like a row inside a value of a damaged row is not one: an even number of quotes must stand before it.
    """
    for match in ANOTHER_ROW.finditer(rest):
        if rest.count(b'"', 0, match.end()) % 2 == 0:
            return match.end()
    return 0


def _mend_references(value: str) -> tuple[str, int]:
    """A bare & and unknown entities are kept literally; references to what is no character become U+FFFD."""
    repairs = 0

    def mend(match: re.Match[str]) -> str:
        nonlocal repairs
        name, decimal, hexadecimal = match.groups()
        if name:
            return match[0]
        if decimal or hexadecimal:
            code = int(decimal) if decimal else int(hexadecimal, 16)
            if code in (9, 10, 13) or 32 <= code < 0xD800 or 0xE000 <= code < 0xFFFE or 0x10000 <= code <= 0x10FFFF:
                return match[0]
            repairs += 1
            return "\ufffd"
        repairs += 1
        return "&amp;" + match[0][1:]

    return REFERENCE.sub(mend, value), repairs


def _diagnose(text: str) -> str:
    """Why a row that is closed is not well formed."""
    done = re.match(rf"<row(?:\s+[A-Za-z_:][\w:.-]*\s*=\s*{VALUE})*+", text)
    at = done.end() if done else 4
    start = re.match(r"\s+([A-Za-z_:][\w:.-]*)\s*=\s*([\"'])", text[at:])
    if start:
        value = text[at + start.end() :]
        raw, quote = value.find("<"), value.find(start[2])
        if raw >= 0 and (quote < 0 or raw < quote):
            return f"raw < in {start[1]}"
        return f"{start[1]} is not closed"
    return "a stray quote, or no attribute where one is expected"
