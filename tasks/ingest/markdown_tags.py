"""Reading a body: one handler a tag, and the ways to find the tags, the cheapest first.

`read_body` goes from `</p>` to `</p>`, for most of a body is paragraphs and str.split finds them fastest. What stands between
two paragraphs goes to `read_blocks`, what stands in one and is not `simple` to `read_inlines`, which knows every tag. A body that
these cuts tear (a tag in an attribute, an unescaped `<`) is `Torn`, and read in one piece by `read_inlines`.
"""

import re
from collections.abc import Callable
from functools import lru_cache, partial
from html import unescape
from typing import Any

from tasks.ingest.markdown_post import MARKERS, MAX_DEPTH, NO_BLOCKS, Frame, Inline, Post, Unsupported, attributes_of, name_of
from tasks.ingest.markdown_text import (
    at_line_start,
    code_span,
    destination,
    escape,
    fence,
    marked,
    simple,
    title,
    unescape_text,
    without_blanks,
)

Handler = Callable[[Post, str], None]


class Torn(Exception):
    """A tag stands across a place where the body was cut: it has to be read in one piece."""


# ------------------------------------------------------------------------------------------------------------------- reading

_ATTRIBUTES = r"""[^<>"']*+(?:"[^"]*"[^<>"']*+|'[^']*'[^<>"']*+)*+"""
_COMMENT = r"!--(?:[^<-]++|-(?!->)|<(?!!--))*+--"  # a comment in a comment would make it quadratic
TAG = re.compile(rf"<(/?[a-zA-Z]{_ATTRIBUTES}|{_COMMENT})>")

# A tag, or an inline element that holds only text. Split gives seven for each: url, label, name, word, code, tag, text behind.
_TOKEN = re.compile(
    r'<(?:a href="([^"]*+)"(?: rel="[^"]*+")?>([^<]*+)</a>|(em|strong|i|b)>([^<]*+)</\3>|code>([^<]*+)</code>'
    rf"|(/?[a-zA-Z]{_ATTRIBUTES}|{_COMMENT})>)",
    re.DOTALL,
)
_WIDTH = 7
_TAG_AT, _TEXT_AT = 5, 6

_INLINE = {"em": "em", "i": "em", "strong": "strong", "b": "strong", "code": "code", "span": "span"} | {
    name: name
    for name in (
        *("sup", "sub", "kbd", "del", "s", "strike", "ins", "u", "small", "big", "tt", "abbr", "acronym", "cite", "dfn", "mark"),
        *("q", "samp", "var", "font", "ruby", "rb", "rt", "rp", "bdo"),
    )
}
_INLINE_NAMES = frozenset((*_INLINE, "a", "img"))

# A tag that is not inline, and its content when nothing but inline tags is in it, or in its list items. Split gives four: tag,
# name, content or None, what stands behind.
_INLINE_TAG = rf"(?:!--|/?(?:br|{'|'.join(sorted(_INLINE_NAMES))})\b)"
_CONTENT = rf"[^<]*+(?:<{_INLINE_TAG}[^<]*+)*+"
_BLOCK = re.compile(
    rf"<(?!{_INLINE_TAG})((/?[a-zA-Z][a-zA-Z0-9]*+){_ATTRIBUTES})>(?:((?<=<[uo]l>)(?:\s*+<li>{_CONTENT}</li>)++\s*+|{_CONTENT})</\2>)?"
)

_BLANKS = frozenset(("", "\n\n", "\n", "\n  \n  ", "\n  "))
_ODD_START = frozenset(("", *">#-+0123456789"))  # simple text has no other start that could be misread


def read_body(post: Post, html: str) -> None:
    *chunks, last = html.split("</p>")
    marks = post.marks
    ready, blocks, kinds = True, post.frame.blocks, post.frame.kinds
    for chunk in chunks:
        head, tag, content = chunk.partition("<p>")
        if head not in _BLANKS:
            read_blocks(post, head)
            ready, blocks, kinds = _ready(post)
        if ready and tag:
            text = simple(content, marks) if "<" in content or "\n" in content or marks else content
            if text is not None:
                text = text.strip()
                if text[:1] in _ODD_START:
                    post.paragraph = "p"
                    post.add_paragraph(text)
                    post.paragraph = "text"
                else:
                    blocks.append(text)
                    kinds.append("p")
                continue
        if tag:
            _open_paragraph(post, "p")
        read_run(post, content)
        post.end_paragraph()
        ready, blocks, kinds = _ready(post)
    if last not in _BLANKS:
        read_blocks(post, last)


def _ready(post: Post) -> tuple[bool, list[str], list[str]]:
    """Whether a paragraph could be put down as it is, and where."""
    frame = post.frame
    return not (post.inlines or post.open or post.one_line or frame.kind in NO_BLOCKS), frame.blocks, frame.kinds


def read_blocks(post: Post, html: str) -> None:
    """Read what is not in a `<p>`."""
    if len(html) < 40:
        bare = _bare_tags(html)
        if bare is not None:
            for handler, tag in bare:
                handler(post, tag)
            return
    parts: list[Any] = _BLOCK.split(html)
    inlines = post.inlines
    run = parts[0]
    if run and (inlines or not run.isspace()):
        read_run(post, run)
    for at in range(1, len(parts), 4):
        tag, name, content, run = parts[at : at + 4]
        if name not in _HANDLERS:
            raise Torn  # unknown, or in capitals
        handler = _HANDLERS[name]
        if content is None:
            handler(post, tag)
        else:
            whole = _WHOLES.get(name)
            if whole is None or not whole(post, tag, content):
                handler(post, tag)
                (read_blocks if whole is _flat_list else read_run)(post, content)
                _HANDLERS["/" + name](post, "/" + name)
        if run and (inlines or not run.isspace()):
            read_run(post, run)


@lru_cache(4096)
def _bare_tags(html: str) -> list[tuple[Handler, str]] | None:
    """The handlers of HTML that is only tags (`</li>`, `<li>`), which stands between most paragraphs, again and again the same."""
    parts: list[Any] = _BLOCK.split(html)
    if any(part is not None for part in parts[3::4]) or not "".join(parts[::4]).isspace():
        return None
    handlers = [_HANDLERS.get(name) for name in parts[2::4]]
    return None if None in handlers else list(zip(handlers, parts[1::4]))  # type: ignore[arg-type]


def read_run(post: Post, html: str) -> None:
    """Read text and inline elements."""
    if "<" in html:
        read_inlines(post, html)
    else:
        _add_text(post, html)


def read_inlines(post: Post, html: str) -> None:
    """Read any HTML, tag by tag."""
    parts: list[Any] = _TOKEN.split(html)
    post.parts = parts
    inlines = post.inlines
    find = _HANDLERS.get
    if parts[0]:
        _add_text(post, parts[0])
    post.steps = iter(range(1, len(parts), _WIDTH))
    for at in post.steps:
        url, label, name, word, code, tag, text = parts[at : at + _WIDTH]
        if tag is not None:
            post.at = at
            (find(tag) or _handler(tag))(post, tag)
            text = parts[at + _TEXT_AT]
        elif label is not None:
            before, core, after = without_blanks(_escaped(post, label, True))
            inlines.append(f"{before}{post.link(core, {'href': url})}{after}")
        elif word:
            before, core, after = without_blanks(_escaped(post, word, post.links > 0))
            post.at = at
            inlines.append(
                f"{before}{post.emphasis(_INLINE[name], core, before, after or _following(post))}{after}" if core else after
            )
        elif code:
            if inlines and inlines[-1][-1:] == "`":  # right behind another code span only HTML can say it
                _open_inline("code", post, "code")
                _add_text(post, code)
                post.close_inline("")
            else:
                inlines.append(code_span(unescape_text(code)))
        if text:
            _add_text(post, text)


def _add_text(post: Post, text: str) -> None:
    inlines = post.inlines
    if inlines or not text.isspace():
        text = _escaped(post, text, post.links > 0)
        if inlines and inlines[-1][-1:] == "\n":
            text = at_line_start(text)
        inlines.append(text)


def _escaped(post: Post, text: str, in_link: bool) -> str:
    if "<" in text:
        if not post.whole:
            raise Torn
    elif "\n" not in text and not marked(text, post.marks):
        return text
    return escape(text, in_link)


# --------------------------------------------------------------------------------------------------------- one handler a tag

_LANGUAGE = re.compile(r"\blang(?:uage)?-([\w+#.-]+)")
_LANGUAGE_COMMENT = re.compile(r"!--\s*language(-all)?:\s*(?:lang-)?([\w+#.-]+)\s*--")
_ALIGN = re.compile(r"""text-align:\s*(left|right|center)|\balign="?(left|right|center)""", re.IGNORECASE)


def _open_paragraph(post: Post, tag: str) -> None:
    if post.one_line:
        if post.one_line[0] == "h" or "".join(post.inlines).strip():
            raise Unsupported(f"<p> inside <{post.one_line}>")
        return
    if post.inlines or post.open:
        post.start_block(tag)
    post.paragraph = "p"


def _close_paragraph(post: Post, tag: str) -> None:
    post.end_paragraph()


def _open_heading(post: Post, tag: str) -> None:
    post.start_block(tag)
    post.one_line = "h" + tag[1]


def _close_heading(post: Post, tag: str) -> None:
    if post.one_line[:1] == "h":
        post.end_one_line()


def _rule(post: Post, tag: str) -> None:
    post.start_block(tag)
    # `- ---` would be one rule and "text" over `---` a heading; `___` is neither
    post.add("___" if any(frame.kind in ("list", "item") for frame in post.stack) else "---", "rule")


def _open_quote(post: Post, tag: str) -> None:
    post.start_block(tag)
    post.push(Frame("quote", tag))


def _close_quote(post: Post, tag: str) -> None:
    post.start_block(tag)
    if post.frame.kind == "quote":
        post.close_frame()
    else:
        post.close_to(("quote",))


def _open_list(post: Post, tag: str) -> None:
    post.start_block(tag)
    if post.frame.kind == "list":
        if not post.frame.items:
            post.frame.items.append(Frame("item"))
        post.push(post.frame.items[-1])
    post.push(Frame("list", tag))


def _close_list(post: Post, tag: str) -> None:
    post.start_block(tag)
    if post.frame.kind == "list":
        post.close_frame()
    else:
        post.close_to(("list",), stop=("quote",))


def _open_item(post: Post, tag: str) -> None:
    if post.inlines or post.open or post.one_line:
        post.start_block(tag)
    post.paragraph = "text"
    if post.frame.kind != "list":
        post.close_to(("item",), stop=("list", "quote"))
        if post.frame.kind != "list":
            raise Unsupported("<li> outside a list")
    item = Frame("item")
    post.frame.items.append(item)
    post.push(item)


def _close_item(post: Post, tag: str) -> None:
    if post.inlines or post.open or post.one_line:
        post.start_block(tag)
    post.paragraph = "text"
    if post.frame.kind == "item":
        post.stack.pop()
        post.frame = post.stack[-1]
    else:
        post.close_to(("item",), stop=("list", "quote"))


def _item(post: Post, tag: str, html: str) -> bool:
    """An item without blocks in it."""
    frame = post.frame
    if frame.kind != "list" or post.inlines or post.open or post.one_line or len(post.stack) > MAX_DEPTH:
        return False
    item = Frame("item")
    frame.items.append(item)
    text = simple(html, post.marks)
    if text is not None:
        text = text.strip()
        if text[:1] not in _ODD_START:
            item.blocks.append(text)
            item.kinds.append("text")
            return True
    post.paragraph = "text"
    post.push(item)
    if text is None:
        read_run(post, html)
        post.start_block("/li")
    else:
        post.add_paragraph(text)
    post.stack.pop()
    post.frame = frame
    return True


def _flat_list(post: Post, tag: str, html: str) -> bool:
    """A list whose items hold simple text, made as one text with an item on each line: in 60 % of the time."""
    frame = post.frame
    if len(tag) > 2 or post.inlines or post.open or post.one_line or frame.kind in NO_BLOCKS:
        return False
    html = html.strip()
    if not html.startswith("<li>") or "<br" in html or marked(html, post.marks):
        return False
    items = html[4:-5].split("</li>\n<li>")  # without the first `<li>` and the last `</li>`
    text = simple("\n".join(items), "")
    if text is None:
        return False
    lines = [line.strip() for line in text.split("\n")]
    if len(lines) != len(items) or not _ODD_START.isdisjoint([line[:1] for line in lines]):
        return False
    marker = MARKERS[tag][0]
    if frame.kinds and frame.kinds[-1][0] == marker:
        marker = MARKERS[tag][1]
    if tag == "ul":
        text = "\n".join([f"{marker} {line}" for line in lines])
    else:
        text = "\n".join([f"{number}{marker} {line}" for number, line in enumerate(lines, 1)])
    frame.blocks.append(text)
    frame.kinds.append(marker)
    post.paragraph = "text"
    return True


def _pre(post: Post, tag: str) -> None:
    """`<pre>` that holds more than inline tags: everything to `</pre>` is its code."""
    if not post.whole:
        raise Torn
    start = post.at
    inside: list[str] = [post.parts[start + _TEXT_AT]]
    for at in post.steps:
        _, label, name, word, code, inner, text = post.parts[at : at + _WIDTH]
        if inner is not None and name_of(inner) == "/pre":
            _code_block(post, tag, "".join(inside))
            post.parts[start + _TEXT_AT] = text
            return
        for kind, content in (("a", label), (name, word), ("code", code)):
            if content is not None:
                inside.append(f"<{kind}>{content}</{kind}>")
        if inner is not None:
            inside.append(f"<{inner}>")
        inside.append(text)
    raise Unsupported("<pre> without </pre>")


def _code_block(post: Post, tag: str, content: str) -> bool:
    """A code block; marks inside are dropped, their text is kept."""
    post.start_block("pre")
    inside = TAG.split(content.removeprefix("\n"))
    code = [inside[0]]
    for inner, text in zip(inside[1::2], inside[2::2]):
        name = name_of(inner)
        if name == "code":
            tag += inner
        elif name == "br":
            code.append("\n")
        else:
            _handler(inner)
        code.append(text)
    found = _LANGUAGE.search(tag)
    language = found[1] if found else post.language or post.all_languages
    post.language = ""
    post.add(fence(unescape_text("".join(code)), "" if language in ("none", "default") else language), "code")
    return True


def _open_span(post: Post, tag: str) -> None:
    """A span says nothing; but mathematics that StackExchange has marked as such stays as it is, to the character."""
    parts, end = post.parts, post.at + _WIDTH
    if tag == 'span class="math-container"' and end < len(parts) and parts[end + _TAG_AT] == "/span":
        post.inlines.append(unescape_text(parts[post.at + _TEXT_AT]))
        parts[post.at + _TEXT_AT] = parts[end + _TEXT_AT]
        next(post.steps)
    else:
        _open_inline("span", post, tag)


def _open_code(post: Post, tag: str) -> None:
    """Code with other tags inside can only be said in HTML."""
    parts, end = post.parts, post.at + _WIDTH
    behind_code = post.inlines and post.inlines[-1][-1:] == "`"
    if end < len(parts) and parts[end + _TAG_AT] == "/code" and not behind_code:
        code = parts[post.at + _TEXT_AT]
        if code:
            post.inlines.append(code_span(unescape_text(code)))
        parts[post.at + _TEXT_AT] = parts[end + _TEXT_AT]
        next(post.steps)
    else:
        _open_inline("code", post, tag)


def _break(post: Post, tag: str) -> None:
    """A line break is two blanks; HTML where no line can end, at the start and end of a paragraph, and after another."""
    inlines = post.inlines
    behind = post.at + _TEXT_AT
    if inlines and not post.one_line:
        last = inlines[-1].rstrip(" \t\n")
        if last and not last.endswith("<br>") and (post.parts[behind].strip() or _continues(post)):
            inlines[-1] = last
            inlines.append("  \n")
            return
    # With nothing but blanks after it on its line, a `<br>` at the start would make an HTML block.
    post.parts[behind] = post.parts[behind].lstrip()
    inlines.append("<br>")


def _continues(post: Post) -> bool:
    """Whether the next token is an inline element that goes on with the line."""
    at = post.at + _WIDTH
    if at >= len(post.parts):
        return False
    tag = post.parts[at + _TAG_AT]
    return tag is None or name_of(tag) in _INLINE_NAMES


def _image(post: Post, tag: str) -> None:
    values = attributes_of(tag)
    alt = escape(values.get("alt", ""), True).replace("\n", " ")
    url = destination(unescape(values.get("src", "")))
    post.inlines.append(f"![{alt}]({url}{title(unescape(values['title'])) if 'title' in values else ''})")


def _open_link(post: Post, tag: str) -> None:
    if len(post.open) > MAX_DEPTH:
        raise Unsupported(f"<{tag}>, nested more than {MAX_DEPTH} deep")
    post.open.append(Inline("a", len(post.inlines), attributes_of(tag), tag))
    post.inlines.append("")
    post.links += 1


def _open_inline(name: str, post: Post, tag: str) -> None:
    if len(post.open) > MAX_DEPTH:
        raise Unsupported(f"<{tag}>, nested more than {MAX_DEPTH} deep")
    post.open.append(Inline(name, len(post.inlines), {}, tag))
    post.inlines.append("")


def _close_inline(name: str, post: Post, tag: str) -> None:
    for depth in range(len(post.open) - 1, -1, -1):
        if post.open[depth].name == name:
            after = _following(post) if name in ("em", "strong") else ""
            while len(post.open) > depth:
                post.close_inline(after)
            return


def _following(post: Post) -> str:
    """The character that the Markdown will have after this token, as far as flanking rules care."""
    parts = post.parts
    for at in range(post.at, len(parts), _WIDTH):
        text = parts[at + _TEXT_AT]
        if text:
            return unescape(text[:40])[0] if text[0] == "&" else text[0]
        if at + _WIDTH < len(parts):
            tag = parts[at + _WIDTH + _TAG_AT]
            if tag is None:
                return "<"
            name = name_of(tag)
            if name not in ("", "span", "/span"):
                return "<" if name.removeprefix("/") in _INLINE_NAMES else "\n"
    return ""


def _open_table(post: Post, tag: str) -> None:
    post.start_block(tag)
    if any(frame.kind == "table" for frame in post.stack):
        raise Unsupported("a <table> in a <table>")
    post.push(Frame("table", tag))


def _close_table(post: Post, tag: str) -> None:
    if post.one_line:
        post.end_one_line()
    post.start_block(tag)
    post.close_to(("table",))


def _open_row(post: Post, tag: str) -> None:
    if post.frame.kind != "table":
        raise Unsupported("<tr> outside a <table>")
    if post.one_line:
        post.end_one_line()
    post.frame.items.append([])


def _open_cell(post: Post, tag: str) -> None:
    if post.frame.kind != "table" or not post.frame.items:
        raise Unsupported("a table cell outside a row")
    if post.one_line:
        post.end_one_line()
    post.flush()
    side = _ALIGN.search(tag) if len(tag) > 2 else None
    post.frame.items[-1].append(("", (side[1] or side[2]).lower() if side else ""))
    post.one_line = "td"


def _close_cell(post: Post, tag: str) -> None:
    if post.one_line == "td":
        post.end_one_line()


def _comment(post: Post, tag: str) -> None:
    """Comments vanish; `<!-- language: lang-js -->` names the language of the code that follows."""
    language = _LANGUAGE_COMMENT.fullmatch(tag)
    if language and language[1]:
        post.all_languages = language[2]
    elif language:
        post.language = language[2]


def _container(post: Post, tag: str) -> None:
    """A `<div>`: its blocks count, it does not."""
    if not post.one_line:
        post.start_block(tag)


def _html_block(post: Post, tag: str) -> None:
    """A block that Markdown has no mark for stays HTML; blank lines around the tags let its content be Markdown."""
    post.start_block(tag)
    post.add(f"<{tag}>".replace("\n", " "), "html")


def _iframe(post: Post, tag: str) -> None:
    """An embedded video has no text: it stays as it is."""
    if not post.whole:
        raise Torn
    end = post.at + _WIDTH
    if end >= len(post.parts) or name_of(post.parts[end + _TAG_AT] or "") != "/iframe":
        raise Unsupported(f"<{tag}>")
    _embedded(post, tag, "")
    post.parts[post.at + _TEXT_AT] = post.parts[end + _TEXT_AT]
    next(post.steps)


def _embedded(post: Post, tag: str, content: str) -> bool:
    if "<" in content:
        raise Unsupported(f"<{tag}> with tags inside")
    post.start_block(tag)
    post.add(f"<{tag}></iframe>".replace("\n", " "), "html")
    return True


def _nothing(post: Post, tag: str) -> None:
    pass


def _handlers() -> dict[str, Handler]:
    """Handlers by name (`p`, `/p`)."""
    table: dict[str, Handler] = {
        "p": _open_paragraph, "/p": _close_paragraph, "hr": _rule, "br": _break, "/br": _nothing, "img": _image,
        "blockquote": _open_quote, "/blockquote": _close_quote, "ul": _open_list, "ol": _open_list, "/ul": _close_list,
        "/ol": _close_list, "li": _open_item, "/li": _close_item, "pre": _pre, "/pre": _nothing,
        "a": _open_link, "table": _open_table, "/table": _close_table, "tr": _open_row, "/tr": _close_cell, "td": _open_cell,
        "th": _open_cell, "/td": _close_cell, "/th": _close_cell, "div": _container, "/div": _container,
        "iframe": _iframe, "span": _open_span, "code": _open_code,
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


_HANDLERS = _handlers()
_WHOLES: dict[str, Callable[[Post, str, str], bool]] = {
    "li": _item,
    "ul": _flat_list,
    "ol": _flat_list,
    "pre": _code_block,
    "iframe": _embedded,
}
"""By name, what makes an element in one go from its tag and content, unless it returns False."""


def _handler(tag: str) -> Handler:
    """The handler of a tag that is not one of the plain ones: attributes, capitals, comments."""
    name = name_of(tag)
    if not name:
        return _comment
    try:
        return _HANDLERS[name]
    except KeyError:
        raise Unsupported(f"<{tag}>") from None
