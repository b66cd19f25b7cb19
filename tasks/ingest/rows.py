"""Read a dump's XML row by row from bytes: strict and fast where rows are as they should be, careful where they are not.

No XML parser: the usual ones die at the first bad character, and lxml's `recover` loses text in silence. A row that can be
mended without guessing is repaired and counted; any other goes to quarantine with its offset, line and reason.
"""

import codecs
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

BLOCK = 4_000_000  # bytes handled at once
MAX_ROW = 64_000_000  # bytes
KEPT = 64_000  # bytes of a bad row that quarantine keeps
MAX_PROLOG = 1_000_000  # bytes before the root element
MAX_LINES = 4_000_000  # bytes of a row that goes over several lines

CONTROL = bytes(code for code in range(32) if code not in (9, 10, 13))
CONTROL_OR_NONCHARACTER = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
REFERENCE = re.compile(r"&(?:(lt|gt|amp|quot|apos);|#([0-9]{1,9});|#x([0-9a-fA-F]{1,8});)?")
CLOSING = (b"/>", b"</row>")
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

NUMBER = rb"-?\d{1,18}"
SMALL_NUMBER = rb"-?\d{1,9}"
MOMENT = rb"\d{4}-[01]\d-[0-3]\dT[0-2]\d:[0-5]\d:[0-6]\d(?:\.\d{1,9})?Z?"
TEXT = rb'[^"]*+'  # without a raw <, which is looked for apart: three times as fast as [^"<]


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


class Layout:
    """A table: its root element and the attributes in the order that dumps write them in."""

    def __init__(self, root: str, fields: Sequence[Field]) -> None:
        self.root = root
        self.fields = tuple(fields)
        # An attribute that need not be there may also be empty.
        wanted = {f.name: f.pattern if f.required else f.pattern + b"|" for f in fields if f.pattern is not None}
        self.patterns = {name: re.compile(pattern) for name, pattern in wanted.items()}
        parts = [b" *<row"]
        for f in fields:
            part = b' %s="%s"' % (f.name.encode(), TEXT if f.pattern is None else b"(" + wanted[f.name] + b")")
            parts.append(part if f.required else b"(?:" + part + b")?")
        # Every attribute at most once, in order, and none that we do not know; all else takes the careful way.
        self.strict = re.compile(b"".join(parts) + b" ?/>")

    def canonical(self, attributes: dict[str, str]) -> bytes | str:
        """The row in strict form, from parsed attributes (values still escaped); a `str` is the reason why it cannot be."""
        parts = ["<row"]
        for f in self.fields:
            value = attributes.get(f.name)
            if value is None:
                if f.required:
                    return f"no {f.name}"
                continue
            if f.pattern is None:
                continue
            if not self.patterns[f.name].fullmatch(value.encode()):
                return f"{f.name} is not {f.what}: {value[:40]!r}"
            parts.append(f' {f.name}="{value}"')
        return ("".join(parts) + " />").encode()


class RowScanner:
    """Feed it chunks of a file in any size, then close it. Every row is accepted, or lands in quarantine; none is lost.

    accept(line, match): the row in strict form and its match; returns None, or the reason why the row cannot be used.
    """

    def __init__(
        self,
        layout: Layout,
        where: str,
        accept: Callable[[bytes, re.Match[bytes]], str | None],
        quarantine: Callable[[Bad], None],
    ) -> None:
        self.layout, self.where, self.accept, self.quarantine = layout, where, accept, quarantine
        self.rows = 0
        self.repaired = 0
        self.quarantined = 0
        self.first_bad: Bad | None = None
        self.cut: int | None = None  # offset at which the file ends without its end
        self._root_end = b"</" + layout.root.encode()
        self._pending = b""
        self._offset = 0  # of the pending bytes
        self._line = 1
        self._decoder: codecs.IncrementalDecoder | None = None
        self._sniffed = self._started = self._ended = self._in_comment = False
        self._open: list[bytes] = []  # lines of a row that goes on in the next line
        self._open_size = 0  # bytes
        self._opened = (0, 1)  # its offset and line
        self._skipping: tuple[int, int, bytes, hashlib._Hash] | None = None  # a row beyond MAX_ROW

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), BLOCK):
            self._advance(bytes(view[start : start + BLOCK]))

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

    def _advance(self, data: bytes, final: bool = False) -> None:
        """Take in more bytes, and use up all whole lines."""
        self._pending += data if self._decoder is None else self._decoder.decode(data, final).encode()
        if not self._sniffed and not self._sniff(final):
            return
        if not self._started and not self._prolog(final):
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
            self._decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
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
        clean = _is_clean(block)
        fullmatch, accept = self.layout.strict.fullmatch, self.accept
        for line in block[:-1].split(b"\n"):
            row = line[:-1] if line.endswith(b"\r") else line
            match = None
            if not self._open and not self._in_comment and not self._ended and len(row) <= MAX_ROW:
                match = fullmatch(row)
            if match is not None and row.count(b"<") == 1 and (clean or _is_clean(row)):
                self.rows += 1
                if reason := accept(row, match):
                    self._bad_row(row, self._offset, self._line, reason, counted=True)
            else:
                self._line_odd(row)
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
            blank = len(rest) - len(rest.lstrip())
            if blank:
                at += blank
            elif rest.startswith(b"<!--"):
                self._in_comment, at = True, at + 4
            elif rest.startswith(self._root_end) and b">" in rest:
                self._ended, at = True, at + rest.index(b">") + 1
            elif self._ended:
                self._bad_row(rest, offset + at, number, f"after the end of <{self.layout.root}>")
                return
            elif rest.startswith(b"<row") or self._root_end.startswith(rest) or b"<row".startswith(rest):
                used = self._row_odd(rest, offset + at, number)
                if not used:
                    return
                at += used
            else:
                self._bad_row(rest, offset + at, number, "not a row")
                return

    def _row_odd(self, rest: bytes, offset: int, number: int) -> int:
        """Read one row at the start of `rest` the careful way; the bytes it took, 0 when the rest of the line is used up."""
        try:
            text = rest.decode()
        except UnicodeDecodeError as error:
            if self._goes_on(rest, offset, number):
                return 0
            self._bad_row(rest, offset, number, f"invalid UTF-8 at byte {offset + error.start}")
            return 0
        if len(rest) > MAX_ROW:
            self._bad_row(rest, offset, number, f"longer than {MAX_ROW} bytes")
            return 0
        mended, repairs = CONTROL_OR_NONCHARACTER.subn("\ufffd", text)
        match = GENERIC.match(mended)
        if match is None:
            if not self._goes_on(rest, offset, number):
                self._bad_row(rest, offset, number, _diagnose(mended))
            return 0
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
        line = self.layout.canonical(attributes)
        if isinstance(line, str):
            self._bad_row(row, offset, number, line)
            return used
        strict = self.layout.strict.fullmatch(line)
        assert strict is not None, line[:200]
        self.rows += 1
        self.repaired += repairs > 0
        if reason := self.accept(line, strict):
            self._bad_row(row, offset, number, reason, counted=True)
        return used

    def _goes_on(self, rest: bytes, offset: int, number: int) -> bool:
        """Whether the row at the start of `rest` may be closed in a later line; it is kept then."""
        if rest.rstrip().endswith(CLOSING):
            return False
        self._open, self._open_size, self._opened = [rest], len(rest), (offset, number)
        return True

    def _bad_row(self, raw: bytes, offset: int, number: int, reason: str, counted: bool = False) -> None:
        raw = raw.rstrip(b"\r\n")
        self._bad(Bad(offset, number, reason, raw[:KEPT], hashlib.sha256(raw).hexdigest()), counted)

    def _bad(self, bad: Bad, counted: bool = False) -> None:
        self.rows += not counted
        self.quarantined += 1
        self.first_bad = self.first_bad or bad
        self.quarantine(bad)


def _is_clean(block: bytes) -> bool:
    """Valid UTF-8 without characters or references that XML does not allow."""
    try:
        block.decode()
    except UnicodeDecodeError:
        return False
    if len(block.translate(None, CONTROL)) != len(block) or b"\xef\xbf\xbe" in block or b"\xef\xbf\xbf" in block:
        return False
    return UNCOMMON_REFERENCE.search(block) is None


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
