"""How much of a dump's HTML survives the conversion to Markdown, and how fast: our converter beside markdownify.

    python benchmarks/fidelity.py DUMP... [--limit 3000] [--worst 5]

Every body is converted, rendered back by markdown-it (CommonMark + tables, mathematics protected) and compared with the body:

    text        the text a reader sees, blanks collapsed (text in `<pre>` too)
    structure   the tree of block and inline elements, with the targets of links and images
    code        every `<pre>`, to the character, of the bodies that have one
    LaTeX       every span of mathematics stands in the Markdown unchanged, of the bodies that have one
    author      where the archive has PostHistory.xml: what the author of a never edited post wrote renders to the same text
                (only where CommonMark reads it as StackExchange did)

`structure` forgives what Markdown cannot say: `<p>` in list items (loose and tight lists), `<div>`, `<span>`, comments, elements
without content, the difference between `<b>` and `<strong>`. The table goes to stderr, one JSON line, with the commit, to stdout.

DUMP is an archive of one site (.7z) or its Posts.xml (.xml, .xml.gz, .xml.zst); only an archive has PostHistory.xml for `author`.
The whole dump is read into memory.
"""

import argparse
import gzip
import json
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from markdown_it import MarkdownIt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tasks.ingest.markdown import convert

# ------------------------------------------------------------------------------------------------------------- reading

_ROW = re.compile(rb"<row ([^\n]*?)/>")
_ATTRIBUTE = re.compile(rb'(\w+)="([^"]*)"')


def rows(data: bytes) -> Iterator[dict[str, str]]:
    for row in _ROW.finditer(data):
        yield {name.decode(): unescape(value.decode("utf-8", "replace")) for name, value in _ATTRIBUTE.findall(row[1])}


def read(dump: Path, member: str = "posts.xml") -> bytes | None:
    """The bytes of one table of a dump (.7z, .xml, .xml.gz, .xml.zst); None when there is no such table."""
    if dump.suffix == ".7z":
        import py7zr
        from py7zr.io import BytesIOFactory

        factory = BytesIOFactory(1 << 34)
        with py7zr.SevenZipFile(dump) as archive:
            names = [name for name in archive.getnames() if name.lower().endswith(member)]
            if not names:
                return None
            archive.extract(targets=names[:1], factory=factory)
        file: Any = factory.products[names[0]]
        file.seek(0)
        return bytes(file.read())
    if member != "posts.xml":
        return None
    if dump.suffix == ".zst":
        import zstandard

        return zstandard.ZstdDecompressor().stream_reader(dump.read_bytes(), read_across_frames=True).read()
    return gzip.decompress(dump.read_bytes()) if dump.suffix == ".gz" else dump.read_bytes()


def bodies(dump: Path) -> dict[str, str]:
    """Id and HTML of questions and answers."""
    data = read(dump)
    if data is None:
        raise ValueError(f"{dump} holds no Posts.xml: give a dump of one site")
    return {row["Id"]: row["Body"] for row in rows(data) if row.get("PostTypeId") in ("1", "2") and row.get("Body")}


def originals(dump: Path) -> dict[str, str]:
    """The authors' own Markdown by post id, of posts that were never edited (history types 2, initial body, and 5, edit)."""
    data = read(dump, "posthistory.xml")
    found: dict[str, str] = {}
    edited = set()
    for row in rows(data or b""):
        if row.get("PostHistoryTypeId") == "2":
            found[row["PostId"]] = row.get("Text", "")
        elif row.get("PostHistoryTypeId") in ("5", "8"):
            edited.add(row["PostId"])
    return {post: text for post, text in found.items() if post not in edited}


# ----------------------------------------------------------------------------------------------------------- rendering

MATH = re.compile(
    r"\$\$(?!\$)(?:(?!\n\s*\n)[^$])+?\$\$"
    r"|\\begin\{(\w+\*?)\}.*?\\end\{\1\}"
    r"|(?<!\\)\\\$(?!\s)[^$\n]+?(?<![\s\\])\\\$(?!\d)"  # as electronics.stackexchange.com writes it
    r"|(?<![\\$A-Za-z0-9])\$(?![\s$])(?:[^$\\\n]|\\.|\n(?!\s*\n))*?(?<!\s)\$(?![\d$])",
    re.DOTALL,
)
"""Mathematics as a reader of the text finds it; written apart from the converter's own pattern."""
_CODE = re.compile(
    r"^[> \t\d.*)!-]*(?P<f>`{3,})[^`\n]*\n.*?^[> \t!]*(?P=f)`*[ \t]*$|(?<![\\`])(?P<t>`+)(?!`).+?(?<!`)(?P=t)(?!`)", re.M | re.S
)
_MARKDOWN = MarkdownIt("commonmark", {"maxNesting": 200}).enable("table")


def render(markdown: str) -> str:
    """The HTML of Markdown whose mathematics is protected, as MathJax sites do; spoilers (`>!`) become quotes."""
    protected: list[str] = []

    def keep(math: re.Match[str]) -> str:
        protected.append(math[0])
        return f"zmathz{len(protected) - 1}z"

    pieces: list[str] = []
    done = 0
    for code in _CODE.finditer(markdown) if "$" in markdown or "\\begin{" in markdown else ():
        pieces += (MATH.sub(keep, markdown[done : code.start()]), code[0])
        done = code.end()
    rest = markdown[done:]
    pieces.append(MATH.sub(keep, rest) if "$" in rest or "\\begin{" in rest else rest)
    source = re.sub(r"^((?:> ?|[ \t])*)>!", r"\1>", "".join(pieces), flags=re.MULTILINE)
    html = _MARKDOWN.render(source)
    return re.sub(r"zmathz(\d+)z", lambda found: escape(protected[int(found[1])], quote=False), html)


# ----------------------------------------------------------------------------------------------------------- comparing

_SAME = {"b": "strong", "i": "em", "strike": "s", "del": "s"}
_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_BLOCKS = frozenset(
    ("p", "blockquote", "ul", "ol", "li", "pre", "table", "tr", "td", "th", "hr", "br", "div", "dl", "dt", "dd", *_HEADINGS)
)
_IGNORED = frozenset(("div", "span", "thead", "tbody", "tfoot", "html", "body"))
_VOID = frozenset(("br", "hr", "img"))
_MEANT = frozenset(("br", "hr", "img", "li", "pre", "td", "th", "iframe", "a"))  # without content, too


class Reading(HTMLParser):
    """What a reader gets from HTML: the text, the tree, the code blocks."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.words: list[str] = []
        self.tree: list[Any] = []
        self.stack: list[tuple[str, list[Any]]] = [("", self.tree)]
        self.blocks: list[str] = []
        self.block: list[str] | None = None
        self.pre_at = (0, 0)
        self.feed(html.replace("\r\n", "\n").replace("\r", "\n"))
        self.close()
        self.text = " ".join("".join(self.words).split())
        self.structure = _pruned(self.tree, "")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in _BLOCKS:
            self.words.append("\n")
        if tag == "br" and self.block is not None:
            self.block.append("\n")
        if tag in _IGNORED or (self.block is not None and tag != "pre"):
            return
        if tag == "pre":
            self.block = []
            line, column = self.getpos()
            opening = self.get_starttag_text() or ""
            self.pre_at = (line, column + len(opening))
        while tag in _BLOCKS - {"br"} and self.stack[-1][0] == "p":
            self.stack.pop()
        if tag == "li" and self.stack[-1][0] == "li":
            self.stack.pop()
        label = _SAME.get(tag, tag)
        if tag in ("a", "img"):
            target = values.get("href" if tag == "a" else "src")
            label += "" if target is None else ":" + unquote(target).strip()
            if tag == "a" and target is None:
                return
        if tag == "ol" and (values.get("start") or "1") != "1":
            label += f":{values['start']}"
        node: tuple[str, list[Any]] = (label, [])
        self.stack[-1][1].append(node)
        if tag not in _VOID:
            self.stack.append((tag, node[1]))

    def handle_endtag(self, tag: str) -> None:
        if tag in _BLOCKS:
            self.words.append("\n")
        if tag == "pre" and self.block is not None:
            self.blocks.append("".join(self.block).removesuffix("\n"))
            self.block = None
        if any(open_tag == tag for open_tag, _ in self.stack[1:]) and (self.block is None or tag == "pre"):
            while self.stack.pop()[0] != tag:
                pass

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.block is not None:
            # HTML: a newline right behind `<pre>` is not content
            self.block.append(data.removeprefix("\n") if self.getpos() == self.pre_at else data)
        if data.strip():
            children = self.stack[-1][1]
            if not (children and children[-1] == "text"):
                children.append("text")


def _pruned(nodes: list[Any], parent: str) -> list[Any]:
    """The tree without text and empty elements; `<p>` in items and cells does not count, elsewhere bare text is a `<p>`."""
    kept: list[Any] = []
    bare = False
    for node in nodes:
        label, children = ("text", []) if node == "text" else node
        name = label.split(":")[0]
        if name in ("p", *_BLOCKS) and name != "br":
            bare = False
        elif parent in ("", "blockquote"):
            if not bare:
                kept.append(("p", []))
            bare = True
        if node == "text":
            continue
        inner = _pruned(children, name)
        if not inner and not children and name not in _MEANT:
            continue
        if name == "p" and parent in ("li", "td", "th", "dd", "dt"):
            kept += inner
        else:
            (kept[-1][1] if bare else kept).append((label, [] if name == "pre" else inner))
    return kept


def compare(html: str, markdown: str) -> dict[str, bool]:
    """What survived: text, structure, and code and latex where the body has some."""
    before, after = Reading(html), Reading(render(markdown))
    result = {"text": before.text == after.text, "structure": before.structure == after.structure}
    if before.blocks:
        result["code"] = before.blocks == after.blocks
    if "$" in html or "\\begin{" in html:
        prose = unescape(re.sub(r"<[^<>]*>", "\0", re.sub(r"<(pre|code)\b.*?</\1>", "\0", html, flags=re.DOTALL)))
        spans = [math[0] for piece in prose.split("\0") for math in MATH.finditer(piece)]
        if spans:
            flat = " ".join(re.sub(r"^[> ]+", "", markdown, flags=re.MULTILINE).split())
            result["latex"] = all(" ".join(span.split()) in flat for span in spans)
    return result


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(posts: dict[str, str], converter: Callable[[str], tuple[str, bool]], authors: dict[str, str]) -> dict[str, Any]:
    start, passes = time.process_time(), 0
    while passes == 0 or time.process_time() - start < 1:  # a small dump is over before a clock can tell
        results = {post: converter(html) for post, html in posts.items()}
        passes += 1
    seconds = (time.process_time() - start) / passes
    kept: dict[str, list[str]] = defaultdict(list)
    seen: dict[str, int] = defaultdict(int)
    for post, html in posts.items():
        checks = compare(html, results[post][0])
        if post in authors:
            meant = Reading(render(authors[post])).text
            if meant == Reading(html).text:  # else StackExchange's dialect read it otherwise than CommonMark does
                checks["author"] = Reading(render(results[post][0])).text == meant
        for name, good in checks.items():
            seen[name] += 1
            if not good:
                kept[name].append(post)
    return {
        "posts": len(posts),
        "fell_back": sum(fell_back for _, fell_back in results.values()),
        "megabytes": sum(len(html.encode()) for html in posts.values()) / 1e6,
        "seconds": seconds,
        "checked": dict(seen),
        "failed": {name: kept[name] for name in seen},
    }


def commit() -> str:
    """The commit that was measured; with "+" when files differ from it."""
    here = Path(__file__).resolve().parent
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", nargs="+", type=Path)
    parser.add_argument("--limit", type=int, default=3000, help="posts per dump, spread over it evenly (0: all)")
    parser.add_argument("--only", choices=["stackexchange", "markdownify"], help="one converter instead of both")
    parser.add_argument("--worst", type=int, default=0, help="print the ids of so many failures of each kind")
    arguments = parser.parse_args()

    totals: dict[str, dict[str, Any]] = {}
    for dump in arguments.dump:
        posts = bodies(dump)
        if arguments.limit and len(posts) > arguments.limit:
            step = len(posts) / arguments.limit
            ids = list(posts)
            posts = {ids[int(at * step)]: posts[ids[int(at * step)]] for at in range(arguments.limit)}
        authors = originals(dump)
        for name in [arguments.only] if arguments.only else ["stackexchange", "markdownify"]:
            found = measure(posts, lambda html, name=name: convert(html, name), authors)  # type: ignore[misc]
            total = totals.setdefault(
                name,
                {"posts": 0, "fell_back": 0, "megabytes": 0, "seconds": 0, "checked": defaultdict(int), "failed": defaultdict(int)},
            )
            for key in ("posts", "fell_back", "megabytes", "seconds"):
                total[key] += found[key]
            for key, count in found["checked"].items():
                total["checked"][key] += count
                total["failed"][key] += len(found["failed"][key])
                if arguments.worst and found["failed"][key]:
                    print(f"{name} {dump.name} {key}: {' '.join(found['failed'][key][: arguments.worst])}", file=sys.stderr)

    columns = ["text", "structure", "code", "latex", "author"]
    head = "".join(f"{column:>11}" for column in ["fell back", *columns, "MB/CPU-s"])
    print(f"{'converter':14}{'posts':>7}{head}", file=sys.stderr)
    report = {}
    for name, total in totals.items():
        rates = {c: 1 - total["failed"][c] / total["checked"][c] for c in columns if total["checked"][c]}
        speed = total["megabytes"] / total["seconds"]
        cells = "".join(f"{100 * rates[c]:>10.2f}%" if c in rates else f"{'-':>11}" for c in columns)
        print(f"{name:14}{total['posts']:>7}{total['fell_back']:>11}{cells}{speed:>11.1f}", file=sys.stderr)
        report[name] = {
            "posts": total["posts"],
            "fell_back": total["fell_back"],
            **{c: round(rate, 5) for c, rate in rates.items()},
            **{f"{c}_checked": total["checked"][c] for c in rates},
            "mb_per_cpu_second": round(speed, 2),
        }
    print(json.dumps({"commit": commit(), "dumps": [str(dump) for dump in arguments.dump], "limit": arguments.limit, **report}))


if __name__ == "__main__":
    main()
