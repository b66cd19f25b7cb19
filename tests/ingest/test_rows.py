"""Faults that dumps have, or might: none may lose, cut or change text in silence."""

import codecs

import pytest

from tasks.ingest import posts, rows
from tasks.ingest.rows import Bad, Field, Layout, RowScanner

HEAD = b'\xef\xbb\xbf<?xml version="1.0" encoding="utf-8"?>\r\n<posts>\r\n'
DAY = 'CreationDate="2015-01-02T03:04:05.678"'
GOOD = [
    f'  <row Id="{n}" PostTypeId="2" ParentId="9" {DAY} Score="{n}" Body="&lt;p&gt;Body {n}&lt;/p&gt;" />'.encode()
    for n in range(1, 5)
]


class Scan:
    """A whole file through the scanner, in chunks of `step` bytes."""

    def __init__(self, data: bytes, step: int = 1 << 20, layout: Layout = posts.POSTS) -> None:
        self.bodies: dict[int, str] = {}
        self.bad: list[Bad] = []
        self.scanner = RowScanner(layout, "Posts.xml", self.accept, self.bad.append)
        for start in range(0, len(data), step):
            self.scanner.feed(data[start : start + step])
        self.scanner.close()
        assert self.scanner.rows == len(self.bodies) + len(self.bad)
        assert self.scanner.quarantined == len(self.bad)

    def accept(self, values) -> str | None:
        self.bodies[int(values[posts.ID])] = posts.unescape(values[posts.BODY])
        return None


def file_of(*lines: bytes, end: bytes = b"\r\n", head: bytes = HEAD) -> bytes:
    return head + b"".join(line + end for line in lines) + b"</posts>"


def with_odd(odd: bytes) -> bytes:
    """Two good rows, the odd one, two good rows."""
    return file_of(*GOOD[:2], odd, *GOOD[2:])


def odd_row(body: str = "Odd", attributes: str = "", id: str = "77") -> bytes:
    return f'  <row Id="{id}" PostTypeId="2" ParentId="9" {DAY} Score="1" Body="{body}"{attributes} />'.encode()


def test_good_rows_are_read_whole_and_in_any_chunks():
    data = file_of(*GOOD)
    for step in (1, 7, 100, 1 << 20):
        scan = Scan(data, step)
        assert scan.bodies == {n: f"<p>Body {n}</p>" for n in range(1, 5)}
        assert (scan.scanner.repaired, scan.scanner.cut, scan.bad) == (0, None, [])


@pytest.mark.parametrize(
    ("what", "body", "text"),
    [
        ("a control character", "a\x0eb", "a\ufffdb"),
        ("a reference to a control character", "a&#xE;b", "a\ufffdb"),
        ("a reference to null", "a&#0;b", "a\ufffdb"),
        ("a reference to a surrogate", "a&#xD800;b", "a\ufffdb"),
        ("a reference beyond Unicode", "a&#x110000;b", "a\ufffdb"),
        ("a noncharacter", "a\uffffb", "a\ufffdb"),
        ("a bare ampersand", "AT&T", "AT&T"),
        ("an ampersand at the end", "AT&", "AT&"),
        ("an unknown entity", "a&nbsp;b &foo; c", "a&nbsp;b &foo; c"),
        ("an entity without a semicolon", "1 &lt 2", "1 &lt 2"),
    ],
)
def test_what_can_be_mended_without_guessing_is_kept_and_counted(what, body, text):
    scan = Scan(with_odd(odd_row(body)))
    assert scan.bodies[77] == text, what
    assert len(scan.bodies) == 5
    assert (scan.scanner.repaired, scan.bad) == (1, [])


@pytest.mark.parametrize(
    ("what", "body", "text"),
    [
        ("a number reference", "caf&#233;&#xe9;", "caféé"),
        ("an escaped reference", "&amp;#xA; &amp;lt;", "&#xA; &lt;"),
        ("line feeds and tabs as references", "a&#xA;b&#xD;c&#x9;d", "a\nb\rc\td"),
        ("raw greater-than and apostrophe", "a > b's", "a > b's"),
        ("characters of four bytes", "𝛼 and 😀", "𝛼 and 😀"),
    ],
)
def test_what_xml_allows_is_not_a_repair(what, body, text):
    scan = Scan(with_odd(odd_row(body)))
    assert scan.bodies[77] == text, what
    assert (scan.scanner.repaired, scan.bad) == (0, [])


def test_c1_control_references_stay_what_xml_says_they_are():
    assert Scan(with_odd(odd_row("a&#x85;b"))).bodies[77] == "a\x85b"  # HTML would read U+2026 here


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (odd_row().replace(b"Odd", b"Odd \xff\xfe"), "invalid UTF-8"),
        (odd_row("a < b"), "raw <"),
        (odd_row('say "hi" to'), "stray quote"),
        (odd_row(attributes=' Score="2"'), "Score stands twice"),
        (odd_row(id="x1"), "Id is not a whole number"),
        (odd_row(id=""), "Id is not a whole number"),
        (odd_row(id="9" * 30), "Id is not a whole number"),
        (odd_row().replace(b' Id="77"', b""), "no Id"),
        (odd_row().replace(b'Score="1"', b'Score="many"'), "Score is not a whole number"),
        (odd_row().replace(b"2015-01-02T", b"yesterday"), "CreationDate is not a date"),
        (b"  <row />", "no Id"),
        (b"some text between the rows", "not a row"),
        (b'  <user Id="3" />', "not a row"),
        (b'<!ENTITY a "b">', "not a row"),
    ],
)
def test_a_damaged_row_goes_to_quarantine_and_its_neighbours_stay(odd, reason):
    scan = Scan(with_odd(odd))
    assert sorted(scan.bodies) == [1, 2, 3, 4]
    (bad,) = scan.bad
    assert reason in bad.reason
    assert bad.line == 5
    start = len(HEAD) + sum(len(line) + 2 for line in GOOD[:2])
    assert bad.offset == start + len(odd) - len(odd.lstrip())
    assert with_odd(odd)[bad.offset :].startswith(bad.raw)


def test_an_unclosed_row_costs_that_row_only():
    scan = Scan(with_odd(odd_row()[:-3]))
    assert sorted(scan.bodies) == [1, 2, 3, 4]
    assert [bad.reason for bad in scan.bad] == ["the row is not closed"]


def test_a_value_that_is_not_closed_costs_that_row_only():
    scan = Scan(with_odd(odd_row().replace(b'Odd" />', b"Odd />")))
    assert sorted(scan.bodies) == [1, 2, 3, 4]
    assert [bad.reason for bad in scan.bad] == ["Body is not closed"]


@pytest.mark.parametrize(
    "odd",
    [
        odd_row().replace(b" />", b"></row>"),
        odd_row().replace(b" />", b" >\t</row >"),
        odd_row().replace(b'"', b"'"),
        odd_row().replace(b' Body="', b'\r\n   Body = "'),
        odd_row(attributes=' Unheard="of"'),
        b'  <row Body="Odd" Id="77" ParentId="9" Score="1" ' + DAY.encode() + b' PostTypeId="2" />',
        b"<!-- a comment -->" + odd_row(),
        odd_row() + b"   ",
        b"\r\n" + odd_row() + b"\r\n<!-- a comment\r\n of " + GOOD[0] + b" several lines -->\r\n\r\n",
        odd_row(attributes=' ViewCount="" OwnerUserId=""'),
    ],
)
def test_other_ways_to_write_the_same_row(odd):
    scan = Scan(with_odd(odd))
    assert scan.bodies == {**{n: f"<p>Body {n}</p>" for n in range(1, 5)}, 77: "Odd"}
    assert (scan.scanner.repaired, scan.bad, scan.scanner.cut) == (0, [], None)


def test_all_rows_on_one_line():
    scan = Scan(b"<posts>" + b"".join(GOOD) + b"</posts>")
    assert sorted(scan.bodies) == [1, 2, 3, 4]
    assert scan.scanner.cut is None


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_both_line_ends(end):
    assert len(Scan(file_of(*GOOD, end=end)).bodies) == 4


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("mark", [True, False])
def test_utf_16_with_and_without_its_mark(encoding, mark):
    text = file_of(*GOOD, odd_row("caf\u00e9 \U0001f600")).decode("utf-8-sig").replace("utf-8", "utf-16")
    bom = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}[encoding]
    for step in (3, 1 << 20):
        scan = Scan(bom * mark + text.encode(encoding), step)
        assert scan.bodies[77] == "caf\u00e9 \U0001f600"
        assert len(scan.bodies) == 5


def test_an_encoding_that_is_declared():
    head = b'<?xml version="1.0" encoding="windows-1252"?>\n<posts>\n'
    assert Scan(file_of(odd_row("caf\u00e9").decode().encode("windows-1252"), head=head)).bodies[77] == "caf\u00e9"
    with pytest.raises(ValueError, match="'ebcdic-cp-us' is not supported: convert"):
        Scan(file_of(*GOOD, head=head.replace(b"windows-1252", b"ebcdic-cp-us")))


@pytest.mark.parametrize(
    "head",
    [
        b"<posts>\n",
        b'<?xml version="1.0"?>\n<!-- From the\n archive, 2025 -->\n<posts>\n',
        b'<!DOCTYPE posts SYSTEM "http://example.test/posts.dtd">\n<posts>\n',
        b'<!DOCTYPE posts [ <!ELEMENT posts (row)*> ]>\n<posts xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">\n',
    ],
)
def test_what_may_stand_before_the_root(head):
    scan = Scan(file_of(*GOOD, odd_row("a < b"), head=head))
    assert sorted(scan.bodies) == [1, 2, 3, 4]
    assert scan.bad[0].line == head.count(b"\n") + 5


@pytest.mark.parametrize(
    "head",
    [
        b'<!DOCTYPE posts [ <!ENTITY lol "lol"> <!ENTITY lol2 "&lol;&lol;"> ]>\n<posts>\n',
        b'<!DOCTYPE posts [ <!ENTITY xxe SYSTEM "file:///etc/passwd"> ]>\n<posts>\n',
        b'<?xml version="1.0"?>\n<!DOCTYPE posts [ <!ENTITY % a SYSTEM "http://example.test/x"> %a; ]>\n<posts>\n',
    ],
)
def test_declared_entities_are_refused(head):
    for step in (5, 1 << 20):
        with pytest.raises(ValueError, match="declares entities"):
            Scan(file_of(*GOOD, head=head), step)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<users>\n</users>", "the root element is <users>, not <posts>"),
        (b"", "no <posts> element found"),
        (b"<html><body>Not found</body></html>", "the root element is <html>"),
        (b"\x00\x01\x02" * 100, "no <posts> element found"),
        (b'{"items": []}', "no <posts> element found"),
    ],
)
def test_a_file_that_is_something_else_is_named_so(data, message):
    with pytest.raises(ValueError, match=message):
        Scan(data)


def test_a_very_short_file():
    scan = Scan(b'<posts>\n<row Id="1" PostTypeId="5" />\n<row Id="2" PostTypeId="5" />\n</posts>')
    assert (sorted(scan.bodies), scan.scanner.cut) == ([1, 2], None)
    text = '<posts>\n<row Id="1" PostTypeId="5" />\n</posts>'
    assert sorted(Scan(text.encode("utf-16")).bodies) == [1]
    assert Scan(b"<posts/>").scanner.cut is None


def test_a_file_may_be_cut_anywhere_and_says_so():
    data = file_of(*GOOD)
    ends = [data.index(row) + len(row) for row in GOOD]
    for length in range(len(HEAD), len(data)):
        scan = Scan(data[:length])
        assert len(scan.bodies) == sum(end <= length for end in ends)
        assert scan.bad == []
        assert scan.scanner.cut is not None
        assert scan.scanner.cut <= length
    assert Scan(data).scanner.cut is None


def test_rows_after_the_end_are_not_taken():
    scan = Scan(file_of(*GOOD[:3]) + b"\n" + GOOD[3] + b"\n")
    assert sorted(scan.bodies) == [1, 2, 3]
    assert [bad.reason for bad in scan.bad] == ["after the end of <posts>"]


def test_a_row_beyond_the_limit_goes_to_quarantine_in_little_memory(monkeypatch):
    monkeypatch.setattr(rows, "MAX_ROW", 10_000)
    monkeypatch.setattr(rows, "KEPT", 500)
    long = odd_row("x" * 50_000)
    for step in (1_000, 1 << 20):
        scan = Scan(with_odd(long), step)
        assert sorted(scan.bodies) == [1, 2, 3, 4]
        (bad,) = scan.bad
        assert "longer than 10000 bytes" in bad.reason
        assert len(bad.raw) == 500
        assert bad.line == 5


def test_many_lines_without_an_end_take_linear_time(monkeypatch):
    monkeypatch.setattr(rows, "MAX_LINES", 10_000)
    scan = Scan(file_of(GOOD[0], odd_row()[:-4], *[b"and so on"] * 5_000))
    assert sorted(scan.bodies) == [1]
    assert len(scan.bad) > 1


def test_every_way_to_read_a_row_gives_the_same_values():
    careful = [
        GOOD[0].replace(b" />", b"></row>"),
        GOOD[0].replace(b'"', b"'"),
        GOOD[0].replace(b' Id="1"', b' Id="01"'),
        GOOD[0].replace(b"  <row", b"\t<row"),
    ]
    seen = []
    scanner = RowScanner(posts.POSTS, "x", seen.append, print)
    scanner.feed(file_of(GOOD[0], *careful))
    scanner.close()
    assert posts.POSTS.read(GOOD[0]) == seen[0]
    assert [posts.POSTS.read(line) for line in careful] == [None] * 4
    assert seen == [seen[0]] * 5


def test_required_attributes_may_not_be_empty():
    layout = Layout("posts", (Field("Id", rows.NUMBER, required=True, what="a number"), Field("Note", rows.TEXT)))
    assert layout.read(b'<row Id="3" />') == (b"3", b"")
    assert layout.read(b'<row Id="3" Note="x" />\r') == (b"3", b"x")
    assert layout.read(b'<row Id="" />') is None
    assert layout.values({"Id": ""}) == "Id is not a number: ''"
    assert layout.values({}) == "no Id"


@pytest.mark.parametrize(
    "line",
    [
        b'<row Id="3" Note="x" /> tail',
        b'<row Id="3" Note="x" />"tail',
        b'<row Id="3" Note="x" />"tail"',
        b'<row Id="3" Note="x',
        b'<row Note="x" Id="3" />',
        b'<row Id="3" Id="4" />',
        b'<row Id="3" Other="4" />',
        b'<row Id="3"Note="x" />',
        b'<row Id= "3" />',
        b'<row Id="3" >',
        b'<rowId="3" />',
        b' Id="3" />',
        b"<row />",
        b"",
    ],
)
def test_only_rows_just_as_dumps_write_them_are_read_the_fast_way(line):
    layout = Layout("posts", (Field("Id", rows.NUMBER, required=True), Field("Note", rows.TEXT)))
    assert layout.read(line) is None
    assert layout.read(line) is None  # the second time the shape is known


def test_a_scanner_may_begin_in_the_middle_of_a_table():
    data = file_of(*GOOD)
    begins = data.index(GOOD[2])
    first, second = [], []
    scanner = RowScanner(posts.POSTS, "x", first.append, print)
    scanner.feed(data[:begins])
    assert scanner.pause()
    after = RowScanner(posts.POSTS, "x", second.append, print, begins=begins)
    after.feed(data[begins:])
    after.close()
    assert [int(values[posts.ID]) for values in first + second] == [1, 2, 3, 4]
    assert (after.cut, scanner.lines + after.lines) == (None, data.count(b"\n"))


@pytest.mark.parametrize("tail", [b"<!-- a comment ", odd_row()[:-4] + b"\r\n", b"</posts>\r\n", b"  <row Id="])
def test_a_scanner_says_when_another_cannot_begin_where_it_ends(tail):
    scanner = RowScanner(posts.POSTS, "x", lambda values: None, lambda bad: None)
    scanner.feed(HEAD + GOOD[0] + b"\r\n" + tail)
    assert not scanner.pause()
