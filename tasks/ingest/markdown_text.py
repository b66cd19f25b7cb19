"""Text of StackExchange's HTML as Markdown that renders to the same text: what to escape, code spans, fences, addresses.

Text is escaped only where CommonMark would misread it, never inside `$...$`, `$$...$$` or `\\begin{}...\\end{}`.
"""

import re
import unicodedata
from functools import lru_cache
from html import unescape
from typing import Any

# ---------------------------------------------------------------------------------------------------------- what is special

# MathJax takes `$ x $` too, but "$5 or $6" is money: with blanks at an end it is mathematics only if it looks like it.
# `\$...\$` is how electronics and a few other sites write it; elsewhere `\$` is a dollar.
_LOOKS_LIKE_MATH = r"(?=(?:[^$\\]|\\[^$])*?(?:[\^_{}]|\\[a-zA-Z]))"
_MATH = re.compile(
    r"\\begin\{(?P<name>\w+\*?)\}.{0,4000}?\\end\{(?P=name)\}"  # bounded, as every pattern here, to stay linear on hostile text
    rf"|\\\$(?:(?=[^\s$])|{_LOOKS_LIKE_MATH})(?:[^$\\]|\\[^$])+?(?:(?<!\s)|{_LOOKS_LIKE_MATH})\\\$(?!\d)"
    r"|\$(?:(?<!\\\$)\$(?!\$).+?\$\$"
    rf"|(?<![\\$]\$)(?:(?=[^\s$])(?:[^$\\]|\\.)*(?<!\s)|(?=[^$]*[\\^_{{}}])(?:[^$\\]|\\.)+)(?<!\\)\$(?![\d$]))",
    re.DOTALL,
)
_CODE_OR_MATH_OR_PIPE = re.compile(rf"(?P<math>{_MATH.pattern})|(?<![\\`])(?P<ticks>`+)(?!`).*?(?<!`)(?P=ticks)(?!`)|\|", re.DOTALL)

_PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
_BACKSLASH = re.compile(r"\\(?=[!-/:-@\[-`{-~]|[ \t]*\n|\s*\Z)")  # blanks at the end may move away
# A pattern that begins with its mark is found several times as fast as one that begins with a choice of assertions.
_STAR = re.compile(r"\*(?:(?!\s)|(?<!\s\*))")
_UNDERSCORE = re.compile(r"_(?:(?<![^\W_]_)(?!\s)|(?<!\s_)(?![^\W_]))")
_ANGLE = re.compile(r"<(?=[a-zA-Z/!?]|\Z)")
_ENTITY = re.compile(r"&(?=#?\w+;)")
_TILDES = re.compile(r"~(?:(?=~)|(?<=~~))")
_BRACKET = re.compile(r"[\[\]]")
_LINE_MARK = re.compile(r"\n[>#\-+*=|:1]")
_LINE_START = re.compile(r"\n(?=>|#{1,6}(?:\s|\Z)|[-+*](?:\s|\Z)|=+[ \t]*(?:\n|\Z)|[|:-][|: \t-]*(?:\n|\Z))")
_NUMBERED_LINE = re.compile(r"\n1(?=[.)](?:\s|\Z))")

# A paragraph's first line can be misread in a few more ways: any number, a rule, a link definition.
_PARAGRAPH_START = frozenset(">#-+*_[0123456789")
_MISREAD_START = re.compile(
    r">|#{1,6}(?=\s|\Z)|[-+*](?=\s|\Z)|([-*_])[ \t]*(?:\1[ \t]*){2,}(?=\n|\Z)|\[(?:[^\[\]\\]|\\.)*\]:", re.DOTALL
)
_NUMBER_START = re.compile(r"(\d{1,9})[.)](?:\s|\Z)")
_BREAK_ALONE = re.compile(r"\A<br>\s*\n\s*")  # a tag alone on a first line makes an HTML block
_BLANK_LINES = re.compile(r"\n[ \t\n]*\n")


def marks_in(html: str) -> str:
    """The marks that may need an escape, newlines aside, that a body holds.

    Most bodies hold none and most others one or two, so that few of their pieces need be looked at any further.
    """
    if (
        ("&" in html or "_" in html or "*" in html or "[" in html or "]" in html)
        or ("`" in html or "\\" in html or "$" in html or "~" in html)
    ):  # fmt: skip
        return "".join([mark for mark in "&_*[]`\\$~" if mark in html])
    return ""


def marked(text: str, marks: str) -> bool:
    for mark in marks:  # noqa: SIM110  any() takes twice the time
        if mark in text:
            return True
    return False


def escape(text: str, in_link: bool = False) -> str:
    """A piece of HTML text as Markdown that renders to the same text; mathematics stays as it is.

    What stands at the ends of the piece is unknown here, so a mark there is escaped when some neighbour could make it special.
    """
    if "&" in text:
        text = unescape_text(text)
    if "$" not in text and "\\begin{" not in text:
        return _escape_prose(text, in_link)
    pieces: list[str] = []
    done = 0
    for math in _MATH.finditer(text):
        pieces += (_escape_prose(text[done : math.start()], in_link), math[0])
        done = math.end()
    pieces.append(_escape_prose(text[done:], in_link))
    return "".join(pieces)


def math_in_one_line(text: str) -> str:
    """The text with no newline in its mathematics, where a quote's `>` would otherwise stand."""
    return _MATH.sub(lambda math: math[0].replace("\n", " "), text) if "$" in text or "\\begin{" in text else text


def cell(text: str) -> str:
    """The text of a table cell, its pipes escaped, but for those of its mathematics."""
    if "|" not in text:
        return text
    if "$" not in text:
        return text.replace("|", "\\|")
    return _CODE_OR_MATH_OR_PIPE.sub(lambda found: found[0] if found["math"] else found[0].replace("|", "\\|"), text)


def _backslashed(mark: re.Match[str]) -> str:
    return "\\" + mark[0]


def _escape_prose(text: str, in_link: bool) -> str:
    if "\\" in text:
        text = _BACKSLASH.sub(_backslashed, text)
    if "`" in text:
        text = text.replace("`", "\\`")
    if "*" in text:
        text = _STAR.sub(_backslashed, text)
    if "_" in text:
        text = _UNDERSCORE.sub(_backslashed, text)
    if "<" in text:
        text = _ANGLE.sub(_backslashed, text)
    if "&" in text:
        text = _ENTITY.sub(_backslashed, text)
    if "~~" in text:
        text = _TILDES.sub(_backslashed, text)
    if in_link:
        if "[" in text or "]" in text:
            text = _BRACKET.sub(_backslashed, text)
    elif "](" in text:
        text = text.replace("](", "]\\(")
    if "\n" in text:
        text = _escape_lines(one_newline(text) if _has_blank_ends(text) else text)
    return text


def one_newline(text: str, newline: str = "\n") -> str:
    """The text with `newline` for each of its newlines and the blanks around it."""
    first, *inner, last = text.split("\n")
    lines = [line.strip(" \t") for line in inner]
    return newline.join([first.rstrip(" \t"), *filter(None, lines), last.lstrip(" \t")])


def _has_blank_ends(text: str) -> bool:
    """Whether some line may have blanks at an end, or none but blanks."""
    return " \n" in text or "\n " in text or "\n\n" in text or "\t" in text


def _escape_lines(text: str) -> str:
    if not _LINE_MARK.search(text):
        return text
    return _NUMBERED_LINE.sub(r"\n1\\", _LINE_START.sub(r"\n\\", text))


def at_line_start(text: str) -> str:
    """Text, escaped already as such, that comes to stand at the start of a line."""
    text = text.lstrip(" \t\n")
    line = f"\n{text[:200]}"
    if _LINE_START.match(line):
        return "\\" + text
    return f"1\\{text[1:]}" if _NUMBERED_LINE.match(line) else text


def paragraph(text: str) -> str:
    """A paragraph put together from its pieces, with what can be misread at its start escaped."""
    text = text.strip()
    if text[:1] in _PARAGRAPH_START:
        if text[0].isdigit():
            number = _NUMBER_START.match(text)
            if number:
                text = f"{number[1]}\\{text[number.end(1) :]}"
        elif _MISREAD_START.match(text):
            text = "\\" + text
    if "\\" in text:
        text = _without_needless_escape(text)
    if "\n" in text:
        text = _BLANK_LINES.sub("\n", text)
        if text.startswith("<br>"):
            text = _BREAK_ALONE.sub("<br>", text, count=1)
    return text


def _without_needless_escape(text: str) -> str:
    """A single star or underscore in a paragraph cannot be misread: there is no other to pair with."""
    if ("\\*" not in text and "\\_" not in text) or "`" in text or "$" in text or "](" in text or "\\begin" in text:
        return text
    for mark in "*_":
        if text.count(mark) == 1 and "\\" + mark in text and not text.startswith("\\") and "\n\\" not in text:
            text = text.replace("\\" + mark, mark)
    return text


def without_blanks(text: str) -> tuple[str, str, str]:
    """The content of an inline element without the blanks at its ends, between them: a mark of Markdown cannot stand at a blank."""
    core = text.strip()
    if len(core) == len(text):
        return "", core, ""
    if not core:
        return "", "", text
    at = text.index(core)
    before, after = text[:at], text[at + len(core) :]
    if before and core[0] in "*_" and core[1:2] in _BLANK:  # it needed no escape as long as it stood between blanks
        core = "\\" + core
    if after and core[-1] in "*_" and core[-2:-1] in _BLANK:
        core = f"{core[:-1]}\\{core[-1]}"
    if "  " in after and "\n" not in after:
        after = _BLANKS.sub(" ", after)  # two before a newline would be a line break
    return before, core, after


_BLANK = frozenset(("", " ", "\n", "\t"))
_BLANKS = re.compile("  +")


def unescape_text(text: str) -> str:
    """html.unescape, faster when the text holds only the entities that every body holds."""
    if "&" not in text:
        return text
    if "&lt;" in text or "&gt;" in text or "&quot;" in text:
        text = text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"')
    return text.replace("&amp;", "&") if text.count("&") == text.count("&amp;") else unescape(text)


@lru_cache(4096)
def is_punctuation(char: str) -> bool:
    return char in _PUNCTUATION or unicodedata.category(char)[0] == "P"


# ------------------------------------------------------------------------------------------------------ code, addresses


def code_span(code: str) -> str:
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


def fence(code: str, language: str) -> str:
    ticks = "```"
    if ticks in code:
        ticks = "`" * (1 + max(map(len, re.findall(r"`{3,}", code))))
    return f"{ticks}{language}\n{code}{'' if code.endswith(chr(10)) or not code else chr(10)}{ticks}"


# Not with `%`: some renderers show such an address decoded.
_AUTOLINK = re.compile(r"(?:https?|ftp)://[^\s<>\\`\[\]{}|^\";%\x00-\x1f\x7f-\U0010ffff]*", re.IGNORECASE)


def is_autolink(label: str, url: str) -> bool:
    """Whether a link is its own address, so that `<address>` says it."""
    return label in (url, escape(url, True)) and _AUTOLINK.fullmatch(url) is not None


_ODD_URL = re.compile(r"[\x00- ()<>`\\\x7f]")


def destination(url: str) -> str:
    """A link destination: in angle brackets when it holds blanks or lone parentheses."""
    odd = not url.isascii() or _ODD_URL.search(url)
    if odd:
        url = url.strip().replace("\n", "%0A").replace("`", "%60").replace("<", "%3C").replace(">", "%3E").replace("\\", "\\\\")
    if "&" in url and ";" in url:
        url = _ENTITY.sub(_backslashed, url)
    if odd and (_SPACE.search(url) or not _balanced(url)):
        return f"<{url}>"
    return url


_SPACE = re.compile(r"\s")


def _balanced(url: str) -> bool:
    depth = 0
    for mark in url:
        if mark == "(":
            depth += 1
        elif mark == ")":
            depth -= 1
            if depth < 0:
                return False
    return depth == 0


def title(text: str) -> str:
    text = _ENTITY.sub(_backslashed, _BACKSLASH.sub(_backslashed, text)).replace('"', '\\"').strip()
    return f' "{one_newline(text, " ") if chr(10) in text else text}"' if text else ""


# ------------------------------------------------------------------------------------------- the fast path of most paragraphs

_URL = r'[^" \t\n<>`\\]*+'
_IMAGE = rf'img src="({_URL})" alt="([^"<>&\\`*_\[\]~$\n]*+)" ?/?'
_SPAN = re.compile(
    rf'<(?:a href="(?<!!<a href=")({_URL})"(?: rel="[^"]*+")?>(?:<{_IMAGE}>|(?!\s)([^<]++)(?<!\s))</a>'
    # Emphasis that opens and closes for sure: see Post.emphasis. Not right behind another tag: `*a**b*` would be misread.
    r"|(em|strong)>(?<!><em>)(?<!><strong>)(?:(?=[^\W_])|(?<![^\s(]<em>)(?<![^\s(]<strong>)(?!\s))([^<]++)"
    r"(?:(?<=[^\W_])</\5>|(?<!\s)</\5>(?=[\s.,;:!?)]|\Z))"
    r"|code>(?<!><code>)([^<]++)</code>"
    r"|(sup|sub|kbd)>(?!\s)([^<]++)(?<!\s)</\8>"
    rf"|{_IMAGE}>"
    r"|(br)(?<=[^\s>]<br) ?/?>\s*+(?=[^\s<>#\-+*=|:1])"
    r"|)"
)
_SPAN_WIDTH = 13  # of a span and the text behind it in what _SPAN.split gives


def simple(html: str, marks: str) -> str | None:
    """The Markdown of a run of text with plain spans, which most paragraphs are; None for any other run.

    It takes half the time of the tag by tag way, with the same result.
    """
    if "\n" in html:
        if _has_blank_ends(html):
            if "<code" in html:
                return None
            html = one_newline(html)
        if _LINE_MARK.search(html) or "$" in marks or "\\" in marks:
            return None  # lines of mathematics are not to be touched, or to be joined
    has_marks = marks and marked(html, marks)
    if "<" not in html:
        return paragraph(escape(html)) if has_marks else html
    parts: list[Any] = _SPAN.split(html)
    text = parts[0]
    pieces = [escape(text) if has_marks and marked(text, marks) else text]
    for at in range(1, len(parts), _SPAN_WIDTH):
        url, image, alt, label, name, word, code, tag, inner, lone_image, lone_alt, line_break, text = parts[at : at + _SPAN_WIDTH]
        if has_marks:
            if label and marked(label, marks):
                label = escape(label, True)
            elif word:
                if pieces[-1][-1:] in _STARS or "&" in word:
                    return None
                if marked(word, marks):
                    word = escape(word)
            elif inner and marked(inner, marks):
                inner = escape(inner)
            if marked(text, marks):
                text = escape(text)
        if label:
            if label[:4] == url[:4] and is_autolink(label, unescape_text(url)):
                pieces.append(f"<{unescape_text(url)}>")
            else:
                pieces.append(f"[{label}]({_address(url)})")
        elif word:
            pieces.append(f"*{word}*" if name == "em" else f"**{word}**")
        elif code:
            pieces.append(code_span(unescape_text(code)))
        elif inner:
            pieces.append(f"<{tag}>{inner}</{tag}>")
        elif line_break:
            pieces.append("  \n")
            text = at_line_start(text)
        elif lone_image is not None:
            pieces.append(f"![{lone_alt}]({_address(lone_image)})")
        elif image is not None:
            pieces.append(f"[![{alt}]({_address(image)})]({_address(url)})")
        else:
            return None
        pieces.append(text)
    text = "".join(pieces)
    return paragraph(text) if has_marks else text


_STARS = frozenset(("", "*", "_"))


def _address(url: str) -> str:
    return destination(unescape_text(url)) if "&" in url or "(" in url or ")" in url else url
