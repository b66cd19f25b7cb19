"""What a conversion builds: inline pieces gather until a block ends, blocks in the frame (body, quote, item) that holds them.

A frame is put together when it closes. Tags come without their angle brackets.
"""

import re
from collections.abc import Iterator
from html import unescape
from itertools import pairwise
from typing import Any, NamedTuple

from tasks.ingest.markdown_text import (
    cell,
    destination,
    is_autolink,
    is_punctuation,
    marks_in,
    math_in_one_line,
    one_newline,
    paragraph,
    title,
    unescape_text,
    without_blanks,
)


class Unsupported(ValueError):
    """HTML that this converter does not understand; `tag` says which."""

    def __init__(self, tag: str) -> None:
        super().__init__(f"no faithful Markdown for {tag[:200]}: use convert(), which falls back to markdownify")
        self.tag = tag


class Frame:
    """What holds blocks: the body, a quote, a list (whose `items` are frames), a list item, a table (whose `items` are rows)."""

    __slots__ = ("blocks", "items", "kind", "kinds", "tag")

    def __init__(self, kind: str, tag: str = "") -> None:
        self.kind = kind
        self.tag = tag
        self.blocks: list[str] = []
        self.kinds: list[str] = []
        """One a block: p and text (a paragraph with and without `<p>`), code, heading, rule, quote, table, html; of a list its
        marker, with "!" where the list cannot stand right below a line of text."""
        self.items: list[Any] = []


class Inline(NamedTuple):
    """An inline element that is open, and where its content begins."""

    name: str
    at: int
    attributes: dict[str, str]
    tag: str


MAX_DEPTH = 60
NO_BLOCKS = frozenset(("list", "table"))  # frames that hold items, not blocks
MARKERS = {"ul": "-*", "ol": ".)"}
_CAN_FOLLOW_TEXT = frozenset(("code", "heading", "rule", "-", "*", ".", ")"))
_INDENTED = re.compile(r"\n(?=[^\n])")


class Post:
    """The state of one conversion."""

    # What most conversions never change is on the class: making a Post is a tenth of the time of a short body.
    whole = False
    """Whether the body is read in one piece, so that a `<` that begins no tag is text."""
    links = 0
    """How many links are open."""
    paragraph = "text"
    """The kind of the paragraph that the inline pieces are for: p or text."""
    one_line = ""
    """The heading or table cell that is open: no line can end in it, no block can stand in it."""
    language = ""
    all_languages = ""
    # where read_inlines is, for the handlers that look ahead
    parts: list[Any]
    at: int
    steps: Iterator[int]

    def __init__(self, html: str) -> None:
        self.marks = marks_in(html)
        self.frame = frame = Frame("body")
        self.stack = [frame]
        self.inlines: list[str] = []
        self.open: list[Inline] = []

    def finish(self) -> str:
        self.flush()
        if self.one_line:
            self.end_one_line()
        while len(self.stack) > 1:
            self.close_frame()
        return "\n\n".join(self.frame.blocks)

    def flush(self) -> None:
        """End the paragraph that the inline pieces make up."""
        inlines = self.inlines
        if not inlines or self.one_line:
            return
        if self.open:
            self.close_inlines(0)
        text = inlines[0] if len(inlines) == 1 else "".join(inlines)
        inlines.clear()
        self.add_paragraph(text)

    def add_paragraph(self, text: str) -> None:
        text = paragraph(text)
        if "\n" in text and any(frame.kind == "quote" for frame in self.stack):
            text = math_in_one_line(text)
        if text == "<br>":
            self.add(text, "html")  # alone on its line it is an HTML block, which only a blank line ends
        elif text:
            self.add(text, self.paragraph)

    def end_paragraph(self) -> None:
        if not self.one_line:
            self.flush()
            self.paragraph = "text"

    def add(self, block: str, kind: str) -> None:
        frame = self.frame
        if frame.kind == "list":
            # A block between list items belongs, for the reader, to the item before it.
            item = frame.items[-1] if frame.items else Frame("item")
            self.push(item)
            if not frame.items:
                frame.items.append(item)
            frame = item
        elif frame.kind == "table":
            raise Unsupported("a block between the cells of a <table>")
        frame.blocks.append(block)
        frame.kinds.append(kind)

    def start_block(self, tag: str) -> None:
        """End the paragraph before a block's tag; refuse what Markdown has no place for."""
        if self.one_line or (self.open and any(inline.name != "span" for inline in self.open)):
            raise Unsupported(f"<{tag}> inside <{self.one_line or self.open[-1].name}>")
        if self.inlines:
            self.flush()
        self.paragraph = "text"

    # Frames

    def push(self, frame: Frame) -> None:
        if len(self.stack) > MAX_DEPTH:
            raise Unsupported(f"<{frame.tag}>, nested more than {MAX_DEPTH} deep")
        self.stack.append(frame)
        self.frame = frame

    def close_frame(self) -> None:
        frame = self.stack.pop()
        self.frame = self.stack[-1]
        if frame.kind == "quote":
            mark = ">!" if "spoiler" in frame.tag and not any("spoiler" in outer.tag for outer in self.stack) else ">"
            text = "\n\n".join(frame.blocks)
            if "\n" in text:
                text = text.replace("\n", f"\n{mark} ")
                blank = f"\n{mark} \n"
                while blank in text:
                    text = text.replace(blank, f"\n{mark}\n")
            self.add(f"{mark} {text}" if text else mark, "quote")
        elif frame.kind == "list":
            self.add_list(frame)
        elif frame.kind == "table":
            self.add_table(frame)

    def close_to(self, kinds: tuple[str, ...], stop: tuple[str, ...] = ()) -> None:
        """Close the innermost frame of one of these kinds, and all inside it; nothing when there is none before `stop`."""
        for depth in range(len(self.stack) - 1, 0, -1):
            if self.stack[depth].kind in kinds:
                while len(self.stack) > depth:
                    self.close_frame()
                return
            if self.stack[depth].kind in stop:
                return

    # Lists

    def add_list(self, frame: Frame) -> None:
        items = [item for item in frame.items if item.kind == "item"]
        if not items:
            return
        start = list_start(frame.tag, len(items))
        name = "ul" if start is None else "ol"
        marker = MARKERS[name][0]
        if self.frame.kinds and self.frame.kinds[-1][0] == marker:
            marker = MARKERS[name][1]  # two lists in a row: another marker keeps them apart
        loose = not all(map(_is_tight, items))
        lines = []
        for number, item in enumerate(items, start or 0):
            lead = f"{marker} " if start is None else f"{number}{marker} "
            text = ("\n\n" if loose else "\n").join(item.blocks)
            if "\n" in text:
                text = _INDENTED.sub("\n" + " " * len(lead), text)
            lines.append((lead + text) if text else lead.rstrip())
        needs_blank = start not in (None, 1) or not items[0].blocks
        self.add(("\n\n" if loose else "\n").join(lines), marker + "!" if needs_blank else marker)

    # Tables

    def add_table(self, frame: Frame) -> None:
        rows = [row for row in frame.items if row]
        if not rows:
            return
        width = max(map(len, rows))
        head = rows[0] + [("", "")] * (width - len(rows[0]))
        rules = {"left": ":--", "right": "--:", "center": ":-:"}
        lines = [f"| {' | '.join(text for text, _ in head)} |", f"| {' | '.join(rules.get(side, '---') for _, side in head)} |"]
        for row in rows[1:]:
            lines.append(f"| {' | '.join([text for text, _ in row] + [''] * (width - len(row)))} |")  # noqa: PERF401
        self.add("\n".join(lines), "table")

    def end_one_line(self) -> None:
        """Close the open heading or table cell."""
        kind = self.one_line
        if self.open:
            self.close_inlines(0)
        text = "".join(self.inlines).strip()
        self.inlines.clear()
        self.one_line = ""
        if "\n" in text:
            text = one_newline(text, " ")
        if kind[0] == "h":
            if text.endswith("#"):
                text = re.sub(r"(^|[ \t])(#+)$", r"\1\\\2", text)
            self.add(f"{'#' * int(kind[1])} {text}".rstrip(), "heading")
        else:
            row = self.frame.items[-1]
            row[-1] = (cell(text), row[-1][1])

    # Inlines

    def close_inlines(self, depth: int) -> None:
        while len(self.open) > depth:
            self.close_inline("")

    def close_inline(self, after: str) -> None:
        """Put the innermost open inline element together; `after` is the character that will follow it ("" for none)."""
        name, at, attributes, tag = self.open.pop()
        inlines = self.inlines
        content = inlines[at + 1] if len(inlines) == at + 2 else "".join(inlines[at + 1 :])
        del inlines[at:]
        before, core, blanks = without_blanks(content)
        if name == "a":
            self.links -= 1
        elif not core:
            if content:
                inlines.append(content)
            return
        if name in ("em", "strong"):
            core = self.emphasis(name, core, before, blanks or after)
        elif name == "a":
            core = self.link(core, attributes)
        elif name != "span":
            core = f"<{tag}>{core}</{name}>"
        inlines.append(before + core + blanks)

    def before(self) -> str:
        """The last character of the paragraph so far ("" at its start); an element that is only open counts as punctuation."""
        for at in range(len(self.inlines) - 1, -1, -1):
            if self.inlines[at]:
                return self.inlines[at][-1]
            if any(inline.at == at and inline.name != "span" for inline in self.open):
                return "("
        return ""

    def emphasis(self, name: str, core: str, lead: str, after: str) -> str:
        """`*em*` and `**strong**` where CommonMark's flanking rules let them open and close, HTML elsewhere."""
        before = lead[-1:] or self.before()
        outer = [inline.name for inline in self.open if inline.name in ("em", "strong")] if self.open else ()
        mark = "**" if name == "strong" else "_" if outer else "*"
        opens = core[0].isalnum() or not before or before.isspace() or is_punctuation(before)
        closes = core[-1].isalnum() or not after or after[0].isspace() or is_punctuation(after[0])
        alone = before not in ("*", "_") and name not in outer and not (mark == "_" and (before.isalnum() or after[:1].isalnum()))
        if opens and closes and alone:
            return f"{mark}{core}{mark}"
        return f"<{name}>{core}</{name}>"

    def link(self, core: str, attributes: dict[str, str]) -> str:
        if "href" not in attributes:
            return core
        url = attributes["href"]
        url = unescape_text(url)
        label = attributes.get("title", "")
        if core[:4] == url[:4] and not label and is_autolink(core, url):
            return f"<{url}>"
        if self.inlines and self.before() == "!":
            self.guard_exclamation()
        return f"[{core}]({destination(url)}{title(unescape(label)) if label else ''})"

    def guard_exclamation(self) -> None:
        """ "wow!" before a link is not an image."""
        at = next(at for at in range(len(self.inlines) - 1, -1, -1) if self.inlines[at])
        self.inlines[at] = self.inlines[at][:-1] + "\\!"


def _is_tight(item: Frame) -> bool:
    """Whether a list item's blocks can follow each other without blank lines and keep their meaning."""
    kinds = item.kinds
    if "p" in kinds:
        return False
    return len(kinds) < 2 or all(
        kind in _CAN_FOLLOW_TEXT and before not in ("quote", "table", "html") for before, kind in pairwise(kinds)
    )


def list_start(tag: str, length: int) -> int | None:
    """The first number of an ordered list, None for an unordered one."""
    if tag[:2].lower() != "ol":
        return None
    start = attributes_of(tag).get("start", "") if len(tag) > 2 else ""
    return int(start) if start.isascii() and start.isdigit() and int(start) + length < 10**9 else 1


_ATTRIBUTE = re.compile(r"""([a-zA-Z][\w:-]*)(?:\s*=\s*("[^"]*"|'[^']*'|[^\s"'>]+))?""")
_NAME = re.compile(r"/?[a-zA-Z][a-zA-Z0-9]*")
_PLAIN_LINK = re.compile(r'a href="([^"]*)"(?: rel="[^"]*")?')


def name_of(tag: str) -> str:
    """The name of a tag in small letters, with the slash of a closing one; "" of a comment."""
    name = _NAME.match(tag)
    return name[0].lower() if name else ""


def attributes_of(tag: str) -> dict[str, str]:
    plain = _PLAIN_LINK.fullmatch(tag)
    if plain:
        return {"href": plain[1]}
    found = _ATTRIBUTE.findall(tag, len(name_of(tag)))
    return {name.lower(): value[1:-1] if value[:1] in ('"', "'") else value for name, value in found}
