"""HTML of StackExchange bodies to Markdown: CommonMark plus GFM tables, mathematics left as it is.

Written for the HTML that StackExchange stores, and only for that: what it does not understand it refuses (`Unsupported`), and
`convert` falls back to markdownify. Rendering the result back gives the same text, the same structure and the same code;
benchmarks/fidelity.py measures how often.

    markdown_text   what to escape, code spans, fences, addresses; the fast path of simple paragraphs
    markdown_post   blocks and frames: how quotes, lists, tables, emphasis and links are put together
    markdown_tags   how the tags are found, and what each one does
"""

import re
from html import unescape
from typing import Any, Literal

from tasks.ingest.markdown_post import Post, Unsupported
from tasks.ingest.markdown_tags import TAG, Torn, read_body, read_inlines

__all__ = ["Unsupported", "convert", "markdownify_original", "to_markdown"]


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
        return unescape(TAG.sub(" ", html)).strip(), True


def markdownify_original(html: str) -> str:
    """markdownify the way `lvwerra/stack-exchange-paired` was made (the H4 data set before it still holds HTML).

    markdownify's defaults (underlined headings, `*+-` bullets), the language from the class of `<pre>`, and afterwards runs of
    blank lines collapsed everywhere, in code too.
    """

    from markdownify import markdownify  # few bodies need what it takes a worker a tenth of its start to load

    def language(element: Any) -> str | None:
        classes = element.get("class")
        return classes[0].split("-")[-1] if classes else None

    text = markdownify(html, code_language_callback=language)
    return re.sub(r"\n\s*\n", "\n\n", text).strip().encode("utf-8", "replace").decode()


def to_markdown(html: str) -> str:
    """The Markdown of one (already unescaped) body; raises Unsupported for HTML it does not understand."""
    if "\r" in html:
        html = html.replace("\r\n", "\n").replace("\r", "\n")
    try:
        post = Post(html)
        read_body(post, html)
    except Torn:
        post = Post(html)
        post.whole = True
        read_inlines(post, html)
    return post.finish()
