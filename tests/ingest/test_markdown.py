"""HTML of StackExchange bodies to Markdown: examples by hand, and properties checked by rendering back with markdown-it."""

import contextlib
import importlib.util
import string
import sys
import time
from html import escape as as_html
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.ingest.markdown import Unsupported, convert, markdownify_original, to_markdown
from tasks.ingest.markdown_post import Post
from tasks.ingest.markdown_tags import read_inlines

_SPEC = importlib.util.spec_from_file_location("fidelity", Path(__file__).parents[2] / "benchmarks" / "fidelity.py")
assert _SPEC is not None
assert _SPEC.loader is not None
fidelity = importlib.util.module_from_spec(_SPEC)
sys.modules["fidelity"] = fidelity
_SPEC.loader.exec_module(fidelity)

# Each rule of DATA.md section 3, worked out by hand.

EXAMPLES = {
    "paragraphs are separated by a blank line": ("<p>One.</p>\n\n<p>Two.</p>\n", "One.\n\nTwo."),
    "a soft line break stays": ("<p>One\ntwo.</p>", "One\ntwo."),
    "a break is two blanks": ("<p>One<br>\ntwo.<br />three</p>", "One  \ntwo.  \nthree"),
    "two breaks do not end the paragraph": ("<p>a<br><br>b</p>", "a<br><br>b"),
    "emphasis": ("<p>an <em>em</em>, a <strong>strong</strong>, <b>b</b>, <i>i</i></p>", "an *em*, a **strong**, **b**, *i*"),
    "em in strong": ("<p><strong><em>both</em></strong></p>", "**_both_**"),
    "blanks move out of emphasis": ("<p>a<strong> b </strong>c</p>", "a **b** c"),
    "emphasis that cannot close stays HTML": ("<p><strong>Note:</strong>this</p>", "<strong>Note:</strong>this"),
    "adjacent emphasis stays apart": ("<p><em>a</em><em>b</em></p>", "*a*<em>b</em>"),
    "empty emphasis vanishes": ("<p>a<em></em>b</p>", "ab"),
    "superscripts stay HTML": ("<p>2<sup>10</sup> H<sub>2</sub>O <kbd>X</kbd></p>", "2<sup>10</sup> H<sub>2</sub>O <kbd>X</kbd>"),
    "struck text stays HTML": ("<p><del>a</del> <s>b</s> <strike>c</strike></p>", "<del>a</del> <s>b</s> <strike>c</strike>"),
    "inline code": ("<p>call <code>f(*args)</code></p>", "call `f(*args)`"),
    "entities in code are characters": ("<p><code>a &lt; b &amp;&amp; c</code></p>", "`a < b && c`"),
    "backticks in code lengthen the delimiter": ("<p><code>a`b``c</code></p>", "```a`b``c```"),
    "code that begins with a backtick is padded": ("<p><code>`x</code></p>", "`` `x ``"),
    "marks in code make it HTML": ("<p><code>a <b>b</b> *</code></p>", "<code>a **b** \\*</code>"),
    "a type parameter does not vanish": ("<p>a List&lt;T&gt; here</p>", "a List\\<T> here"),
    "a comparison is left alone": ("<p>a &lt; b &gt; c</p>", "a < b > c"),
    "an entity by name is text": ("<p>write &amp;lt; for it, R&amp;D</p>", "write \\&lt; for it, R&D"),
    "snake_case is left alone": ("<p>a snake_case_name</p>", "a snake_case_name"),
    "dunders are escaped": ("<p>see __init__</p>", "see \\_\\_init\\_\\_"),
    "multiplication is left alone": ("<p>2 * 3 * 4</p>", "2 * 3 * 4"),
    "a lone star is left alone": ("<p>terms apply*</p>", "terms apply*"),
    "two stars are escaped": ("<p>a *b* c</p>", "a \\*b\\* c"),
    "a backslash before a letter is left alone": ("<p>C:\\temp and \\*</p>", "C:\\temp and \\\\*"),
    "a backslash at the end of emphasis": ("<p><em>a\\ </em>b</p>", "*a\\\\* b"),
    "brackets are left alone": ("<p>[1] and a[i]</p>", "[1] and a[i]"),
    "a literal link is text": ("<p>[a](b)</p>", "[a]\\(b)"),
    "a literal definition is text": ("<p>[a]: b</p>", "\\[a]: b"),
    "backticks in text are escaped": ("<p>a ` b</p>", "a \\` b"),
    "a number at a line start": ("<p>1986. A good year.</p>", "1986\\. A good year."),
    "a hash at a line start": ("<p># one</p>", "\\# one"),
    "a tag is not a heading": ("<p>#one</p>", "#one"),
    "a dash at a line start": ("<p>- one</p>", "\\- one"),
    "a plus at a line start": ("<p>+ one</p>", "\\+ one"),
    "a negative number is left alone": ("<p>-1 is less</p>", "-1 is less"),
    "a greater-than at a line start": ("<p>&gt; one</p>", "\\> one"),
    "later lines are escaped too": ("<p>a\n- b\n# c\n&gt; d\n1. e\n2. f</p>", "a\n\\- b\n\\# c\n\\> d\n1\\. e\n2. f"),
    "an underline is not a heading": ("<p>a\n---\nb\n===</p>", "a\n\\---\nb\n\\==="),
    "lines after a break are escaped": ("<p>a<br>- b<br/>\n- c</p>", "a  \n\\- b  \n\\- c"),
    "a rule in text is text": ("<p>---</p>", "\\---"),
    "LaTeX is left alone": (
        "<p>if $a_1*b_2*c &lt; d$ then $$\\sum_{i}\\; x_i\n- y$$ or $ \\alpha_1 * \\beta_* $</p>",
        "if $a_1*b_2*c < d$ then $$\\sum_{i}\\; x_i\n- y$$ or $ \\alpha_1 * \\beta_* $",
    ),
    "environments are left alone": ("<p>\\begin{a}a_* &amp;= b\\\\ c*\\end{a}</p>", "\\begin{a}a_* &= b\\\\ c*\\end{a}"),
    "escaped dollars around LaTeX": ("<p>\\$V_{*}\\$ and _a_</p>", "\\$V_{*}\\$ and \\_a\\_"),
    "a math container is left alone": ('<p><span class="math-container">$a_*b*$</span></p>', "$a_*b*$"),
    "money is not LaTeX": ("<p>$5 *or* $6</p>", "$5 \\*or\\* $6"),
    "escaped dollars are dollars": ("<p>\\$5 and \\$6, *both*</p>", "\\\\$5 and \\\\$6, \\*both\\*"),
    "a dollar in LaTeX": ("<p>$\\text{\\$5}_1$ and _a_</p>", "$\\text{\\$5}_1$ and \\_a\\_"),
    "LaTeX with a letter behind": ("<p>the $n_*$th and $k_*$-th</p>", "the $n_*$th and $k_*$-th"),
    "shell variables": ("<p>$HOME/a_b and $PATH</p>", "$HOME/a_b and $PATH"),
    "LaTeX in a quote stays on one line": ("<blockquote><p>$$a_*\n+ b_*$$</p></blockquote>", "> $$a_* + b_*$$"),
    "an environment in a quote stays on one line": (
        "<blockquote>\n  <p>\\begin{a}b_*\n  c_*\\end{a}</p>\n</blockquote>",
        "> \\begin{a}b_*   c_*\\end{a}",
    ),
    "pipes of LaTeX in a table": ("<table><tr><td>$|a|$ | b</td></tr></table>", "| $|a|$ \\| b |\n| --- |"),
    "headings": ("<h1>One</h1>\n\n<h3>Three #</h3>", "# One\n\n### Three \\#"),
    "a break alone": ("<ul><li><br><pre><code>x</code></pre></li></ul>", "- <br>\n\n  ```\n  x\n  ```"),
    "a break in a heading": ("<h2>a<br>b</h2>", "## a<br>b"),
    "a rule": ("<p>a</p>\n<hr>\n<p>b</p><hr />", "a\n\n---\n\nb\n\n---"),
    "a tight list": ("<ul>\n<li>a</li>\n<li>b</li>\n</ul>", "- a\n- b"),
    "a loose list": ("<ul>\n<li><p>a</p></li>\n<li><p>b</p></li>\n</ul>", "- a\n\n- b"),
    "a numbered list": ("<ol>\n<li>a</li>\n<li>b</li>\n</ol>", "1. a\n2. b"),
    "a list that starts later": ('<ol start="9">\n<li>a\nb</li>\n<li>c\nd</li>\n</ol>', "9. a\n   b\n10. c\n    d"),
    "nested lists": ("<ol>\n<li>a\n\n<ul>\n<li>b</li>\n</ul></li>\n<li>c</li>\n</ol>", "1. a\n   - b\n2. c"),
    "a list under text cannot start at two": ('<ul><li>a<ol start="2"><li>b</li></ol></li></ul>', "- a\n\n  2. b"),
    "two lists in a row stay two": ("<ul><li>a</li></ul>\n<ul><li>b</li></ul>", "- a\n\n* b"),
    "a list in a list without an item": ("<ul><li>a</li><ul><li>b</li></ul></ul>", "- a\n  - b"),
    "code in an item": ("<ul><li>a\n<pre><code>x\n\n y\n</code></pre></li></ul>", "- a\n  ```\n  x\n\n   y\n  ```"),
    "a rule in an item": ("<ul><li><hr></li></ul>", "- ___"),
    "a quote": ("<blockquote>\n  <p>a\nb</p>\n  \n  <p>c</p>\n</blockquote>", "> a\n> b\n>\n> c"),
    "a spoiler": ('<blockquote class="spoiler">\n  <p>a</p><p>b</p>\n</blockquote>', ">! a\n>!\n>! b"),
    "a spoiler in a spoiler": (
        '<blockquote class="spoiler"><blockquote class="spoiler"><p>a</p></blockquote></blockquote>',
        ">! > a",
    ),
    "a code block": ("<pre><code>a &lt; b\n\n\n  c\n</code></pre>", "```\na < b\n\n\n  c\n```"),
    "the language of code": ('<pre class="lang-py prettyprint-override"><code>x = 1\n</code></pre>', "```py\nx = 1\n```"),
    "the language on code": ('<pre><code class="lang-c++">x\n</code></pre>', "```c++\nx\n```"),
    "a newline behind the tag is not code": ("<pre>\nx\n</pre>", "```\nx\n```"),
    "a newline in code is code": ("<pre><code>\nx\n</code></pre>", "```\n\nx\n```"),
    "no language": ('<pre class="lang-none prettyprint-override"><code>x\n</code></pre>', "```\nx\n```"),
    "the language in a comment": ("<!-- language: lang-js -->\n\n<pre><code>x\n</code></pre>", "```js\nx\n```"),
    "backticks in a code block": ("<pre><code>```\nx\n````\n</code></pre>", "`````\n```\nx\n````\n`````"),
    "marks in a code block": ("<pre><b>a</b>&amp;<br>b</pre>", "```\na&\nb\n```"),
    "a snippet": (
        '<p>a</p>\n<div class="snippet" data-lang="js">\n<div class="snippet-code">\n'
        '<pre class="snippet-code-js lang-js prettyprint-override"><code>f()\n</code></pre>\n</div>\n</div>',
        "a\n\n```js\nf()\n```",
    ),
    "a link": ('<p>see <a href="http://x.org/a_(b)" rel="nofollow">a [b]</a></p>', "see [a \\[b\\]](http://x.org/a_(b))"),
    "a title": ('<p><a href="/q" title="say &quot;hi&quot;">q</a></p>', '[q](/q "say \\"hi\\"")'),
    "an address": ('<p><a href="http://x.org/a_b?c&amp;d">http://x.org/a_b?c&amp;d</a></p>', "<http://x.org/a_b?c&d>"),
    "an address that some renderers would decode": (
        '<p><a href="http://x.org/%C3%A9">http://x.org/%C3%A9</a></p>',
        "[http://x.org/%C3%A9](http://x.org/%C3%A9)",
    ),
    "an address with an entity": ('<p><a href="http://x.org/&amp;lt;">x</a></p>', "[x](http://x.org/\\&lt;)"),
    "odd addresses": ('<p><a href="/a b">c</a> <a href="/a(">d</a></p>', "[c](</a b>) [d](</a(>)"),
    "an empty link": ('<p><a href="/x"></a></p>', "[](/x)"),
    "an anchor is only text": ('<p><a name="x">here</a></p>', "here"),
    "an exclamation mark before a link": ('<p>wow!<a href="/x">y</a></p>', "wow\\![y](/x)"),
    "an image": ('<p><img src="/i.png" alt="a [1] *" title="t"></p>', '![a \\[1\\] \\*](/i.png "t")'),
    "an image in a link": ('<p><a href="/x"><img src="/i.png" alt="i"></a></p>', "[![i](/i.png)](/x)"),
    "a table": (
        '<div class="s-table-container">\n<table class="s-table">\n<thead>\n<tr>\n<th>a</th>\n'
        '<th style="text-align: right;">b</th>\n</tr>\n</thead>\n<tbody>\n<tr>\n<td>x | y</td>\n'
        '<td style="text-align: right;"><code>p|q</code><br>r</td>\n</tr>\n</tbody>\n</table>\n</div>',
        "| a | b |\n| --- | --: |\n| x \\| y | `p\\|q`<br>r |",
    ),
    "a table row in text is text": ("<p>a | b\n--|--</p>", "a | b\n\\--|--"),
    "comments vanish": ("<p>a<!-- <p>x</p> --> b</p>", "a b"),
    "spans vanish": ('<p>a <span style="x">b</span></p>', "a b"),
    "capitals": ('<P>a<BR>b <A HREF="/x">c</A></P>', "a  \nb [c](/x)"),
    "a definition list stays HTML": ("<dl><dt>a</dt><dd>b</dd></dl>", "<dl>\n\n<dt>\n\na\n\n</dt>\n\n<dd>\n\nb\n\n</dd>\n\n</dl>"),
    "carriage returns are newlines": ("<p>a\r\nb</p>\r\n<pre><code>c\r\n\r\nd\r\n</code></pre>", "a\nb\n\n```\nc\n\nd\n```"),
    "tags in an attribute": ('<p>a</p><p><a href="/x" title="</p><p>">b</a></p>', 'a\n\n[b](/x "</p><p>")'),
    "a lone angle bracket": ("<p>a < b</p><p>c</p>", "a < b\n\nc"),
    "a star between blanks that move": ("<p>a<sup> * </sup>b* c</p>", "a <sup>\\*</sup> b\\* c"),
    "blanks that move do not break the line": ("<p><s>a  </s>\nb</p>", "<s>a</s> \nb"),
    "an underline with blanks behind it": ("<p>a\n=== </p>", "a\n\\==="),
    "text without tags": ("just text", "just text"),
    "nothing": ("", ""),
    "unclosed tags": ("<ul><li>a<li>b</ul><p>c<p>d", "- a\n- b\n\nc\n\nd"),
}


@pytest.mark.parametrize(("html", "markdown"), EXAMPLES.values(), ids=EXAMPLES)
def test_each_rule_gives_the_markdown_worked_out_by_hand(html: str, markdown: str):
    assert to_markdown(html) == markdown
    assert fidelity.Reading(fidelity.render(to_markdown(html))).text == fidelity.Reading(html).text


@pytest.mark.parametrize(
    "html",
    [
        "<p><blink>a</blink></p>",
        "<em><p>a</p></em>",
        "<li>a</li>",
        "<table><tr><td><ul><li>a</li></ul></td></tr></table>",
        "<pre>never closed",
        "<blockquote>" * 100,
    ],
)
def test_what_it_does_not_understand_is_refused_and_falls_back_to_markdownify(html: str):
    with pytest.raises(Unsupported) as refused:
        to_markdown(html)
    assert isinstance(refused.value, ValueError)
    assert refused.value.tag
    assert convert(html, "stackexchange") == (markdownify_original(html), True)


def test_asking_for_markdownify_is_not_a_fallback():
    assert convert("<p>2<sup>10</sup></p>", "markdownify") == ("210", False)


def test_the_original_way_underlines_headings_names_languages_and_collapses_blank_lines_in_code():
    html = '<h1>T</h1>\n<pre class="lang-py x"><code>a\n\n\n\nb\n</code></pre>'
    assert markdownify_original(html).splitlines()[:2] == ["T", "="]
    assert "```py\na\n\nb\n" in markdownify_original(html)


def test_html_nested_too_deep_for_markdownify_still_gives_its_text():
    text, fell_back = convert("<div><blockquote>" * 5000 + "hello &amp; bye", "stackexchange")
    assert fell_back
    assert text.endswith("hello & bye")


# Properties: whatever the tree, what is rendered back says the same.

NASTY = st.text(alphabet=string.ascii_letters + "  .,:;!?-+*_#>=~`|()[]{}\\/<&\"'0123456789\u00a0é€\n", min_size=1, max_size=14)
SNIPPETS = st.sampled_from(
    [
        *(
            "snake_case",
            "List<T>",
            "#include",
            "1.",
            "1986. x",
            "2)",
            "+",
            "-",
            "=",
            "~~~",
            "---",
            "***",
            "```",
            "[x]: y",
            "![",
            "](u)",
        ),
        *(
            "<b>",
            "</p>",
            "&amp;",
            "&nbsp;",
            "&copy",
            "R&D",
            "http://x.org/a_b_c",
            "<http://x.org>",
            "me@x.org",
            "\\",
            "C:\\temp\\*",
        ),
        *(
            "*emph*",
            "__init__",
            "a*b*c",
            "* x",
            "a|b",
            "日本語",
            "（笑）",
            "「引用」",
            "привет",
            "שלום",
            "\u200c",
            "“q”",
            "wow!",
            "##",
            "> q",
        ),
        *(
            "10) i",
            "|--|",
            "~~del~~",
            "<!--",
            "`code`",
            "[1]",
            "[a][b]",
            "\t",
            "  ",
            "\n- x",
            "\n===",
            "\n1. x",
            "\n> y",
            "$5 *or* $6",
        ),
    ]
)
WORDS = st.lists(st.sampled_from(["some", "plain", "words", "and", "numbers", "17"]), min_size=1, max_size=6).map(" ".join)
PROSE = st.one_of(WORDS, NASTY, st.lists(st.one_of(WORDS, SNIPPETS), min_size=1, max_size=3).map("".join))
CODE = st.text(alphabet=string.ascii_letters + " `*_<&\\|\n$-#>\t", min_size=1, max_size=12)
MATHS = st.sampled_from(
    [
        *(
            "$a_1*b_1*$",
            "$$\\sum_{i}\\ x_i \\\\ y$$",
            "\\begin{a}x_*\\\\*y_*\\end{a}",
            "$x<y$",
            "$ \\alpha_* $",
            "$n$",
            "$f'_{[1]}(x)$",
        ),
        *("$\\{a\\}_*$", "$$\na_1\n- b_*\n$$", "$\\text{\\$5}_1$", "\\$V_*=1\\$", "$a~b_*$", "$`x_*`$", "$\\langle a,b\\rangle_*$"),
    ]
)


def wrapped(tag: str, content: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return content.map(lambda inner: f"<{tag}>{inner}</{tag.partition(' ')[0]}>")


def html_of(text: str) -> str:
    return as_html(text, quote=False)


TEXT = PROSE.map(html_of)
SPAN_CODE = wrapped("code", CODE.map(html_of))
IMAGES = st.sampled_from(
    ['<img src="/i_1.png" alt="an [image]*">', '<img src="http://x.org/i.png" alt="i" title="a &quot;t&quot;">']
)
LEAF = st.one_of(TEXT, TEXT, SPAN_CODE, st.sampled_from(["<br>", "<br />\n"]), IMAGES)
MARKED = st.one_of(
    LEAF,
    wrapped("em", TEXT),
    wrapped("strong", st.lists(LEAF, min_size=1, max_size=3).map("".join)),
    wrapped("sup", TEXT),
    wrapped("kbd", TEXT),
)
HREF = st.sampled_from(
    ["http://x.org/a_(b)?c=1&amp;d=2", "http://x.org", "/a b", "/a)", "/*_x_*", "/&amp;copy;", "http://x.org/日本"]
)
LINK = st.builds('<a href="{}">{}</a>'.format, HREF, st.lists(MARKED, max_size=2).map("".join))
INLINE = st.lists(st.one_of(MARKED, MARKED, LINK), min_size=1, max_size=5).map("".join)
PARAGRAPH = wrapped("p", INLINE)
CODE_LINES = st.one_of(
    CODE, st.sampled_from(["", "  x", "\tx", "x  ", "```", "~~~~", "> q", "- i", "1. x", "# h", "</code>", "* * *", "&lt;"])
)
PRE = st.builds(
    "<pre{}><code>{}{}</code></pre>".format,
    st.sampled_from(["", ' class="lang-py prettyprint-override"', ' class="lang-c++ s-code-block"']),
    st.lists(CODE_LINES, min_size=1, max_size=5).map("\n".join).map(html_of),
    st.sampled_from(["\n", "\n", ""]),
)
HEADING = wrapped("h2", st.lists(st.one_of(TEXT, wrapped("em", WORDS)), min_size=1, max_size=2).map("".join))
CELL = st.one_of(TEXT, SPAN_CODE, wrapped("strong", WORDS))
TABLE = st.lists(st.tuples(CELL, CELL), min_size=1, max_size=3).map(
    lambda rows: (
        '<table><thead><tr><th>a</th><th style="text-align: right;">b</th></tr></thead><tbody>'
        + "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
        + "</tbody></table>"
    )
)


def containers(block: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    blocks = st.lists(block, min_size=1, max_size=3).map("\n\n".join)
    loose = st.lists(wrapped("li", blocks), min_size=1, max_size=3).map("\n".join)
    text_first = st.builds(str.__add__, INLINE, st.one_of(st.just(""), block))
    tight = st.lists(wrapped("li", text_first), min_size=1, max_size=3).map("\n".join)
    flat = st.lists(wrapped("li", WORDS), min_size=1, max_size=3).map("\n".join)
    items = st.one_of(loose, tight, flat)
    return st.one_of(wrapped("ul", items), wrapped("ol", items), wrapped('ol start="3"', items), wrapped("blockquote", blocks))


BLOCK = st.recursive(st.one_of(PARAGRAPH, PARAGRAPH, PRE, HEADING, st.just("<hr>"), TABLE), containers, max_leaves=6)
BODY = st.lists(BLOCK, min_size=1, max_size=4).map("\n\n".join)
# The same examples on every run: a test that fails once a week teaches nobody anything.
HARD = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


def in_one_piece(html: str) -> str:
    """What the slow way makes of a body: tag by tag, without any of the fast paths."""
    post = Post(html)
    post.whole = True
    read_inlines(post, html)
    return post.finish()


@given(BODY)
@HARD
def test_rendered_back_the_text_is_the_same(html: str):
    assert fidelity.Reading(fidelity.render(to_markdown(html))).text == fidelity.Reading(html).text


@given(st.one_of(BODY, st.lists(PRE, min_size=1, max_size=3).map("".join), containers(PRE)))
@HARD
def test_rendered_back_every_code_block_is_the_same_to_the_character(html: str):
    assert fidelity.Reading(fidelity.render(to_markdown(html))).blocks == fidelity.Reading(html).blocks


@given(BODY)
@HARD
def test_the_fast_paths_give_what_the_slow_way_gives(html: str):
    assert to_markdown(html) == in_one_piece(html)


@given(st.lists(st.tuples(WORDS, MATHS), min_size=1, max_size=4))
@HARD
def test_latex_is_the_same_to_the_character(pieces: list[tuple[str, str]]):
    html = "".join(f"<p>{words} {html_of(math)} {words}</p>" for words, math in pieces)
    assert to_markdown(html) == "\n\n".join(f"{words} {math} {words}" for words, math in pieces)


PLACES = st.sampled_from(
    [
        *("<ul><li>{}</li></ul>", "<ol><li><p>{}</p><p>x</p></li></ol>", "<blockquote><p>{}</p></blockquote>", "<h2>{}</h2>"),
        *("<table><tr><td>{}</td><td>x</td></tr></table>", '<p><a href="/x">{}</a></p>', "<p><strong>{}</strong></p>"),
        *("<p>*a* {} <em>b</em></p>", '<p>a_b_ <span class="math-container">{}</span></p>', "<p>x<br>{}</p>", "<p>a*b*\n{}</p>"),
    ]
)


@given(PLACES, MATHS)
@HARD
def test_latex_is_the_same_wherever_it_stands_but_for_its_newlines(place: str, math: str):
    markdown = to_markdown(place.format(html_of(math)))
    assert " ".join(math.split()) in " ".join(markdown.split())


@given(WORDS)
@HARD
def test_plain_text_is_left_alone_however_often_it_is_converted(text: str):
    assert to_markdown(text) == text
    assert to_markdown(to_markdown(f"<p>{text}</p>")) == text


BLOCK_TAGS = ("p", "ul", "ol", "li", "pre", "table", "tr", "td", "th", "blockquote", "div", "h2", "hr", "dl", "iframe")
TAGS = st.sampled_from((*BLOCK_TAGS, "code", "em", "strong", "a", "span", "br", "sup", "img", "svg", "B", "LI"))
SOUP = st.lists(
    st.one_of(
        *(NASTY, SNIPPETS, st.just("<!-- x -->"), st.just("<"), st.just('"')),
        *map(TAGS.map, ("<{}>".format, "</{}>".format, '<{} href="x" start="7">'.format, "<{} title='<p>'>".format)),
    ),
    max_size=12,
).map("".join)


@given(st.one_of(SOUP, st.text()), st.sampled_from(["stackexchange", "markdownify"]))
@settings(HARD, max_examples=600)
def test_convert_never_raises_and_says_when_it_fell_back_whatever_the_tags(
    html: str, converter: Literal["stackexchange", "markdownify"]
):
    text, fell_back = convert(html, converter)
    assert isinstance(text, str)
    if converter == "stackexchange":
        try:
            assert (text, fell_back) == (to_markdown(html), False)
        except Unsupported:
            assert fell_back


HOSTILE = (
    *(
        "$ _",
        "$",
        "$x",
        "\\$x ",
        "*",
        "*_",
        "_",
        "[",
        "[a",
        "]",
        "](",
        "`",
        "``x",
        "~~",
        "\\",
        "&#",
        "&",
        "&lt;a ",
        "\\begin{a}",
        "|",
        "\n",
    ),
    *(
        "<",
        "<a ",
        '<a "',
        "<a href='",
        "<!--",
        "<br>",
        "<b>x",
        "<p>",
        "</p>",
        "<p>x",
        "<ul><li>",
        "<li>x</li>",
        "<ul><li>x</li>",
        "<blockquote>",
    ),
    *(
        "<pre>",
        "<pre><code>",
        "</pre>",
        "<td>",
        "<table><tr><td>",
        "<code>",
        '<a href="x">',
        "<em>x</em>",
        "<em>",
        "<sup>x",
        "<h2>x",
        "<iframe>",
    ),
    *("<P>x", "<p><em>", "\n- ", " \n", "\t", "1. \n", "![", "!<a href='x'>y</a>", "<p>x</p>", "<!-- x -->", '<img src="', "$\\$"),
)


@pytest.mark.parametrize("piece", HOSTILE)
def test_a_body_of_hostile_pieces_is_read_in_linear_time(piece: str):
    # A tenth of a second or less; minutes, if a pattern were quadratic in the length of its text.
    html = f"<p>{piece * (100_000 // len(piece))}"
    start = time.process_time()
    with contextlib.suppress(Unsupported):
        to_markdown(html)
    assert time.process_time() - start < 3
