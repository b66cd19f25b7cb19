"""HTML of StackExchange bodies to Markdown: CommonMark plus GFM tables, mathematics left as it is.

Written for the HTML that StackExchange stores, and only for that: what it does not understand it refuses (`Unsupported`), and
`convert` falls back to markdownify. Rendering the result back gives the same text, the same structure and the same code;
benchmarks/fidelity.py measures how often.

One `re.split` over tags, one handler per exact tag string, one pass. Inline pieces gather in `inlines` until a block ends; blocks
gather in the frame (body, quote, list item) that holds them, and a frame is put together when it closes. Text is escaped only
where CommonMark would misread it, never inside `$...$`, `$$...$$` or `\\begin{}...\\end{}`.
"""

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache, partial
from html import unescape
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from markdownify import markdownify


class Unsupported(ValueError):
    """HTML that this converter does not understand; `tag` says which."""

    def __init__(self, tag: str) -> None:
        super().__init__(f"no faithful Markdown for {tag[:200]}: use convert(), which falls back to markdownify")
        self.tag = tag


def convert(html: str, converter: Literal["stackexchange", "markdownify"]) -> tuple[str, bool]:
    """The Markdown of a body, and whether the converter had to fall back. Raises nothing, whatever the body holds."""
    if converter == "stackexchange":
        try:
            return to_markdown(html), False
        except Unsupported:
            pass
    try:
        return markdownify_original(html), converter != "markdownify"
    except Exception:  # markdownify and bs4 recurse: a few hundred nested tags are enough for a RecursionError
        return unescape(_TAG.sub(" ", html)).strip(), True


def markdownify_original(html: str) -> str:
    """markdownify the way `lvwerra/stack-exchange-paired` was made (the H4 data set before it still holds HTML).

    markdownify's defaults (underlined headings, `*+-` bullets), the language from the class of `<pre>`, and afterwards runs of
    blank lines collapsed everywhere, in code too.
    """

    def language(element: Any) -> str | None:
        classes = element.get("class")
        return classes[0].split("-")[-1] if classes else None

    text = markdownify(html, code_language_callback=language)
    return re.sub(r"\n\s*\n", "\n\n", text).strip().encode("utf-8", "replace").decode()


def to_markdown(html: str) -> str:
    """The Markdown of one (already unescaped) body; raises Unsupported for HTML it does not understand."""
    if "\r" in html:
        html = html.replace("\r\n", "\n").replace("\r", "\n")
    parts = _TAG.split(html)
    post = _Post(parts)
    inlines = post.inlines
    find = _HANDLERS.get
    special = _SPECIAL.search
    at, end = -1, len(parts)
    while True:
        text = parts[at + 1]
        if text and (inlines or not text.isspace()):
            if special(text):
                text = escape(text, post.links > 0)
            if inlines and inlines[-1][-1:] == "\n":
                text = _at_line_start(text)
            inlines.append(text)
        at += 2
        if at >= end:
            return post.finish()
        tag = parts[at]
        handler = find(tag) or _handler(tag)
        at = handler(post, at) or at


# ---------------------------------------------------------------------------------------------------------------- text

_TAG = re.compile(r"""(<(?:/?[a-zA-Z][^<>"']*+(?:"[^"]*"[^<>"']*+|'[^']*'[^<>"']*+)*+>|!--.{0,4000}?-->))""", re.DOTALL)
_SPECIAL = re.compile(r"[\\`*_\[\]<&$~\n]")

# MathJax takes `$ x $` too, but "$5 or $6" is money: with blanks at an end it is mathematics only if it looks like it.
# `\$...\$` is how electronics and a few other sites write it.
_INLINE_MATH = r"(?:(?=[^\s$])(?:[^$\\]|\\[^$])*(?<!\s)|(?=[^$]*[\\^_{}])(?:[^$\\]|\\[^$])+)"
_MATH = re.compile(
    r"\\begin\{(\w+\*?)\}.{0,4000}?\\end\{\1\}"  # bounded, as every pattern here, to stay linear on hostile text
    r"|(?<!\\)\$\$(?!\$).+?\$\$"
    rf"|\\\${_INLINE_MATH}\\\$"
    rf"|(?<![\\$])\${_INLINE_MATH}(?<!\\)\$(?![\d$])",
    re.DOTALL,
)

_PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
_BACKSLASH = re.compile(r"\\(?=[!-/:-@\[-`{-~\n]|\s*\Z)")  # blanks at the end may move away
_STAR = re.compile(r"\*(?!\s)|(?<!\s)\*")
_UNDERSCORE = re.compile(r"(?<![^\W_])_(?!\s)|(?<!\s)_(?![^\W_])")
_ANGLE = re.compile(r"<(?=[a-zA-Z/!?]|\Z)")
_ENTITY = re.compile(r"&(?=#?\w+;)")
_TILDES = re.compile(r"~(?=~)|(?<=~)~")
_BRACKET = re.compile(r"[\[\]]")
_NEWLINES = re.compile(r"[ \t]*\n[ \t\n]*")
_LINE_START = re.compile(r"\n(?=>|#{1,6}(?:\s|\Z)|[-+*](?:\s|\Z)|=+(?:\n|\Z)|[|:-][|: \t-]*(?:\n|\Z))")
_NUMBERED_LINE = re.compile(r"\n1(?=[.)](?:\s|\Z))")

# A paragraph's first line can be misread in a few more ways: any number, a rule, a link definition.
_PARAGRAPH_START = frozenset(">#-+*_[0123456789")
_MISREAD_START = re.compile(
    r">|#{1,6}(?=\s|\Z)|[-+*](?=\s|\Z)|([-*_])[ \t]*(?:\1[ \t]*){2,}(?=\n|\Z)|\[(?:[^\[\]\\]|\\.)*\]:", re.DOTALL
)
_NUMBER_START = re.compile(r"\A(\d{1,9})(?=[.)](?:\s|\Z))")
_BLANK_LINES = re.compile(r"\n[ \t\n]*\n")


def escape(text: str, in_link: bool = False) -> str:
    """A piece of HTML text as Markdown that renders to the same text; mathematics stays as it is.

    What stands at the ends of the piece is unknown here, so a mark there is escaped when some neighbour could make it special.
    """
    if "&" in text:
        text = _unescape(text)
    if "$" not in text and "\\begin{" not in text:
        return _escape_prose(text, in_link)
    pieces: list[str] = []
    done = 0
    for math in _MATH.finditer(text):
        pieces += (_escape_prose(text[done : math.start()], in_link), math[0])
        done = math.end()
    pieces.append(_escape_prose(text[done:], in_link))
    return "".join(pieces)


def _escape_prose(text: str, in_link: bool) -> str:
    if "\\" in text:
        text = _BACKSLASH.sub(r"\\\\", text)
    if "`" in text:
        text = text.replace("`", "\\`")
    if "*" in text:
        text = _STAR.sub(r"\\*", text)
    if "_" in text:
        text = _UNDERSCORE.sub(r"\\_", text)
    if "<" in text:
        text = _ANGLE.sub(r"\\<", text)
    if "&" in text:
        text = _ENTITY.sub(r"\\&", text)
    if "~~" in text:
        text = _TILDES.sub(r"\\~", text)
    if in_link:
        text = _BRACKET.sub(r"\\\g<0>", text)
    elif "](" in text:
        text = text.replace("](", "]\\(")
    if "\n" in text:
        text = _escape_lines(_NEWLINES.sub("\n", text))
    return text


def _escape_lines(text: str) -> str:
    return _NUMBERED_LINE.sub(r"\n1\\", _LINE_START.sub(r"\n\\", text))


def _at_line_start(text: str) -> str:
    return _escape_lines("\n" + text.lstrip(" \t\n"))[1:]


def _unescape(text: str) -> str:
    """html.unescape, faster when the text holds only the entities that every body holds."""
    plain = text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"')
    return plain.replace("&amp;", "&") if plain.count("&") == plain.count("&amp;") else unescape(text)


def _code_span(code: str) -> str:
    """A code span: the delimiter is longer than any run of backticks inside, blanks at both ends are kept."""
    code = code.replace("\n", " ")
    if "`" not in code:
        return f"` {code} `" if code[0] == " " == code[-1] and not code.isspace() else f"`{code}`"
    runs = set(re.findall(r"`+", code))
    ticks = "`"
    while ticks in runs:
        ticks += "`"
    pad = " " if code[0] in " `" or code[-1] in " `" else ""
    return f"{ticks}{pad}{code}{pad}{ticks}"


def _fence(code: str, language: str) -> str:
    ticks = "```"
    if ticks in code:
        ticks = "`" * (1 + max(map(len, re.findall(r"`{3,}", code))))
    return f"{ticks}{language}\n{code}{'' if code.endswith(chr(10)) or not code else chr(10)}{ticks}"


def _destination(url: str) -> str:
    """A link destination: in angle brackets when it holds blanks or lone parentheses."""
    url = url.strip().replace("\n", "%0A").replace("`", "%60").replace("<", "%3C").replace(">", "%3E")
    url = _ENTITY.sub(r"\\&", url.replace("\\", "\\\\"))
    if re.search(r"\s", url) or not _balanced(url):
        return f"<{url}>"
    return url


_ODD_URL = re.compile(r"[\s()<>`\\&]")


def _balanced(url: str) -> bool:
    depth = 0
    for mark in re.findall(r"[()]", url):
        depth += 1 if mark == "(" else -1
        if depth < 0:
            return False
    return depth == 0


def _title(title: str) -> str:
    title = _ENTITY.sub(r"\\&", _BACKSLASH.sub(r"\\\\", title)).replace('"', '\\"')
    return f' "{_NEWLINES.sub(" ", title.strip())}"' if title.strip() else ""


@lru_cache(4096)
def _punctuation(char: str) -> bool:
    return char in _PUNCTUATION or unicodedata.category(char)[0] == "P"


# -------------------------------------------------------------------------------------------------------------- blocks


class _Frame:
    """What holds blocks: the body, a quote, a list (whose `items` are frames), a list item, a table."""

    __slots__ = ("blocks", "items", "kind", "kinds", "tag")

    def __init__(self, kind: str, tag: str = "") -> None:
        self.kind = kind
        self.tag = tag
        self.blocks: list[str] = []
        self.kinds: list[str] = []
        """One a block: p and text (a paragraph with and without `<p>`), code, heading, rule, quote, table, html; of a list its
        marker, with "!" where the list cannot stand right below a line of text."""
        self.items: list[Any] = []


class _Inline(NamedTuple):
    name: str
    at: int
    attributes: dict[str, str]
    tag: str


_MAX_DEPTH = 60
_CAN_FOLLOW_TEXT = frozenset(("code", "heading", "rule", "-", "*", ".", ")"))
_MARKERS = {"ul": "-*", "ol": ".)"}


class _Post:
    """The state of one conversion."""

    __slots__ = ("all_languages", "frame", "inlines", "language", "links", "one_line", "open", "paragraph", "parts", "stack")

    def __init__(self, parts: list[str]) -> None:
        self.parts = parts
        self.frame = _Frame("body")
        self.stack = [self.frame]
        self.inlines: list[str] = []
        self.open: list[_Inline] = []
        self.links = 0
        self.paragraph = "text"
        self.one_line = ""
        """The heading or table cell that is open: no line can end in it, no block can stand in it."""
        self.language = ""
        self.all_languages = ""

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
        text = text.strip()
        if not text:
            return
        if text[0] in _PARAGRAPH_START:
            if _MISREAD_START.match(text):
                text = "\\" + text
            elif text[0].isdigit():
                text = _NUMBER_START.sub(r"\1\\", text, count=1)
        if "\\" in text:
            text = _without_needless_escape(text)
        if "\n" in text:
            text = _BLANK_LINES.sub("\n", text)
        if text == "<br>":
            self.add(text, "html")  # alone on its line it is an HTML block, which only a blank line ends
        elif self.frame.kind in ("list", "table"):
            self.add(text, self.paragraph)
        else:
            self.frame.blocks.append(text)
            self.frame.kinds.append(self.paragraph)

    def add(self, block: str, kind: str) -> None:
        if self.frame.kind == "list":
            # A block between list items belongs, for the reader, to the item before it.
            self.push(self.frame.items[-1] if self.frame.items else _Frame("item"))
            if not self.stack[-2].items:
                self.stack[-2].items.append(self.frame)
        elif self.frame.kind == "table":
            raise Unsupported("a block between the cells of a <table>")
        self.frame.blocks.append(block)
        self.frame.kinds.append(kind)

    def start_block(self, at: int) -> None:
        """End the paragraph before a block's tag; refuse what Markdown has no place for."""
        if self.one_line or (self.open and any(inline.name != "span" for inline in self.open)):
            raise Unsupported(f"{self.parts[at]} inside <{self.one_line or self.open[-1].name}>")
        self.flush()
        self.paragraph = "text"

    # Frames

    def push(self, frame: _Frame) -> None:
        if len(self.stack) > _MAX_DEPTH:
            raise Unsupported(f"{frame.tag}, nested more than {_MAX_DEPTH} deep")
        self.stack.append(frame)
        self.frame = frame

    def close_frame(self) -> None:
        frame = self.stack.pop()
        self.frame = self.stack[-1]
        if frame.kind == "list":
            self.add_list(frame)
        elif frame.kind == "quote":
            mark = ">!" if "spoiler" in frame.tag else ">"
            lines = "\n\n".join(frame.blocks).split("\n")
            self.add("\n".join([f"{mark} {line}" if line else mark for line in lines]), "quote")
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

    def add_list(self, frame: _Frame) -> None:
        items = [item for item in frame.items if item.kind == "item"]
        if not items:
            return
        start = _list_start(frame.tag, len(items))
        name = "ul" if start is None else "ol"
        marker = _MARKERS[name][0]
        if self.frame.kinds and self.frame.kinds[-1][0] == marker:
            marker = _MARKERS[name][1]  # two lists in a row: another marker keeps them apart
        loose = not all(_is_tight(item.kinds) for item in items)
        lines = []
        for number, item in enumerate(items, start or 0):
            lead = f"{marker} " if start is None else f"{number}{marker} "
            text = ("\n\n" if loose else "\n").join(item.blocks)
            if "\n" in text:
                text = re.sub(r"\n(?=[^\n])", "\n" + " " * len(lead), text)
            lines.append((lead + text) if text else lead.rstrip())
        needs_blank = start not in (None, 1) or not items[0].blocks
        self.add(("\n\n" if loose else "\n").join(lines), marker + "!" if needs_blank else marker)

    # Tables

    def add_table(self, frame: _Frame) -> None:
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
            text = re.sub(r"[ \t]*\n[ \t\n]*", " ", text)
        if kind[0] == "h":
            if text.endswith("#"):
                text = re.sub(r"(^|[ \t])(#+)$", r"\1\\\2", text)
            self.add(f"{'#' * int(kind[1])} {text}".rstrip(), "heading")
        else:
            row = self.frame.items[-1]
            row[-1] = (text.replace("|", "\\|"), row[-1][1])

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
        core = content.strip()
        if name == "a":
            self.links -= 1
        elif not core:
            if content:
                inlines.append(content)
            return
        lead = content[: len(content) - len(content.lstrip())] if core else ""
        tail = content[len(lead) + len(core) :]
        if name in ("em", "strong"):
            core = self.emphasis(name, core, lead, tail or after)
        elif name == "a":
            core = self.link(core, attributes)
        elif name != "span":
            core = f"{tag}{core}</{name}>"
        inlines.append(lead + core + tail)

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
        opens = core[0].isalnum() or not before or before.isspace() or _punctuation(before)
        closes = core[-1].isalnum() or not after or after[0].isspace() or _punctuation(after[0])
        alone = before not in ("*", "_") and name not in outer and not (mark == "_" and (before.isalnum() or after[:1].isalnum()))
        if opens and closes and alone:
            return f"{mark}{core}{mark}"
        return f"<{name}>{core}</{name}>"

    def link(self, core: str, attributes: dict[str, str]) -> str:
        if "href" not in attributes:
            return core
        url = attributes["href"]
        if "&" in url:
            url = unescape(url)
        title = attributes.get("title", "")
        if core[:4] == url[:4] and not title and _AUTOLINK.fullmatch(url) and core in (url, escape(url, True)):
            return f"<{url}>"
        if self.inlines and self.before() == "!":
            self.guard_exclamation()
        if title:
            title = _title(unescape(title))
        return f"[{core}]({_destination(url) if _ODD_URL.search(url) else url}{title})"

    def guard_exclamation(self) -> None:
        """ "wow!" before a link is not an image."""
        at = next(at for at in range(len(self.inlines) - 1, -1, -1) if self.inlines[at])
        self.inlines[at] = self.inlines[at][:-1] + "\\!"


_AUTOLINK = re.compile(r"(?:https?|ftp)://[^\s<>\\`\[\]{}|^\";\x00-\x1f\x7f-\U0010ffff]*", re.IGNORECASE)


def _without_needless_escape(text: str) -> str:
    """A single star or underscore in a paragraph cannot be misread: there is no other to pair with."""
    if ("\\*" not in text and "\\_" not in text) or "`" in text or "$" in text or "](" in text or "\\begin" in text:
        return text
    for mark in "*_":
        if text.count(mark) == 1 and "\\" + mark in text and not text.startswith("\\") and "\n\\" not in text:
            text = text.replace("\\" + mark, mark)
    return text


def _is_tight(kinds: list[str]) -> bool:
    """Whether a list item's blocks can follow each other without blank lines and keep their meaning."""
    if "p" in kinds:
        return False
    return all(kind in _CAN_FOLLOW_TEXT and before not in ("quote", "table", "html") for before, kind in pairwise(kinds))


def _list_start(tag: str, length: int) -> int | None:
    """The first number of an ordered list, None for an unordered one."""
    if tag[:3].lower() != "<ol":
        return None
    start = _attributes(tag).get("start", "") if len(tag) > 4 else ""
    return int(start) if start.isascii() and start.isdigit() and int(start) + length < 10**9 else 1


# ------------------------------------------------------------------------------------- one handler a tag; `at` is its index

_Handler = Callable[[_Post, int], int | None]
_ATTRIBUTE = re.compile(r"""([a-zA-Z][\w:-]*)(?:\s*=\s*("[^"]*"|'[^']*'|[^\s"'>]+))?""")
_NAME = re.compile(r"</?([a-zA-Z][a-zA-Z0-9]*)")
_PLAIN_LINK = re.compile(r'<a href="([^"]*)"(?: rel="[^"]*")?>')
_LANGUAGE = re.compile(r"\blang(?:uage)?-([\w+#.-]+)")
_LANGUAGE_COMMENT = re.compile(r"<!--\s*language(-all)?:\s*(?:lang-)?([\w+#.-]+)\s*-->")
_ALIGN = re.compile(r"""text-align:\s*(left|right|center)|\balign="?(left|right|center)""", re.IGNORECASE)


def _attributes(tag: str) -> dict[str, str]:
    found = _ATTRIBUTE.findall(tag, _NAME.match(tag).end())  # type: ignore[union-attr]
    return {name.lower(): value[1:-1] if value[:1] in ('"', "'") else value for name, value in found}


def _open_paragraph(post: _Post, at: int) -> int | None:
    if post.one_line:
        if post.one_line[0] == "h" or "".join(post.inlines).strip():
            raise Unsupported(f"<p> inside <{post.one_line}>")
        return None
    if post.inlines or post.open:
        post.start_block(at)
    post.paragraph = "p"
    parts = post.parts
    if at + 2 < len(parts) and parts[at + 2] == "</p>":  # text without marks, the most frequent case by far
        text = parts[at + 1]
        post.add_paragraph(escape(text) if _SPECIAL.search(text) else text)
        post.paragraph = "text"
        return at + 2
    return None


def _close_paragraph(post: _Post, at: int) -> None:
    if not post.one_line:
        post.flush()
        post.paragraph = "text"


def _open_heading(post: _Post, at: int) -> None:
    post.start_block(at)
    post.one_line = "h" + post.parts[at][2]


def _close_heading(post: _Post, at: int) -> None:
    if post.one_line[:1] == "h":
        post.end_one_line()


def _rule(post: _Post, at: int) -> None:
    post.start_block(at)
    # `- ---` would be one rule and "text" over `---` a heading; `___` is neither
    post.add("___" if any(frame.kind in ("list", "item") for frame in post.stack) else "---", "rule")


def _open_quote(post: _Post, at: int) -> None:
    post.start_block(at)
    post.push(_Frame("quote", post.parts[at]))


def _close_quote(post: _Post, at: int) -> None:
    post.start_block(at)
    post.close_to(("quote",))


def _open_list(post: _Post, at: int) -> None:
    post.start_block(at)
    if post.frame.kind == "list":
        if not post.frame.items:
            post.frame.items.append(_Frame("item"))
        post.push(post.frame.items[-1])
    post.push(_Frame("list", post.parts[at]))


def _close_list(post: _Post, at: int) -> None:
    post.start_block(at)
    post.close_to(("list",), stop=("quote",))


def _open_item(post: _Post, at: int) -> None:
    post.start_block(at)
    if post.frame.kind != "list":
        post.close_to(("item",), stop=("list", "quote"))
        if post.frame.kind != "list":
            raise Unsupported("<li> outside a list")
    item = _Frame("item")
    post.frame.items.append(item)
    post.push(item)


def _close_item(post: _Post, at: int) -> None:
    post.start_block(at)
    post.close_to(("item",), stop=("list", "quote"))


def _pre(post: _Post, at: int) -> int:
    """A code block: everything to `</pre>`; marks inside are dropped, their text is kept."""
    post.start_block(at)
    parts = post.parts
    classes = parts[at]
    code = [parts[at + 1].removeprefix("\n")]
    for close in range(at + 2, len(parts), 2):
        tag = parts[close]
        if tag[:5].lower() == "</pre":
            break
        if tag[:5].lower() == "<code":
            classes += tag
        elif tag[:3].lower() == "<br":
            code.append("\n")
        elif tag not in _HANDLERS:
            _handler(tag)
        code.append(parts[close + 1])
    else:
        raise Unsupported("<pre> without </pre>")
    language = _LANGUAGE.search(classes)
    name = language[1] if language else post.language or post.all_languages
    post.language = ""
    post.add(_fence(_unescape("".join(code)), "" if name in ("none", "default") else name), "code")
    return close


def _code(post: _Post, at: int) -> int | None:
    parts = post.parts
    if len(parts) <= at + 2 or parts[at + 2] != "</code>" or (post.inlines and post.inlines[-1][-1:] == "`"):
        _open_inline("code", post, at)  # marks inside, or right behind another code span: only HTML can say it
        return None
    code = parts[at + 1]
    if code:
        post.inlines.append(_code_span(_unescape(code) if "&" in code else code))
    return at + 2


def _math(post: _Post, at: int) -> int | None:
    if len(post.parts) <= at + 2 or post.parts[at + 2] != "</span>":
        _open_inline("span", post, at)
        return None
    post.inlines.append(_unescape(post.parts[at + 1]))
    return at + 2


def _break(post: _Post, at: int) -> None:
    """A line break is two blanks; HTML where no line can end, at the start and end of a paragraph, and after another."""
    inlines = post.inlines
    if inlines and not post.one_line:
        after = post.parts[at + 1]
        last = inlines[-1].rstrip(" \t\n")
        ends = not after.strip() and (at + 2 >= len(post.parts) or not _continues(post.parts[at + 2]))
        if last and not last.endswith("<br>") and not ends:
            inlines[-1] = last
            inlines.append("  \n")
            return
    # With nothing but blanks after it on its line, a `<br>` at the start would make an HTML block.
    post.parts[at + 1] = post.parts[at + 1].lstrip(" \t\n")
    inlines.append("<br>")


def _continues(tag: str) -> bool:
    name = _NAME.match(tag)
    return tag[1] != "/" and name is not None and name[1].lower() in (*_INLINE, "a", "img")


def _image(post: _Post, at: int) -> None:
    values = _attributes(post.parts[at])
    alt = escape(values.get("alt", ""), True).replace("\n", " ")
    url = _destination(unescape(values.get("src", "")))
    post.inlines.append(f"![{alt}]({url}{_title(unescape(values.get('title', '')))})")


def _open_link(post: _Post, at: int) -> int | None:
    tag = post.parts[at]
    plain = _PLAIN_LINK.fullmatch(tag)
    attributes = {"href": plain[1]} if plain else _attributes(tag)
    parts = post.parts
    if at + 2 < len(parts) and parts[at + 2] == "</a>":
        text = parts[at + 1]
        if text and not (text[0].isspace() or text[-1].isspace()):
            post.inlines.append(post.link(escape(text, True) if _SPECIAL.search(text) else text, attributes))
            return at + 2
    post.open.append(_Inline("a", len(post.inlines), attributes, tag))
    post.inlines.append("")
    post.links += 1
    return None


def _open_emphasis(name: str, post: _Post, at: int) -> int | None:
    parts = post.parts
    text = parts[at + 1]
    if at + 2 < len(parts) and parts[at + 2] == f"</{name}>" and text and not (text[0].isspace() or text[-1].isspace()):
        text = escape(text, post.links > 0) if _SPECIAL.search(text) else text
        post.inlines.append(post.emphasis(name, text, "", _following(parts, at + 2)))
        return at + 2
    _open_inline(name, post, at)
    return None


def _open_inline(name: str, post: _Post, at: int) -> None:
    if len(post.open) > _MAX_DEPTH:
        raise Unsupported(f"{post.parts[at]}, nested more than {_MAX_DEPTH} deep")
    post.open.append(_Inline(name, len(post.inlines), {}, post.parts[at]))
    post.inlines.append("")


def _close_inline(name: str, post: _Post, at: int) -> None:
    for depth in range(len(post.open) - 1, -1, -1):
        if post.open[depth].name == name:
            after = _following(post.parts, at) if name in ("em", "strong") else ""
            while len(post.open) > depth:
                post.close_inline(after)
            return


def _following(parts: list[str], at: int) -> str:
    """The character that the Markdown will have after the tag at this index, as far as flanking rules care."""
    for index in range(at + 1, len(parts), 2):
        text = parts[index]
        if text:
            return unescape(text[:40])[0] if text[0] == "&" else text[0]
        if index + 1 < len(parts):
            tag = parts[index + 1].lower()
            if not tag.startswith(("<!--", "<span", "</span")):
                name = _NAME.match(tag)
                return "<" if name and name[1] in _INLINE_NAMES else "\n"
    return ""


def _open_table(post: _Post, at: int) -> None:
    post.start_block(at)
    if any(frame.kind == "table" for frame in post.stack):
        raise Unsupported("a <table> in a <table>")
    post.push(_Frame("table", post.parts[at]))


def _close_table(post: _Post, at: int) -> None:
    if post.one_line:
        post.end_one_line()
    post.start_block(at)
    post.close_to(("table",))


def _open_row(post: _Post, at: int) -> None:
    if post.frame.kind != "table":
        raise Unsupported("<tr> outside a <table>")
    if post.one_line:
        post.end_one_line()
    post.frame.items.append([])


def _open_cell(post: _Post, at: int) -> None:
    if post.frame.kind != "table" or not post.frame.items:
        raise Unsupported("a table cell outside a row")
    if post.one_line:
        post.end_one_line()
    post.flush()
    side = _ALIGN.search(post.parts[at]) if len(post.parts[at]) > 4 else None
    post.frame.items[-1].append(("", (side[1] or side[2]).lower() if side else ""))
    post.one_line = "td"


def _close_cell(post: _Post, at: int) -> None:
    if post.one_line == "td":
        post.end_one_line()


def _comment(post: _Post, at: int) -> None:
    """Comments vanish; `<!-- language: lang-js -->` names the language of the code that follows."""
    language = _LANGUAGE_COMMENT.fullmatch(post.parts[at])
    if language and language[1]:
        post.all_languages = language[2]
    elif language:
        post.language = language[2]


def _container(post: _Post, at: int) -> None:
    """A `<div>`: its blocks count, it does not."""
    if not post.one_line:
        post.start_block(at)


def _html_block(post: _Post, at: int) -> None:
    """A block that Markdown has no mark for stays HTML; blank lines around the tags let its content be Markdown."""
    post.start_block(at)
    post.add(post.parts[at].replace("\n", " "), "html")


def _frame_block(post: _Post, at: int) -> int:
    """An embedded video has no text: it stays as it is."""
    post.start_block(at)
    if len(post.parts) <= at + 2 or post.parts[at + 2].lower() != "</iframe>":
        raise Unsupported(post.parts[at])
    post.add(f"{post.parts[at]}</iframe>".replace("\n", " "), "html")
    return at + 2


def _nothing(post: _Post, at: int) -> None:
    pass


_INLINE = {"em": "em", "i": "em", "strong": "strong", "b": "strong", "code": "code", "span": "span"} | {
    name: name
    for name in (
        *("sup", "sub", "kbd", "del", "s", "strike", "ins", "u", "small", "big", "tt", "abbr", "acronym", "cite", "dfn", "mark"),
        *("q", "samp", "var", "font", "ruby", "rb", "rt", "rp", "bdo"),
    )
}
_INLINE_NAMES = frozenset((*_INLINE, "a", "img"))


def _handlers() -> dict[str, _Handler]:
    """Handlers by name (`p`, `/p`)."""
    table: dict[str, _Handler] = {
        "p": _open_paragraph, "/p": _close_paragraph, "hr": _rule, "br": _break, "/br": _nothing, "img": _image,
        "blockquote": _open_quote, "/blockquote": _close_quote, "ul": _open_list, "ol": _open_list, "/ul": _close_list,
        "/ol": _close_list, "li": _open_item, "/li": _close_item, "pre": _pre, "/pre": _nothing, "code": _code,
        "a": _open_link, "table": _open_table, "/table": _close_table, "tr": _open_row, "/tr": _close_cell, "td": _open_cell,
        "th": _open_cell, "/td": _close_cell, "/th": _close_cell, "div": _container, "/div": _container,
        "iframe": _frame_block, "em": partial(_open_emphasis, "em"), "strong": partial(_open_emphasis, "strong"),
    }  # fmt: skip
    for level in "123456":
        table |= {"h" + level: _open_heading, "/h" + level: _close_heading}
    for name in ("thead", "tbody", "tfoot"):
        table |= {name: _nothing, "/" + name: _nothing}
    for name in ("dl", "dt", "dd", "details", "summary"):
        table |= {name: _html_block, "/" + name: _html_block}
    for name, kind in {**_INLINE, "a": "a"}.items():
        table.setdefault(name, partial(_open_inline, kind))
        table["/" + name] = partial(_close_inline, kind)
    return table


_BY_NAME = _handlers()
_HANDLERS: dict[str, _Handler] = {f"<{name}>": handler for name, handler in _BY_NAME.items()} | {
    "<br/>": _break,
    "<br />": _break,
    "<hr/>": _rule,
    "<hr />": _rule,
    '<span class="math-container">': _math,
}


def _handler(tag: str) -> _Handler:
    """The handler of a tag that is not one of the plain ones: attributes, capitals, comments."""
    if tag.startswith("<a "):
        return _open_link
    if tag.startswith("<!--"):
        return _comment
    name = _NAME.match(tag)
    key = name[1].lower() if name else ""
    try:
        return _BY_NAME["/" + key if tag[1] == "/" else key]
    except KeyError:
        raise Unsupported(tag) from None
