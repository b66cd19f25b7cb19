"""Every fault that a dump was seen to have, or might: nothing dies, nothing is lost or altered in silence, every row is counted.

Only files go in and only the artifact is looked at, so this holds whatever ingest is made of. What a reader owes to a file is the
standard's word (https://www.w3.org/TR/xml/): line ends, values of attributes, references. What is expected is written out by hand.
"""

import codecs
import gzip
import hashlib
import io
import json
import random
import re
from pathlib import Path
from typing import Any, NamedTuple

import py7zr
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks.ingest import blocks
from tasks.ingest import ingest as step

BOM, END = codecs.BOM_UTF8, b"\r\n"
DECLARATION = b'<?xml version="1.0" encoding="utf-8"?>\r\n'
DAY = b'CreationDate="2015-01-02T03:04:05.678"'


def post(id: Any, kind: Any, *more: bytes, title: bytes | None = None, body: bytes = b"Text.", score: bytes = b"1") -> bytes:
    """A row in bytes, so that it can hold what no text can."""
    cells = [b'<row Id="%b" PostTypeId="%b"' % (str(id).encode(), str(kind).encode())]
    cells += [*(b" " + one for one in more), b' %b Score="%b" Body="%b"' % (DAY, score, body)]
    return b"".join([*cells, b"" if title is None else b' Title="%b"' % title, b" />"])


def ask(id: Any, *more: bytes, **cells: Any) -> bytes:
    return post(id, 1, *more, **{"title": b"Question %b?" % str(id).encode(), **cells})


def reply(id: Any, parent: Any, *more: bytes, **cells: Any) -> bytes:
    return post(id, 2, b'ParentId="%b"' % str(parent).encode(), *more, **{"body": b"Answer %b." % str(id).encode(), **cells})


def group(id: int) -> list[bytes]:
    """A question whose two answers make a pair."""
    return [ask(id), reply(id + 1, id, score=b"0"), reply(id + 2, id, score=b"9")]


BEFORE, AFTER = [*group(10), *group(20), ask(50)], [*group(30), *group(40)]  # 50 waits for an answer that is odd
GOOD = [*BEFORE, *AFTER]
LINE = 3 + len(BEFORE)  # of what stands between


def posts(rows: list[bytes], end: bytes = END, head: bytes = BOM + DECLARATION, tail: bytes = b"</posts>") -> bytes:
    return head + b"<posts>" + end + b"".join(b"  " + row + end for row in rows) + tail


class Seen(NamedTuple):
    """What ingest made of a dump."""

    card: dict[str, Any]
    questions: dict[int, dict[str, Any]]
    answers: dict[int, dict[str, Any]]
    quarantine: list[dict[str, Any]]
    out: Path

    @property
    def rows(self) -> dict[str, int]:
        return self.card["rows"]


def look(site: Any, *paths: Path, **config: Any) -> Seen:
    """Run ingest. Whatever was in the dump, every row that was read is accounted for, and no answer stands twice in a question."""
    out, _ = site.ingest(*paths, **config)
    card = json.loads((out / "card.json").read_text())
    rows = card["rows"]
    assert rows["read"] == rows["questions"] + rows["answers"] + rows["other"] + rows["quarantined"]
    questions = {q["qid"]: q for q in site.read(out, "questions")}
    answers = {a["answer_id"]: a for q in questions.values() for a in q["answers"]}
    bad = site.read(out, "quarantine")
    assert len(bad) == sum(table["quarantined"] for s in card["sites"].values() for table in s["tables"].values())
    for q in questions.values():
        ids = [a["answer_id"] for a in q["answers"]]
        assert len(set(ids)) == len(ids)
    return Seen(card, questions, answers, bad, out)


def untouched(seen: Seen, ids: tuple[int, ...] = (10, 20, 30, 40)) -> None:
    """The good rows' records are what their rows say, whatever stood between them."""
    for id in ids:
        q = seen.questions[id]
        assert (q["title"], q["question"]) == (f"Question {id}?", f"Question {id}?\n\nText.")
        assert [(a["answer_id"], a["text"], a["votes"]) for a in q["answers"]] == [
            (id + 1, f"Answer {id + 1}.", 0),
            (id + 2, f"Answer {id + 2}.", 9),
        ]
        assert len(q["pairs"]) == 1


def stands_in(data: bytes, bad: dict[str, Any]) -> None:
    """A quarantined row is found in the file by what quarantine says of it."""
    raw, offset = bad["raw"], bad["offset"]
    assert raw
    assert data[offset : offset + len(raw)] == raw
    assert bad["line"] == data.count(b"\n", 0, offset) + 1
    assert bad["reason"]
    assert "\n" not in bad["reason"]
    if len(raw) < 64_000:
        assert bad["sha256"] == hashlib.sha256(raw).hexdigest()


def among(site: Any, *odd: bytes, **more: Any) -> tuple[Seen, bytes]:
    """The odd rows between good ones; the good ones are untouched."""
    data = posts([*BEFORE, *odd, *AFTER], **more)
    seen = look(site, site.write(data))
    untouched(seen)
    for bad in seen.quarantine:
        stands_in(data, bad)
    return seen, data


def refused(site: Any, *paths: Path, says: str, **config: Any) -> str:
    """ingest ends with one line for the user that says `says`; the line comes back."""
    with pytest.raises(ValueError, match=says) as caught:
        site.ingest(*paths, **config)
    assert "\n" not in str(caught.value)
    assert not [path.name for path in site.tmp.iterdir() if "scratch" in path.name]
    return str(caught.value)


def in_blocks(patch: pytest.MonkeyPatch, size: int) -> None:
    """Tables are cut into blocks of so many bytes, and sites into partitions, as if they were large."""
    patch.setattr(step, "BLOCK_BYTES", (size, size, 10**9))
    patch.setattr(step, "PARTITION_BYTES", (4 * size, 4 * size, 10**9))
    patch.setattr(blocks, "AHEAD", 50)


# ---- characters and references


REPAIRED = {
    "a control character": (b"a\x0eb", "a\ufffdb"),
    "a null": (b"a\0b", "a\ufffdb"),
    "an escape character": (b"a\x1b[31mb", "a\ufffd[31mb"),
    "a noncharacter": ("a\uffffb".encode(), "a\ufffdb"),
    "a reference to a control character": (b"a&#xE;b", "a\ufffdb"),
    "a reference to null": (b"a&#0;b", "a\ufffdb"),
    "a reference to a noncharacter": (b"a&#xFFFF;b", "a\ufffdb"),
    "a reference to a surrogate": (b"a&#xD800;b", "a\ufffdb"),
    "a reference to a surrogate pair": (b"a&#xD83D;&#xDE00;b", "a\ufffd\ufffdb"),
    "a reference beyond Unicode": (b"a&#x110000;b", "a\ufffdb"),
    "a bare ampersand": (b"AT&T and R&D", "AT&T and R&D"),
    "an ampersand at the end": (b"AT&", "AT&"),
    "an entity of HTML": (b"a&nbsp;b", "a&nbsp;b"),
    "an unknown entity": (b"a &foo; b", "a &foo; b"),
    "an entity in capitals": (b"1 &LT; 2", "1 &LT; 2"),
    "an entity without a semicolon": (b"1 &lt 2", "1 &lt 2"),
    "a reference without digits": (b"a&#;b&#x;c", "a&#;b&#x;c"),
    "several faults in one value": (b"AT&T\x0e &foo; &#xE;", "AT&T\ufffd &foo; \ufffd"),
}


@pytest.mark.parametrize(("raw", "text"), REPAIRED.values(), ids=REPAIRED)
def test_what_can_be_mended_without_a_guess_is_mended_and_counted(site, raw, text):
    seen, _ = among(site, ask(900, title=raw), reply(901, 900, body=b"&lt;p&gt;In code: &lt;code&gt;%b&lt;/code&gt;" % raw))
    assert seen.questions[900]["title"] == text
    shown = text.replace("&nbsp;", "\xa0").replace("&LT;", "<").replace("&lt", "<")  # the body is HTML, and HTML knows these
    assert seen.answers[901]["text"] == f"In code: `{shown}`"
    assert seen.rows == {"read": 15, "questions": 6, "answers": 9, "other": 0, "quarantined": 0, "repaired": 2}


LEGAL = {
    "a raw greater-than and apostrophes": (b"a > b's 'c'", "a > b's 'c'"),
    "the five entities": (b"&lt;b&gt; &amp; &quot;c&quot; &apos;d&apos;", "<b> & \"c\" 'd'"),
    "decimal and hexadecimal references": (b"caf&#233;&#xe9;&#xE9;&#x1F600;", "caféé" + "é😀"),
    "a reference with zeros before it": (b"a&#0065;&#x00041;b", "aAAb"),
    "references to brackets and quotes": (b"&#60;b&#62; &#34;c&#x22; &#38;amp;", '<b> "c" &amp;'),
    "an escaped reference": (b"&amp;#xA; &amp;lt; &amp;amp;", "&#xA; &lt; &amp;"),
    "line feeds and tabs as references": (b"a&#xA;b&#x9;c&#10;d", "a\nb\tc\nd"),
    "characters of four bytes": ("𝛼 and 😀".encode(), "𝛼 and 😀"),
    "an unassigned character and a private one": ("\u0378 \ue000".encode(), "\u0378 \ue000"),
    "separators of lines that end no line here": ("a\u2028b\u0085c\u2029d".encode(), "a\u2028b\u0085c\u2029d"),
    "a byte order mark inside": ("a\ufeffb".encode(), "a\ufeffb"),
    "a replacement character": ("a\ufffdb".encode(), "a\ufffdb"),
    "marks of direction": ("a\u202eb".encode(), "a\u202eb"),
    "what closes CDATA and comments": (b"a ]]> b --> c /> d ?>", "a ]]> b --> c /> d ?>"),
}


@pytest.mark.parametrize(("raw", "text"), LEGAL.values(), ids=LEGAL)
def test_what_xml_allows_is_read_as_xml_says_and_is_no_repair(site, raw, text):
    seen, _ = among(site, ask(900, title=raw), *group(910), reply(901, 900))
    untouched(seen, (910,))
    assert seen.questions[900]["title"] == text
    assert (seen.rows["read"], seen.rows["repaired"], seen.rows["quarantined"]) == (18, 0, 0)


# ---- rows that cannot be read


def plain(old: bytes = b"", new: bytes = b"", **cells: Any) -> bytes:
    """An answer to question 50, with something replaced."""
    row = reply(901, 50, **{"body": b"Odd.", **cells})
    assert old in row
    return row.replace(old, new, 1)


DAMAGED = {
    "invalid UTF-8 in a body": (plain(body=b"caf\xe9 au lait"), "UTF-8"),
    "invalid UTF-8 in an attribute's name": (plain(b"Score", b"Sc\xf6re"), "UTF-8"),
    "overlong UTF-8": (plain(body=b"a\xc0\x80b \xe0\x80\xbc"), "UTF-8"),
    "a surrogate in UTF-8": (plain(body=b"a\xed\xa0\x80b"), "UTF-8"),
    "a character of UTF-8 that is cut": (plain(body=b"a\xe2\x82"), "UTF-8"),
    "a byte order mark of UTF-16 inside": (plain(body=b"a\xff\xfeb"), "UTF-8"),
    "a raw less-than": (plain(body=b"1 < 2"), "<"),
    "raw HTML": (plain(body=b"<p>Use <b>oil</b>.</p>"), "<"),
    "a raw less-than and an entity": (plain(body=b"1 < 2 &lt; 3"), "<"),
    "a row quoted in a body": (plain(body=b"<row Id='7' PostTypeId='1' />"), "<"),
    "a stray quote": (plain(body=b'say "hi" to'), "quote|attribute"),
    "a value without quotes": (plain(b'Score="1"', b"Score=1"), "quote|attribute"),
    "a value that is not closed": (plain(b'Odd."', b"Odd."), "closed"),
    "a name without a value": (plain(b"Score=", b"Score "), "quote|attribute"),
    "an attribute twice": (plain(b"Score=", b'Score="7" Score='), "Score.*twice"),
    "a body twice": (plain(b"Body=", b'Body="Other." Body='), "Body.*twice"),
    "a row without its end": (plain(b" />", b""), "closed"),
    "an open element with something in it": (plain(b" />", b"><b>x</b></row>"), "."),
    "text in the element": (plain(b" />", b">text</row>"), "."),
    "CDATA in the element": (plain(b" />", b"><![CDATA[<p>x</p>]]></row>"), "."),
    "no id": (plain(b' Id="901"', b""), "Id"),
    "an empty id": (plain(b'"901"', b'""'), "Id"),
    "an id in words": (plain(b'"901"', b'"nine"'), "Id"),
    "an id in hexadecimal": (plain(b'"901"', b'"0x385"'), "Id"),
    "an id with a fraction": (plain(b'"901"', b'"901.5"'), "Id"),
    "an id in other digits": (plain(b'"901"', '"٩٠١"'.encode()), "Id"),
    "an id beyond 64 bits": (plain(b'"901"', b'"%d"' % 2**64), "Id"),
    "an id that is a bomb of digits": (plain(b'"901"', b'"' + b"9" * 9000 + b'"'), "Id"),
    "an id in lower case": (plain(b" Id=", b" id="), "Id"),
    "no kind of post": (plain(b' PostTypeId="2"', b""), "PostTypeId"),
    "a kind in words": (plain(b'PostTypeId="2"', b'PostTypeId="answer"'), "PostTypeId"),
    "a parent in words": (plain(b'ParentId="50"', b'ParentId="ten"'), "ParentId"),
    "no score": (plain(b' Score="1"', b""), "Score"),
    "an empty score": (plain(score=b""), "Score"),
    "a score in words": (plain(score=b"many"), "Score"),
    "a score of 10^12": (plain(score=b"1000000000000"), "Score"),
    "a score that is not a number": (plain(score=b"NaN"), "Score"),
    "an owner in words": (plain(DAY, DAY + b' OwnerUserId="me"'), "OwnerUserId"),
    "no date": (plain(b" " + DAY, b""), "CreationDate"),
    "a date in words": (plain(b"2015-01-02T", b"yesterday"), "CreationDate|date"),
    "a date of another order": (plain(b"2015-01-02T", b"02.01.2015 "), "CreationDate|date"),
    "the 30th of February": (plain(b"2015-01-02", b"2015-02-30"), "date"),
    "a 13th month": (plain(b"2015-01-02", b"2015-13-02"), "date"),
    "a day 0": (plain(b"2015-01-02", b"2015-01-00"), "date"),
    "a year 0": (plain(b"2015-01-02", b"0000-01-02"), "date"),
    "a 25th hour": (plain(b"T03:", b"T25:"), "date"),
    "a 61st second": (plain(b":05.678", b":61.678"), "date"),
    "an empty row": (b"<row />", "Id|PostTypeId"),
    "a row of another table": (b'<user Id="3" DisplayName="Ann" />', "row"),
    "an element in capitals": (plain(b"<row", b"<ROW"), "row"),
    "text between the rows": (b"some text between the rows", "row"),
    "an error page in the middle": (b"<html><body>502 Bad Gateway</body></html>", "row"),
    "CDATA between the rows": (b"<![CDATA[ " + plain() + b" ]]>", "row"),
    "an entity declared between the rows": (b'<!ENTITY a "b">', "row"),
    "nulls between the rows": (b"\0" * 300, "row"),
    "a byte order mark between the rows": (BOM + plain(), "row"),
    "an end of another table": (b"</users>", "row"),
}


@pytest.mark.parametrize(("odd", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_row_stands_in_quarantine_and_its_neighbours_stay_as_they_are(site, odd, reason):
    seen, data = among(site, odd)
    (bad,) = seen.quarantine
    assert re.search(reason, bad["reason"])
    assert (bad["site"], bad["file"], bad["raw"]) == ("wood.test", "wood.test.xml", odd)
    assert (bad["offset"], bad["line"]) == (data.index(odd), LINE)
    assert seen.rows == {"read": 14, "questions": 5, "answers": 8, "other": 0, "quarantined": 1, "repaired": 0}
    assert 901 not in seen.answers
    assert seen.card["incomplete"] is False


def test_bad_rows_one_after_the_other_are_told_apart(site):
    odd = [one for one, _ in DAMAGED.values()]
    closed = [one for one in odd if one.endswith((b"/>", b"</row>"))]
    seen, _ = among(site, *closed)
    assert [bad["raw"] for bad in seen.quarantine] == closed
    seen, _ = among(site, plain(b" />", b""), plain(body=b"1 < 2"), plain(b" />", b""), *group(900))
    untouched(seen, (900,))
    assert [bad["line"] for bad in seen.quarantine] == [LINE, LINE + 1, LINE + 2]


def test_a_bad_row_at_the_start_and_at_the_end_of_the_table(site):
    data = posts([plain(body=b"1 < 2"), *GOOD, plain(b" />", b"")])
    seen = look(site, site.write(data))
    untouched(seen)
    assert [bad["line"] for bad in seen.quarantine] == [3, 17]
    for bad in seen.quarantine:
        stands_in(data, bad)
    assert (seen.rows["read"], seen.card["incomplete"]) == (15, False)


def test_a_long_bad_row_is_kept_in_part_with_the_digest_of_the_whole(site):
    odd = plain(body=b"1 < 2 " + bytes(random.Random(1).choices(b"abcdef ", k=300_000)))
    seen, data = among(site, odd)
    (bad,) = seen.quarantine
    assert bad["raw"] == odd[: len(bad["raw"])]
    assert 1_000 <= len(bad["raw"]) <= 64_000
    assert (bad["sha256"], bad["offset"]) == (hashlib.sha256(odd).hexdigest(), data.index(odd))


def test_a_row_above_64_mb_is_in_quarantine_and_the_rows_after_it_are_read(site):
    odd = plain(body=b"x" * 65_000_000)
    data = posts([*BEFORE, odd, *AFTER])
    seen = look(site, site.write(data))
    untouched(seen)
    (bad,) = seen.quarantine
    assert re.search("longer than 64.?000.?000", bad["reason"])
    assert bad["line"] == LINE
    assert data[bad["offset"] :].startswith(bad["raw"])
    assert data.index(odd) - bad["offset"] in (0, 2)  # it may count the two blanks before the row
    assert len(bad["raw"]) <= 64_000
    assert seen.rows["read"] == 14


def test_no_terminal_codes_or_markup_of_a_dump_reach_the_card(site):
    nasty = b"&lt;script&gt;alert(1)&lt;/script&gt;"
    odd = [ask(900, b'OwnerDisplayName="%b"' % nasty, title=nasty), reply(901, 900, b'OwnerDisplayName="%b"' % nasty)]
    seen, _ = among(site, *odd, plain(b'"901"', b'"<script>"'), plain(score=b"\x1b[31m"))
    assert seen.questions[900]["title"] == "<script>alert(1)</script>"
    for page in ("CARD.md", "NOTICE.md", "REPORT.md"):
        text = (seen.out / page).read_text()
        assert "<script>" not in text
        assert "\x1b" not in text


def test_a_foreign_licence_reaches_no_page_as_markup(site):
    seen, _ = among(site, ask(900, b'ContentLicense="&lt;script&gt;|CC"'), reply(901, 900))
    for page in ("CARD.md", "NOTICE.md", "REPORT.md"):
        assert "<script>" not in (seen.out / page).read_text()


# ---- other ways to write a good row


WRITTEN = {
    "an end tag of its own": plain(b" />", b"></row>"),
    "blanks in the end tag": plain(b" />", b" >\t</row >"),
    "no blank before the end": plain(b" />", b"/>"),
    "single quotes": plain().replace(b'"', b"'"),
    "blanks around the equals signs": plain().replace(b"=", b" = "),
    "tabs between the attributes": plain().replace(b" ", b"\t"),
    "attributes in another order": b'<row Body="Odd." Score="1" ' + DAY + b' ParentId="50" PostTypeId="2" Id="901" />',
    "attributes of a future dump": plain(b" />", b' Sentiment="0.5" Ai:Written="False" />'),
    "a row over several lines": plain().replace(b" ", END + b"    "),
    "blank lines around it": END + END + plain() + END + b" \t " + END,
    "a comment before it in its line": b"<!-- a comment -->" + plain(),
    "comments of several lines around it": b"<!-- one\r\n two -->" + END + plain() + END + b"<!--" + END + b"three\r\n-->",
    "a comment with a row in it": b"<!-- " + plain(b'"901"', b'"902"') + b" -->" + END + plain(),
    "a comment with rows in its lines": b"<!--" + END + plain(b'"901"', b'"902"') + END + b"-->" + END + plain(),
    "blanks after it": plain() + b"   ",
    "empty values of what need not be there": plain(b" />", b' ViewCount="" OwnerUserId="" AcceptedAnswerId="" Title="" />'),
    "a date without a fraction": plain(b".678", b""),
    "a date with a Z": plain(b".678", b".678Z"),
    "a date of seven digits": plain(b".678", b".6789123"),
    "a date of one digit": plain(b".678", b".6"),
}


@pytest.mark.parametrize("odd", WRITTEN.values(), ids=WRITTEN)
def test_a_good_row_in_another_spelling_is_read_and_is_no_repair(site, odd):
    seen, _ = among(site, odd)
    assert (seen.answers[901]["text"], seen.answers[901]["votes"]) == ("Odd.", 1)
    assert 902 not in seen.answers
    assert seen.rows == {"read": 14, "questions": 5, "answers": 9, "other": 0, "quarantined": 0, "repaired": 0}


def test_a_processing_instruction_between_rows_costs_no_row(site):
    seen, _ = among(site, b'<?archive checked="yes"?>')
    assert seen.rows["questions"] + seen.rows["answers"] == 13
    assert seen.rows["quarantined"] <= 1


def test_a_line_feed_inside_a_value_is_a_blank_as_xml_says(site):
    seen, _ = among(site, ask(900, title=b"one\r\ntwo\nthree\tfour"), reply(901, 900))
    assert seen.questions[900]["title"] == "one two three four"
    assert (seen.rows["read"], seen.rows["quarantined"], seen.rows["repaired"]) == (15, 0, 0)


def test_a_raw_tab_is_a_blank_however_the_row_is_written(site):
    """XML normalizes it in an attribute's value; dumps write &#x9; where they mean a tab."""
    rows = [ask(900, title=b"one\ttwo"), reply(901, 900), ask(910, title=b"one\ttwo").replace(b" />", b"></row>"), reply(911, 910)]
    seen, _ = among(site, *rows)
    assert [seen.questions[id]["title"] for id in (900, 910)] == ["one two", "one two"]


def test_a_bad_row_over_several_lines_is_kept_as_it_stands_in_the_file(site):
    odd = plain(body=b"one\r\ntwo < three\r\nfour")
    seen, data = among(site, odd)
    assert {bad["line"] for bad in seen.quarantine} <= {LINE, LINE + 1, LINE + 2}
    assert seen.quarantine[0]["offset"] == data.index(odd)
    assert b"".join(bad["raw"] for bad in seen.quarantine).replace(b"\r\n", b"") == odd.replace(b"\r\n", b"")


def test_a_bad_row_that_follows_a_row_of_several_lines_is_found_where_it_stands(site):
    odd = plain(b'"901"', b'"nine"')
    seen, data = among(site, plain(b'"901"', b'"902"').replace(b" ", b"\r\n ") + b" " + odd)
    (bad,) = seen.quarantine
    assert bad["offset"] == data.index(odd)
    assert bad["raw"] == odd
    assert seen.answers[902]["text"] == "Odd."


def test_several_rows_on_a_line_are_several_rows(site):
    seen, _ = among(site, b"".join(group(900)) + b" " + b"  ".join(group(910)))
    untouched(seen, (900, 910))
    assert (seen.rows["read"], seen.rows["repaired"], seen.rows["quarantined"]) == (19, 0, 0)


@pytest.mark.parametrize("place", range(3), ids=["first", "in the middle", "last"])
def test_of_several_rows_on_a_line_one_that_is_damaged_hides_no_other(site, place):
    """Each of the three is in a record or in quarantine, and each is counted."""
    rows = [reply(901, 50), reply(902, 50), reply(903, 50)]
    rows[place] = rows[place].replace(b"Answer", b"Ans<er")
    seen = look(site, site.write(posts([*BEFORE, b" ".join(rows), *AFTER])))
    assert seen.rows["read"] == 16
    quarantined = b"".join(bad["raw"] for bad in seen.quarantine)
    for row, id in zip(rows, (901, 902, 903), strict=True):
        assert (id in seen.answers) != (row in quarantined)


def test_a_row_in_the_body_of_a_damaged_row_is_not_taken_for_a_post(site):
    """Where a post about this format stands in a dump that forgot to escape it, reading on inside would make posts up."""
    inner = b'<row Id="555" PostTypeId="1" ' + DAY + b' Score="1" Title="Made up" Body="Made up" />'
    seen, _ = among(site, plain(body=inner))
    assert 555 not in seen.questions
    assert seen.rows["questions"] == 5


# ---- the file as a whole


HEADS = {
    "no byte order mark": DECLARATION,
    "nothing before the root": b"",
    "a comment before the root": DECLARATION + b"<!-- From the\r\n archive of 2025 -->\r\n",
    "a comment with rows before the root": DECLARATION + b"<!--\r\n<posts>\r\n" + plain() + b"\r\n</posts>\r\n-->\r\n",
    "an external DOCTYPE": DECLARATION + b'<!DOCTYPE posts SYSTEM "http://127.0.0.1:9/posts.dtd">\r\n',
    "a DOCTYPE with elements": b"<!DOCTYPE posts [ <!ELEMENT posts (row)*> ]>\r\n",
    "a processing instruction": DECLARATION + b'<?xml-stylesheet href="posts.xsl"?>\r\n',
    "blank lines": BOM + b"\r\n\r\n  ",
    "a declaration in single quotes": b"<?xml version='1.0' encoding='UTF-8' standalone='yes'?>\n",
    "a declaration of ASCII": b'<?xml version="1.0" encoding="US-ASCII"?>\n',
    "a declaration of UTF-16 over UTF-8": b'<?xml version="1.0" encoding="utf-16"?>\n',
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_what_may_stand_before_the_root(site, head):
    odd = plain(body=b"1 < 2")
    seen, data = among(site, odd, ask(900, title="café 😀".encode()), reply(901, 900), head=head)
    (bad,) = seen.quarantine
    assert (bad["offset"], bad["line"]) == (data.rindex(odd), head.count(b"\n") + 2 + len(BEFORE))
    assert (seen.questions[900]["title"], seen.rows["read"]) == ("café 😀", 16)


CLOSINGS = {
    "a line end": b"</posts>\r\n",
    "blank lines": b"</posts>\r\n\r\n  \n",
    "a comment": b"</posts>\r\n<!-- the end -->",
    "a blank in the end tag": b"</posts >",
}


@pytest.mark.parametrize("tail", CLOSINGS.values(), ids=CLOSINGS)
def test_what_may_stand_after_the_rows(site, tail):
    seen = look(site, site.write(posts(GOOD, tail=tail)))
    untouched(seen)
    assert (seen.rows["read"], seen.rows["quarantined"], seen.card["incomplete"]) == (13, 0, False)


AFTERWARDS = {
    "text": b"trailing garbage",
    "nulls": b"\0" * 5000,
    "a row": plain(),
    "bytes": bytes(range(128, 256)),
    "another table": b"<users>",
}


@pytest.mark.parametrize("more", AFTERWARDS.values(), ids=AFTERWARDS)
def test_what_follows_the_end_of_the_table_is_in_quarantine(site, more):
    data = posts(GOOD, tail=b"</posts>\r\n" + more)
    seen = look(site, site.write(data))
    untouched(seen)
    assert 901 not in seen.answers
    assert (seen.rows["read"], seen.rows["quarantined"], seen.card["incomplete"]) == (14, 1, False)
    (bad,) = seen.quarantine
    stands_in(data, bad)
    assert bad["raw"] == more


def test_two_tables_one_after_the_other_are_not_read_as_one(site):
    """`cat a.xml b.xml`: ids of two dumps collide, so nothing of the second is believed, and its rows are counted."""
    first, second = posts(BEFORE) + END, posts(AFTER)
    path = site.write(first + second)
    seen = look(site, path)
    untouched(seen, (10, 20))
    assert not {30, 40} & set(seen.questions)
    kept = b"".join(bad["raw"] for bad in seen.quarantine)
    assert all(row in kept for row in AFTER)
    assert seen.rows["quarantined"] >= 6
    refused(site, path, says="could not be read", max_quarantine=0.001)


def test_nulls_instead_of_the_end_are_a_cut(site):
    path = site.write(posts(GOOD, tail=b"\0" * 5000))
    refused(site, path, says="cut")
    seen = look(site, path, allow_incomplete=True)
    untouched(seen)
    assert seen.card["incomplete"] is True


ENTITIES = {
    "billion laughs": b'<!DOCTYPE posts [ <!ENTITY lol "lol"> <!ENTITY lol2 "&lol;&lol;"> <!ENTITY lol3 "&lol2;&lol2;"> ]>\r\n',
    "a file": b'<!DOCTYPE posts [ <!ENTITY lol3 SYSTEM "file:///etc/passwd"> ]>\r\n',
    "an address": b'<!DOCTYPE posts [ <!ENTITY lol3 SYSTEM "http://127.0.0.1:9/x"> ]>\r\n',
    "a parameter": b'<!DOCTYPE posts [ <!ENTITY % a SYSTEM "file:///etc/passwd"> %a; ]>\r\n',
    "a bracket to hide behind": b'<!DOCTYPE posts [ <!ELEMENT row "]>"> <!ENTITY lol3 "x"> ]>\r\n',
}


@pytest.mark.parametrize("doctype", ENTITIES.values(), ids=ENTITIES)
def test_declared_entities_are_refused(site, doctype):
    rows = [*GOOD, ask(900, title=b"a&lol3;b"), reply(901, 900)]
    refused(site, site.write(posts(rows, head=DECLARATION + doctype)), says="entities")


def test_no_entity_is_ever_expanded(site):
    """Without a declaration too: what looks like one is kept as it stands."""
    seen, _ = among(site, ask(900, title=b"&lol; &xxe; %a;"), reply(901, 900))
    assert seen.questions[900]["title"] == "&lol; &xxe; %a;"
    for path in seen.out.rglob("*"):
        assert not path.is_file() or b"root:x:0:0" not in path.read_bytes()


@pytest.mark.parametrize("end", [b"\r\n", b"\n", b"\n\n", b""], ids=["CRLF", "LF", "blank lines between", "no line ends at all"])
def test_line_ends(site, end):
    seen = look(site, site.write(posts([*GOOD, *group(900)], end=end)))
    untouched(seen, (10, 20, 30, 40, 900))
    assert (seen.rows["read"], seen.rows["repaired"], seen.rows["quarantined"]) == (16, 0, 0)


def test_carriage_returns_alone_end_lines_as_xml_says(site):
    odd = plain(body=b"1 < 2")
    data = posts([*BEFORE, odd, *AFTER], end=b"\r", head=BOM + DECLARATION.replace(b"\r\n", b"\r"))
    seen = look(site, site.write(data))
    untouched(seen)
    (bad,) = seen.quarantine
    assert (bad["offset"], bad["raw"], seen.rows["read"]) == (data.index(odd), odd, 14)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("mark", [True, False], ids=["with a mark", "without a mark"])
def test_utf_16(site, encoding, mark):
    odd = plain(body=b"1 < 2")
    rows = [*BEFORE, odd, ask(900, title="café 😀".encode()), reply(901, 900), *AFTER]
    text = posts(rows, head=DECLARATION.replace(b"utf-8", b"utf-16")).decode()
    seen = look(site, site.write("\ufeff".encode(encoding) * mark + text.encode(encoding)))
    untouched(seen)
    assert seen.questions[900]["title"] == "café 😀"
    (bad,) = seen.quarantine
    assert (bad["offset"], bad["line"], bad["raw"]) == (text.encode().index(odd), LINE, odd)  # in the file as UTF-8
    assert (seen.rows["read"], seen.rows["repaired"]) == (16, 0)


def test_half_a_surrogate_pair_in_utf_16_is_not_altered_in_silence(site):
    text = posts([*BEFORE, ask(900, title=b"a@b"), reply(901, 900), *AFTER], head=b"").decode()
    data = codecs.BOM_UTF16_LE + text.encode("utf-16-le").replace("@".encode("utf-16-le"), b"\x3d\xd8")
    seen = look(site, site.write(data))
    untouched(seen)
    assert seen.rows["read"] == 15
    assert seen.rows["repaired"] + seen.rows["quarantined"] == 1


@pytest.mark.parametrize("encoding", ["iso-8859-1", "windows-1252"])
def test_a_declared_encoding_of_one_byte(site, encoding):
    rows = [*GOOD, ask(900, title="café".encode(encoding)), reply(901, 900)]
    seen = look(site, site.write(posts(rows, head=DECLARATION.replace(b"utf-8", encoding.encode()))))
    untouched(seen)
    assert (seen.questions[900]["title"], seen.rows["repaired"]) == ("café", 0)


def test_a_byte_that_the_declared_encoding_does_not_have_is_not_altered_in_silence(site):
    data = posts([*GOOD, ask(900, title=b"a\x81b"), reply(901, 900)], head=DECLARATION.replace(b"utf-8", b"windows-1252"))
    seen = look(site, site.write(data))
    untouched(seen)
    assert seen.rows["read"] == 15
    assert seen.rows["repaired"] + seen.rows["quarantined"] == 1


REFUSED = {
    "an empty file": (b"", "empty"),
    "blanks alone": (b" \r\n" * 20, "no <posts>"),
    "no rows": (posts([]), "no rows"),
    "an empty root": (BOM + DECLARATION + b"<posts />", "no rows"),
    "only rows of other kinds": (posts([post(1, 5), post(2, 4)]), "nothing to learn|no question"),
    "only answers": (posts([reply(1, 9), reply(2, 9)]), "nothing to learn|no question"),
    "another table": (b"<users>\r\n" + b'<row Id="1" DisplayName="Ann" />\r\n' * 9 + b"</users>", "<users>"),
    "a page of the web": (b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>", "<html>"),
    "JSON": (b'{"items": [{"post_id": 1}]}', "no <posts>"),
    "text": (b"Id,PostTypeId,Body\n1,1,Hello\n" * 20, "no <posts>"),
    "nulls": (b"\0" * 3000, "no <posts>"),
    "noise": (bytes(random.Random(5).choices(range(256), k=3000)), "."),
    "UTF-32": ("\ufeff".encode("utf-32-le") + posts(GOOD, head=b"").decode().encode("utf-32-le"), "UTF-32"),
    "an encoding that nobody has": (posts(GOOD, head=DECLARATION.replace(b"utf-8", b"ebcdic-cp-us")), "ebcdic.*convert"),
    "a 7z archive by another name": (b"7z\xbc\xaf\x27\x1c" + b"\0" * 300, "no <posts>|7z"),
    "gzip by another name": (gzip.compress(posts(GOOD)), "no <posts>|gz"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "no <posts>|LFS"),
}


@pytest.mark.parametrize(("data", "says"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_is_no_dump_is_refused_in_one_line(site, data, says):
    path = site.write(data)
    assert "wood.test" in refused(site, path, says=says)


# ---- cut files


def test_a_dump_that_is_cut_anywhere_keeps_the_rows_before_the_cut(site):
    data = posts([*GOOD, ask(900, title="café".encode()), reply(901, 900, body="Odd 😀.".encode())])
    ends = [data.index(row) + len(row) for row in GOOD] + [data.index(b"\r\n", data.index(b'"900"')), data.rindex(b"/>") + 2]
    places = {
        "in a row": data.index(b'Body="Answer 31') + 9,
        "in a name": data.index(b"<row", data.index(b'Id="31"') + 1) + 9,
        "at the start of a row": data.index(b'<row Id="32"') + 2,
        "between rows": data.index(b'  <row Id="32"'),
        "between the two bytes of a line end": data.index(b'  <row Id="32"') - 1,
        "after a row": data.index(b'  <row Id="32"') - 2,
        "in a row's end": data.index(b'  <row Id="32"') - 3,
        "in a character": data.index("é".encode()) + 1,
        "in a character of four bytes": data.index("😀".encode()) + 3,
        "before the end of the root": data.rindex(b"</posts>"),
        "in the end of the root": data.rindex(b"</posts>") + 4,
        "before the last bracket": len(data) - 1,
    }
    for number, (where, length) in enumerate(places.items()):
        path = site.write(data[:length], f"cut-{number}.test.xml")
        whole = sum(end <= length for end in ends)
        said = refused(site, path, says="cut")
        assert re.search(rf"\b{whole} rows", said), where
        assert "allow_incomplete" in said, where
        seen = look(site, path, allow_incomplete=True)
        assert seen.card["incomplete"] is True, where
        assert (seen.rows["read"], seen.rows["quarantined"]) == (whole, 0), where
        assert seen.rows["questions"] + seen.rows["answers"] == whole, where
        untouched(seen, (10, 20))


def test_a_cut_gzip_keeps_the_rows_before_the_cut(site):
    rows = [row for id in range(10, 9000, 10) for row in group(id)]
    path = site.write(gzip.compress(posts(rows))[:-900], "wood.test.Posts.xml.gz")
    assert "allow_incomplete" in refused(site, path, says="cut")
    seen = look(site, path, allow_incomplete=True)
    assert seen.card["incomplete"] is True
    assert len(rows) * 0.5 < seen.rows["read"] < len(rows)
    assert seen.rows["quarantined"] == 0
    untouched(seen, tuple(sorted(seen.questions))[:-1])


def test_a_cut_zstd_keeps_the_rows_before_the_cut(site):
    rows = [row for id in range(10, 90000, 10) for row in group(id)]
    data = posts(rows)
    packed = b"".join(zstandard.compress(data[at : at + 100_000]) for at in range(0, len(data), 100_000))
    path = site.write(packed[: len(packed) * 3 // 4], "wood.test.xml.zst")
    assert "allow_incomplete" in refused(site, path, says="cut")
    seen = look(site, path, allow_incomplete=True)
    assert seen.card["incomplete"] is True
    assert len(rows) * 0.5 < seen.rows["read"] < len(rows)


@pytest.mark.parametrize("table", ["Users", "PostLinks"])
def test_a_cut_table_beside_the_posts_is_a_cut_dump(site, table):
    row = {"Users": b'<row Id="7" DisplayName="Ann" />', "PostLinks": b'<row Id="1" PostId="1" RelatedPostId="2" LinkTypeId="3" />'}
    site.write(posts(GOOD), "wood.test/Posts.xml")
    site.write(b"<%b>\r\n%b\r\n<row Id=" % (table.lower().encode(), row[table]), f"wood.test/{table}.xml")
    assert table in refused(site, site.tmp / "wood.test", says="cut")
    seen = look(site, site.tmp / "wood.test", allow_incomplete=True)
    assert (seen.card["incomplete"], seen.rows["read"]) == (True, 13)


# ---- quarantine's threshold


def test_quarantine_up_to_the_threshold_is_let_through_and_above_it_stops_the_run(site, monkeypatch):
    odd = plain(body=b"1 < 2")
    rows = [*(row for id in range(10, 3330, 10) for row in group(id)), ask(5), post(9, 5)]  # 332 * 3 + 2 = 998
    one, two = site.write(posts([*rows, ask(6), odd]), "one.test.xml"), site.write(posts([*rows, odd, odd]), "two.test.xml")
    seen = look(site, one, max_quarantine=0.001)
    assert (seen.rows["read"], seen.rows["quarantined"], seen.rows["other"]) == (1000, 1, 1)
    said = refused(site, two, says="could not be read", max_quarantine=0.001)
    for part in ("2 of 1000", "max_quarantine", "two.test.xml", f"byte {two.read_bytes().index(odd)}", "line 1001"):
        assert part in said
    assert look(site, two, max_quarantine=0.002).rows["quarantined"] == 2
    refused(site, one, says="could not be read", max_quarantine=0)
    in_blocks(monkeypatch, 20_000)
    assert refused(site, two, says="could not be read", max_quarantine=0.001) == said


def test_allow_incomplete_does_not_let_bad_rows_through(site):
    data = posts([*BEFORE, plain(body=b"1 < 2"), *AFTER])[:-20]
    refused(site, site.write(data), says="could not be read", allow_incomplete=True, max_quarantine=0.01)


# ---- posts that make no sense


def test_answers_to_nothing_to_themselves_and_to_answers_are_counted_and_are_in_no_question(site):
    odd = [post(901, 2), reply(902, 903), reply(904, 904), reply(905, 11), reply(906, 906), reply(907, ""), reply(908, -1)]
    seen, _ = among(site, *odd)
    assert not {901, 902, 904, 905, 906, 907, 908} & set(seen.answers)
    assert (seen.rows["read"], seen.rows["answers"], seen.rows["quarantined"]) == (20, 15, 0)
    assert seen.card["left_out"]["answers to questions that are not there"] == 7


def test_two_answers_to_each_other_end(site):
    seen, _ = among(site, reply(901, 902), reply(902, 901))
    assert seen.card["left_out"]["answers to questions that are not there"] == 2


@pytest.mark.parametrize("accepted", [999_999, 31, 10, -5, 900], ids=["nowhere", "elsewhere", "a question", "negative", "itself"])
def test_an_accepted_answer_that_is_none_of_the_questions_own_accepts_nothing(site, accepted):
    seen, _ = among(site, ask(900, b'AcceptedAnswerId="%d"' % accepted), reply(901, 900), reply(902, 900, score=b"7"))
    assert not any(a["selected"] for q in seen.questions.values() for a in q["answers"])
    assert len(seen.questions[900]["pairs"]) == 1


def test_a_row_that_stands_there_twice_counts_twice_and_is_one_record(site):
    seen, _ = among(site, *group(900), *group(900))
    untouched(seen, (900,))
    assert (seen.rows["read"], seen.rows["questions"], seen.rows["answers"]) == (19, 7, 12)
    assert seen.card["left_out"]["rows that stood there twice"] == 3


@pytest.mark.parametrize("turn", [1, -1], ids=["older first", "newer first"])
def test_of_two_contents_of_one_id_the_newer_stays_whatever_their_order(site, turn):
    old, new = (b'LastActivityDate="201%d-01-01T00:00:00.000"' % year for year in (6, 7))
    questions = [ask(900, old, title=b"Old?"), ask(900, new, title=b"New?")][::turn]
    answers = [reply(901, 900, old, body=b"Old."), reply(901, 900, new, body=b"New.")][::turn]
    seen, _ = among(site, *questions, *answers, reply(902, 900, score=b"7"))
    assert (seen.questions[900]["title"], seen.answers[901]["text"]) == ("New?", "New.")
    assert seen.card["left_out"]["rows that stood there twice"] == 2


def test_without_dates_the_choice_between_two_contents_depends_on_nothing_else(site):
    rows = [ask(900), reply(902, 900, score=b"7"), *(reply(901, 900, body=b"Text %d." % n) for n in range(4))]
    texts = {among(site, *random.Random(seed).sample(rows, len(rows)))[0].answers[901]["text"] for seed in range(4)}
    assert len(texts) == 1


def test_a_question_and_an_answer_with_one_id_are_both_kept(site):
    seen, _ = among(site, ask(900), reply(900, 900, body=b"Its own twin."), reply(901, 900))
    assert (seen.rows["questions"], seen.rows["answers"]) == (6, 10)
    assert seen.questions[900]["title"] == "Question 900?"


IDS = {"negative": -7, "zero": 0, "the largest real": 999_999_999}


@pytest.mark.parametrize("id", IDS.values(), ids=IDS)
def test_unusual_ids_are_ids(site, id):
    seen, _ = among(site, ask(id), reply(901, id), reply(902, id, score=b"7"))
    assert (seen.questions[id]["title"], len(seen.questions[id]["pairs"])) == (f"Question {id}?", 1)


def test_an_id_with_zeros_before_it_is_the_same_id(site):
    seen, _ = among(site, ask("0900", title=b"Question?"), reply(901, "900"), reply("0902", "00900", score=b"7"))
    assert [a["answer_id"] for a in seen.questions[900]["answers"]] == [901, 902]


def test_fabricated_rows_of_june_2025_are_counted_and_left_out(site):
    odd = [
        ask(1_000_000_001, b'OwnerUserId="-1"', body=b"&lt;script&gt;trap()&lt;/script&gt;"),
        reply(1_000_000_010, 1_000_000_001, b'OwnerUserId="-1"'),
        reply(1_000_000_011, 10),
        post(1_000_000_012, 2),
        reply(901, 1_000_000_001),
        ask(10**17),
    ]
    seen, _ = among(site, *odd)
    assert (seen.rows["read"], seen.rows["other"], seen.rows["answers"]) == (19, 5, 9)
    assert seen.card["left_out"]["other: fabricated"] == 5
    assert max(seen.questions) < 10**9
    assert max(seen.answers) < 10**9


@pytest.mark.parametrize("kind", [0, 3, 4, 5, 6, 7, 8, 17, 99, -1])
def test_posts_of_other_kinds_are_counted_by_kind(site, kind):
    seen, _ = among(site, post(901, kind), b'<row Id="902" PostTypeId="%d" />' % kind)
    assert (seen.rows["read"], seen.rows["other"], seen.rows["quarantined"]) == (15, 2, 0)
    (counted,) = [count for name, count in seen.card["left_out"].items() if name.startswith("other: ") and count]
    assert counted == 2


def test_a_kind_with_a_zero_before_it_is_not_lost_among_the_others(site):
    seen, _ = among(site, reply(901, 50).replace(b'PostTypeId="2"', b'PostTypeId="02"'))
    assert 901 in seen.answers or seen.rows["quarantined"] == 1


TAGS = {
    "in brackets": (b"&lt;c++&gt;&lt;.net-4.5&gt;", ["c++", ".net-4.5"]),
    "in bars": (b"|c++|.net-4.5|", ["c++", ".net-4.5"]),
    "one": (b"&lt;oil&gt;", ["oil"]),
    "empty": (b"", []),
    "of another alphabet": ("|дерево|木|".encode(), ["дерево", "木"]),
}


@pytest.mark.parametrize(("raw", "tags"), TAGS.values(), ids=TAGS)
def test_tags_of_every_style(site, raw, tags):
    seen, _ = among(site, ask(900, b'Tags="%b"' % raw), reply(901, 900))
    assert seen.questions[900]["tags"] == tags


def test_a_question_without_a_title_is_its_body(site):
    seen, _ = among(site, post(900, 1, body=b"Only a body."), reply(901, 900), ask(910, title=b"  "), reply(911, 910))
    assert (seen.questions[900]["title"], seen.questions[900]["question"]) == ("", "Only a body.")
    assert (seen.questions[910]["title"], seen.questions[910]["question"]) == ("", "Text.")


def test_bodies_without_text_are_counted_and_a_picture_is_a_text(site):
    picture = b"&lt;p&gt;&lt;img src=&quot;https://i.test/a.png&quot; alt=&quot;a saw&quot;&gt;&lt;/p&gt;"
    empty = [b"", b" ", b"&lt;p&gt;&lt;/p&gt;", b"&#xA;&#xD;", b"&lt;!-- nothing --&gt;"]
    odd = [ask(900, body=picture), reply(901, 900, body=picture), *(reply(910 + n, 900, body=one) for n, one in enumerate(empty))]
    seen, _ = among(site, *odd, ask(930, title=b"", body=b""), reply(931, 930), ask(940, body=b""), reply(941, 940))
    assert "https://i.test/a.png" in seen.answers[901]["text"]
    assert seen.questions[900]["question"].startswith("Question 900?\n\n![a saw]")
    assert [a["answer_id"] for a in seen.questions[900]["answers"]] == [901]
    assert seen.questions[940]["question"] == "Question 940?"
    left = seen.card["left_out"]
    assert (left["answers without text"], left["questions without text"], 930 in seen.questions) == (5, 1, False)


def test_deleted_authors_keep_the_name_in_the_row(site):
    odd = [
        ask(900, b'OwnerDisplayName="gone"'),
        reply(901, 900, b'OwnerUserId="-1"'),
        reply(902, 900, b'OwnerUserId=""'),
        reply(903, 900, b'OwnerUserId="77" OwnerDisplayName="user77"'),
    ]
    seen, _ = among(site, *odd)
    assert (seen.questions[900]["author"], seen.questions[900]["author_id"]) == ("gone", None)
    assert [(seen.answers[id]["author"], seen.answers[id]["author_id"]) for id in (901, 902, 903)] == [
        (None, -1),
        (None, None),
        ("user77", 77),
    ]


def test_a_day_of_activity_that_no_calendar_has_is_treated_alike_whatever_stands_before_it(site):
    odd = reply(901, 50, b'LastActivityDate="2015-02-30T00:00:00.000"')
    late = ask(900, b'LastActivityDate="2019-01-01T00:00:00.000"')
    first, _ = among(site, odd, late, reply(902, 900))
    second, _ = among(site, late, reply(902, 900), odd)
    assert first.rows == second.rows
    assert (901 in first.answers) == (901 in second.answers)


def test_one_text_in_two_spellings_is_one_cluster(site):
    """`&#39;` and `'` are the same text, so the two questions must not stand on both sides of a split."""
    one = [ask(900, title=b"It's &lt;one&gt; text"), reply(901, 900), reply(902, 900, score=b"7")]
    two = [ask(910, title=b"It&#39;s &#60;one> text"), reply(911, 910), reply(912, 910, score=b"7")]
    seen, _ = among(site, *one, *two)
    assert seen.questions[900]["question"] == seen.questions[910]["question"]
    assert seen.questions[910]["cluster"] == 900


# ---- the other tables


def with_tables(site: Any, users: bytes | None = None, links: bytes | None = None, rows: list[bytes] = GOOD) -> Path:
    folder = site.write(posts(rows), "wood.test/Posts.xml").parent
    for name, table in (("Users", users), ("PostLinks", links)):
        if table is not None:
            site.write(b"<%b>\r\n%b</%b>" % (name.lower().encode(), table, name.lower().encode()), f"wood.test/{name}.xml")
    return folder


def test_a_damaged_row_of_users_costs_a_name_and_is_in_quarantine(site):
    users = b'<row Id="1" DisplayName="A < B" />\r\n<row Id="2" DisplayName="Cy" />\r\n<row Id="2x" DisplayName="No" />\r\n'
    rows = [ask(900, b'OwnerUserId="1"'), reply(901, 900, b'OwnerUserId="2"'), *GOOD]
    folder = with_tables(site, users + b'<row Id="3" DisplayName="AT&T" />\r\n', rows=rows)
    seen = look(site, folder)
    untouched(seen)
    assert (seen.questions[900]["author"], seen.answers[901]["author"]) == (None, "Cy")
    assert [(bad["file"], bad["line"]) for bad in seen.quarantine] == [("Users.xml", 2), ("Users.xml", 4)]
    for bad in seen.quarantine:
        stands_in((folder / "Users.xml").read_bytes(), bad)
    assert seen.rows["read"] == 15  # of the posts
    table = seen.card["sites"]["wood.test"]["tables"]["users"]
    assert (table["rows"], table["quarantined"], table["repaired"]) == (4, 2, 1)
    refused(site, folder, says="Users.xml: 2 of 4 rows could not be read", max_quarantine=0.4)


def test_names_that_are_odd_stay_one_line(site):
    users = b'<row Id="1" DisplayName="  Ann&#xA;  B&#x9;C " />\r\n<row Id="2" DisplayName="" />\r\n<row Id="5" />\r\n'
    rows = [ask(900, b'OwnerUserId="1"'), reply(901, 900, b'OwnerUserId="2"'), reply(902, 900, b'OwnerUserId="5"'), *GOOD]
    seen = look(site, with_tables(site, users, rows=rows))
    assert (seen.questions[900]["author"], seen.answers[901]["author"], seen.answers[902]["author"]) == ("Ann B C", None, None)


def link(a: int, b: int, kind: int = 3) -> bytes:
    return b'<row Id="1" %b PostId="%d" RelatedPostId="%d" LinkTypeId="%d" />\r\n' % (DAY, a, b, kind)


def test_links_to_nothing_to_themselves_and_in_circles_end_and_join_what_they_join(site):
    links = link(10, 999) + link(20, 20) + link(30, 40) + link(40, 30) + link(-3, -4) + link(999, 998) + link(10, 20, kind=1)
    seen = look(site, with_tables(site, links=links + link(20, 2**60) + link(10, 11)))
    untouched(seen)
    assert {id: q["cluster"] for id, q in seen.questions.items()} == {10: 10, 20: 20, 30: 30, 40: 30}
    assert seen.questions[30]["split"] == seen.questions[40]["split"]


def test_a_damaged_link_is_in_quarantine_and_joins_nothing(site):
    links = b'<row Id="1" PostId="10" RelatedPostId="twenty" LinkTypeId="3" />\r\n<row Id="2" PostId="30" LinkTypeId="3" />\r\n'
    seen = look(site, with_tables(site, links=links + link(30, 40)))
    untouched(seen)
    assert [(bad["file"], bad["line"]) for bad in seen.quarantine] == [("PostLinks.xml", 2), ("PostLinks.xml", 3)]
    assert {id: q["cluster"] for id, q in seen.questions.items()} == {10: 10, 20: 20, 30: 30, 40: 30}


def test_a_table_of_another_kind_in_the_place_of_users_is_refused(site):
    site.write(posts(GOOD), "wood.test/Posts.xml")
    site.write(posts(GOOD), "wood.test/Users.xml")
    refused(site, site.tmp / "wood.test", says=r"Users\.xml.*<posts>")


# ---- archives


def pack(path: Path, members: dict[str, bytes], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with py7zr.SevenZipFile(path, "w", **options) as archive:
        for name, data in members.items():
            archive.writef(io.BytesIO(data), name)
    return path


USERS = b'<users>\r\n<row Id="7" DisplayName="Ann" />\r\n</users>'


@pytest.mark.parametrize("name", ["posts.xml", "POSTS.XML", "wood.test/Posts.xml", "a/b/posts.xml"])
def test_members_in_lower_case_or_in_a_folder_are_found_and_named(site, name):
    odd = plain(body=b"1 < 2")
    data = posts([*BEFORE, odd, *AFTER])
    members = {"Badges.xml": b"<badges />", name: data, name.lower().replace("posts", "users"): USERS}
    seen = look(site, pack(site.tmp / "wood.test.7z", members))
    untouched(seen)
    (bad,) = seen.quarantine
    assert bad["file"] == f"wood.test.7z/{name}"
    stands_in(data, bad)


TRAVERSAL = ["../Posts.xml", "a/../../Posts.xml", "/etc/Posts.xml", "C:/Posts.xml", "..\\Posts.xml"]


@pytest.mark.parametrize("name", TRAVERSAL)
def test_archives_that_leave_their_folder_are_refused(site, name):
    path = site.tmp / "in" / "wood.test.7z"
    path.parent.mkdir()
    with py7zr.SevenZipFile(path, "w") as archive:
        archive.writef(io.BytesIO(posts(GOOD)), "Posts.xml")
        archive.header.files_info.files[-1]["filename"] = name
    refused(site, path, says="leaves the folder")
    assert [entry.name for entry in path.parent.iterdir()] == ["wood.test.7z"]


def test_a_bomb_is_refused(site):
    bomb = zstandard.compress(b"<posts>" + b" " * 70_000_000)
    assert len(bomb) < 100_000
    refused(site, site.write(bomb, "wood.test.xml.zst"), says="unpack to.*refused")


def test_a_link_in_an_archive_is_refused(site):
    (site.tmp / "Posts.xml").symlink_to("/etc/passwd")
    with py7zr.SevenZipFile(site.tmp / "wood.test.7z", "w") as archive:
        archive.write(site.tmp / "Posts.xml", "Posts.xml")
    refused(site, site.tmp / "wood.test.7z", says="link")


@pytest.mark.parametrize("options", [{}, {"header_encryption": True}], ids=["its content", "its names too"])
def test_an_encrypted_archive_is_named_so(site, options):
    path = pack(site.tmp / "wood.test.7z", {"Posts.xml": posts(GOOD)}, password="secret", **options)
    refused(site, path, says="encrypted")


def spoilt(packed: bytes) -> bytes:
    return packed[:100] + b"\xff" * 40 + packed[140:]


ARCHIVES = {
    "one volume of several": ("wood.test.7z.001", b"7z\xbc\xaf\x27\x1c" + b"\0" * 99, "volume|corrupt"),
    "a zip": ("wood.test.zip", b"PK\3\4" + b"\0" * 99, "not supported"),
    "a tar": ("wood.test.tar.gz", gzip.compress(b"\0" * 999), "not supported"),
    "text by the name of an archive": ("wood.test.7z", b"not an archive", "corrupt or cut"),
    "an archive of nothing": ("wood.test.7z", b"7z\xbc\xaf\x27\x1c\0\4" + b"\0" * 24, "corrupt|no Posts"),
    "gzip that is none": ("wood.test.xml.gz", b"hello", "corrupt"),
    "an empty gzip": ("wood.test.xml.gz", b"", "empty|corrupt"),
    "gzip of nothing": ("wood.test.xml.gz", gzip.compress(b""), "no <posts>|empty"),
    "gzip whose checksum is wrong": ("wood.test.xml.gz", gzip.compress(posts(GOOD))[:-8] + b"\1\2\3\4\5\6\7\0", "corrupt"),
    "gzip with garbage in the middle": (
        "wood.test.xml.gz",
        spoilt(gzip.compress(posts(GOOD))),
        "corrupt|cut",
    ),
    "zstd that is none": ("wood.test.xml.zst", b"hello", "corrupt"),
    "zstd with garbage in the middle": (
        "wood.test.xml.zst",
        spoilt(zstandard.ZstdCompressor(write_checksum=True).compress(posts(GOOD))),
        "corrupt|cut",
    ),
}


def test_volumes_of_an_archive_are_read_as_one_and_a_missing_one_is_noticed(site):
    whole = pack(site.tmp / "whole" / "wood.test.7z", {"Posts.xml": WHOLE}).read_bytes()
    first, _ = site.write(whole[:1000], "in/wood.test.7z.001"), site.write(whole[1000:], "in/wood.test.7z.002")
    assert digests(look(site, first).out) == as_written(site)
    refused(site, site.write(whole[:1000], "alone/wood.test.7z.001"), says="volume|corrupt or cut")


@pytest.mark.parametrize(("name", "data", "says"), ARCHIVES.values(), ids=ARCHIVES)
def test_a_package_that_cannot_be_read_is_refused_in_one_line(site, name, data, says):
    assert name.split(".")[0] in refused(site, site.write(data, name), says=says)


def test_an_archive_that_is_cut_or_damaged_anywhere_is_refused(site):
    noise = bytes(random.Random(2).choices(b"abcdefghijklmnopqrstuvwxyz ", k=3000))
    whole = pack(site.tmp / "wood.test.7z", {"Posts.xml": posts([*GOOD, ask(900, body=noise)])}).read_bytes()
    for length in (10, 40, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        refused(site, site.write(whole[:length], "wood.test.7z"), says="corrupt or cut|no Posts|empty")
    for at in (len(whole) // 4, len(whole) // 2, len(whole) - 20):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        refused(site, site.write(bytes(damaged), "wood.test.7z"), says="corrupt or cut|no Posts|not supported|unpack to")


MEMBERS = {
    "no table of posts": ({"Badges.xml": b"<badges />"}, "no Posts.xml"),
    "nothing": ({}, "no Posts.xml|corrupt"),
    "another archive": ({"wood.test.7z": b"7z\xbc\xaf"}, "unpack it"),
    "two tables of posts": ({"a/Posts.xml": posts(GOOD), "b/Posts.xml": posts(GOOD)}, "a/Posts.xml and b/Posts.xml"),
    "an empty table": ({"Posts.xml": b"", "Users.xml": USERS}, "no <posts>|empty"),
    "a table of no rows": ({"Posts.xml": posts([])}, "no rows"),
    "a table that is cut": ({"Posts.xml": posts(GOOD)[:-30]}, "cut.*allow_incomplete"),
}


@pytest.mark.parametrize(("members", "says"), MEMBERS.values(), ids=MEMBERS)
def test_an_archive_without_one_whole_table_of_posts_is_refused(site, members, says):
    refused(site, pack(site.tmp / "wood.test.7z", members), says=says)


# ---- the same rows in other clothes


def digests(out: Path) -> dict[str, str]:
    tables = [*out.glob("questions/**/*.parquet"), *out.glob("pairs/**/*.parquet")]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(tables)}


RICH = [
    *(row for id in range(10, 400, 10) for row in group(id)),
    ask(
        500,
        b'OwnerUserId="7"',
        title="É 😀 &amp; &lt;b&gt;".encode(),
        body=b"&lt;pre&gt;&lt;code&gt;a&#xA; b&lt;/code&gt;&lt;/pre&gt;",
    ),
    reply(501, 500, b'OwnerDisplayName="gone"', body=b"say &quot;hi&quot; it's"),
    reply(502, 500, score=b"-3", body=b"1 &lt; 2 &amp;amp; 3"),
    ask(510, title=b"Question 20?"),
    reply(511, 510, score=b"4"),
    reply(512, 510, score=b"40"),
    post(520, 5),
    reply(530, 999),
]
WHOLE = posts(RICH)


def single_quoted(row: bytes) -> bytes:
    return re.sub(rb'="([^"]*)"', lambda match: b"='" + match[1].replace(b"'", b"&#39;") + b"'", row)


def turned_round(row: bytes) -> bytes:
    return b"<row " + b" ".join(reversed(re.findall(rb'[A-Za-z]+="[^"]*"', row))) + b" />"


CLOTHES: dict[str, tuple[str, bytes]] = {
    "shuffled": ("wood.test.xml", posts(random.Random(4).sample(RICH, len(RICH)))),
    "backwards": ("wood.test.xml", posts(RICH[::-1])),
    "LF": ("wood.test.xml", WHOLE.replace(b"\r\n", b"\n")),
    "no mark and no declaration": ("wood.test.xml", WHOLE[len(BOM + DECLARATION) :]),
    "on one line": ("wood.test.xml", posts(RICH, end=b"")),
    "gz": ("wood.test.xml.gz", gzip.compress(WHOLE)),
    "gz in two parts": ("wood.test.Posts.xml.gz", gzip.compress(WHOLE[:999]) + gzip.compress(WHOLE[999:])),
    "zst": ("wood.test.xml.zst", zstandard.compress(WHOLE)),
    "UTF-16 with a mark": ("wood.test.xml", WHOLE[3:].replace(b"utf-8", b"utf-16").decode().encode("utf-16")),
    "UTF-16 without a mark": ("wood.test.xml", WHOLE[3:].replace(b"utf-8", b"utf-16").decode().encode("utf-16-be")),
    "single quotes": ("wood.test.xml", posts([single_quoted(row) for row in RICH])),
    "attributes turned round": ("wood.test.xml", posts([turned_round(row) for row in RICH])),
    "an end tag each": ("wood.test.xml", posts([row.replace(b" />", b"></row>") for row in RICH])),
    "attributes of a future dump": ("wood.test.xml", posts([row.replace(b" />", b' Sentiment="1" />') for row in RICH])),
    "a row over many lines": ("wood.test.xml", posts([row.replace(b'" ', b'"\r\n    ') for row in RICH])),
    "a folder": ("wood.test/Posts.xml", WHOLE),
    "with damaged rows between": ("wood.test.xml", posts([one for row in RICH for one in (row, b"<row Id= />")])),
}


def as_written(site: Any) -> dict[str, str]:
    """The records of the rows as dumps write them."""
    seen = look(site, site.write(WHOLE, "as-written/wood.test.xml"))
    assert (seen.rows["read"], len(seen.questions)) == (len(RICH), 41)
    return digests(seen.out)


@pytest.mark.parametrize(("name", "data"), CLOTHES.values(), ids=CLOTHES)
def test_the_same_rows_give_the_same_records_to_the_byte(site, name, data):
    path = site.write(data, name)
    seen = look(site, path.parent if name.endswith("Posts.xml") else path)
    assert digests(seen.out) == as_written(site)


@pytest.mark.parametrize(("name", "data"), CLOTHES.values(), ids=CLOTHES)
def test_the_same_rows_give_the_same_records_when_they_are_read_in_blocks(site, monkeypatch, name, data):
    expected = as_written(site)
    in_blocks(monkeypatch, 1500)
    path = site.write(data, name)
    assert digests(look(site, path.parent if name.endswith("Posts.xml") else path).out) == expected


def test_where_blocks_end_is_not_to_be_seen(site, monkeypatch):
    """Every fault above in one file, cut at ever other places: the same records, the same quarantine, the same counts."""
    bodies = [reply(2000 + n, 50, body=raw) for n, (raw, _) in enumerate([*REPAIRED.values(), *LEGAL.values()])]
    odd = [*bodies, *(row for row, _ in DAMAGED.values())]
    closed = [row for row in odd if row.endswith((b"/>", b"</row>"))]  # after others a block may not end, and the file is one piece
    files = {
        "closed": posts([*GOOD, *(one for n, row in enumerate(closed) for one in (row, reply(6000 + n, 50)))]),
        "open": posts([*GOOD, *(one for n, row in enumerate(odd) if row not in closed for one in (row, *group(5000 + 10 * n)))]),
        "written": posts([one for n, row in enumerate(WRITTEN.values()) for one in (row, *group(5000 + 10 * n))]),
        "after the end": posts([*GOOD, *odd], tail=b"</posts>\r\n" + b"\r\n".join(GOOD) + b"\r\n"),
    }
    for name, data in files.items():
        path = site.write(data, f"{name.replace(' ', '-')}.test.xml")
        whole = look(site, path)
        for bad in whole.quarantine:
            stands_in(data, bad)
        for size in (700, 3000):
            with monkeypatch.context() as patch:
                in_blocks(patch, size)
                cut = look(site, path)
            assert cut.quarantine == whole.quarantine, (name, size)
            assert {**cut.card, "settings": None} == {**whole.card, "settings": None}, (name, size)
            assert digests(cut.out) == digests(whole.out), (name, size)


def test_an_archive_gives_the_same_records_to_the_byte(site):
    assert digests(look(site, pack(site.tmp / "wood.test.7z", {"Posts.xml": WHOLE})).out) == as_written(site)


# ---- chance


def sealed(number: int) -> int:
    """Five digits of which the last follows from the others: no single wrong, lost or new digit makes one id of another."""
    return number * 10 + sum(map(int, str(number))) % 10


SEALED = [
    row
    for n in range(1001, 1013)
    for row in (
        ask(sealed(n), title=b"Caf\xc3\xa9 %d &amp; more?" % n, body=b"&lt;p&gt;It's %d.&lt;/p&gt;&#xA;" % n),
        reply(sealed(2 * n), sealed(n), score=b"2", body=b"&lt;p&gt;Use oil %d.&lt;/p&gt;" % n),
        reply(sealed(3 * n), sealed(n), score=b"22", body=b"&lt;p&gt;Use wax %d \xf0\x9f\x98\x80.&lt;/p&gt;" % n),
    )
]
SETTINGS = settings(deadline=None, max_examples=30)
SIZES = st.sampled_from([10**6, 3000, 500])  # of blocks: in one piece, in some, about a row each


def records(seen: Seen) -> dict[int, dict[str, Any]]:
    return {id: {name: value for name, value in q.items() if name != "dump_date"} for id, q in seen.questions.items()}


LETTERS = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff") | st.sampled_from("\t\n\r&<>\"';#x")
NAMED = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&apos;"}


@st.composite
def spelt(draw: st.DrawFn) -> tuple[str, bytes]:
    """A text, and one of the ways in which XML may write it in an attribute's value."""
    text = draw(st.text(LETTERS, max_size=12))
    ways = [
        draw(
            st.sampled_from(
                [f"&#{ord(letter)};", f"&#x{ord(letter):x};", f"&#x{ord(letter):04X};"]
                + ([letter] if letter not in '&<"\t\n\r' else [])
                + ([NAMED[letter]] if letter in NAMED else [])
            )
        )
        for letter in text
    ]
    return text, "".join(ways).encode()


def test_any_text_in_any_spelling_arrives_as_it_is(site):
    @SETTINGS
    @given(st.lists(spelt(), min_size=1, max_size=20))
    def holds(titles: list[tuple[str, bytes]]) -> None:
        rows = [row for n, (_, raw) in enumerate(titles) for row in (ask(1000 + n, title=raw), reply(3000 + n, 1000 + n))]
        seen, _ = among(site, *rows)
        assert [seen.questions[1000 + n]["title"] for n in range(len(titles))] == [text.strip() for text, _ in titles]
        assert (seen.rows["quarantined"], seen.rows["repaired"]) == (0, 0)

    holds()


@st.composite
def wrong_byte(draw: st.DrawFn, row: bytes) -> bytes:
    """The row with one byte changed, lost or added."""
    at, byte = draw(st.integers(0, len(row) - 1)), bytes([draw(st.integers(0, 255) | st.sampled_from(b"\"'<>&/=! \r\n\0"))])
    return row[:at] + draw(st.sampled_from([byte + row[at + 1 :], byte + row[at:], row[at + 1 :]]))


def test_wrong_bytes_in_some_rows_change_no_other_row(site):
    clean = records(look(site, site.write(posts(SEALED))))
    assert len(clean) == 12

    @SETTINGS
    @given(st.data(), SIZES)
    def holds(data: st.DataObject, size: int) -> None:
        groups = data.draw(st.lists(st.sampled_from(range(12)), min_size=1, max_size=3, unique=True), label="questions hit")
        rows = list(SEALED)
        for place in groups:
            hit = 3 * place + data.draw(st.integers(0, 2), label="row of it")
            rows[hit] = data.draw(wrong_byte(rows[hit]), label="its bytes")
        written = posts(rows)
        with pytest.MonkeyPatch.context() as patch:
            in_blocks(patch, size)
            seen = look(site, site.write(written))
        found = records(seen)
        for place in set(range(12)) - set(groups):
            id = sealed(1001 + place)
            assert found[id] == clean[id]
        # What was added behind a row's end is not of that row: it is counted for itself.
        assert 0 <= seen.rows["read"] - len(SEALED) <= seen.rows["quarantined"] <= len(groups)
        for bad in seen.quarantine:
            stands_in(written, bad)

    holds()


SNIPPETS = [
    b"", b'"', b"<", b"&", b"'", b"\0", b"\xff", b"\r\n", b"/>", b"<!--", b"-->", b"</posts>", b"<posts>", b"<row", b"<row />",
    b"</row>", b"<![CDATA[", b"]]>", b"<?xml ?>", b'<!DOCTYPE x [<!ENTITY a "b">]>', b"&a;", b"&#0;", codecs.BOM_UTF8,
    codecs.BOM_UTF16_LE, b"\xed\xa0\x80", b'" Id="7', b' Id="7"', b"9" * 30, b"\xc3", SEALED[0], b"\r", b"\n" * 5,
]  # fmt: skip


def test_whatever_is_done_to_a_file_it_is_read_and_every_row_is_accounted_for_or_it_is_refused_in_one_line(site):
    whole = posts(SEALED)

    @SETTINGS
    @given(
        st.lists(st.tuples(st.integers(0, len(whole)), st.integers(0, 400), st.sampled_from(SNIPPETS)), min_size=1, max_size=5),
        SIZES,
    )
    @example([(0, len(whole), b"")], 2000)
    @example([(len(BOM + DECLARATION), 7, b"<posts>" + b"<!--" * 3)], 2000)
    def holds(changes: list[tuple[int, int, bytes]], size: int) -> None:
        data = whole
        for at, lost, snippet in changes:
            data = data[:at] + snippet + data[at + lost :]
        path = site.write(data)
        said = ""
        try:
            with pytest.MonkeyPatch.context() as patch:
                in_blocks(patch, size)
                seen = look(site, path, allow_incomplete=True)
            for bad in seen.quarantine:
                stands_in(data, bad)
        except ValueError as error:
            said = str(error)
        assert "wood.test" in said or not said
        assert "\n" not in said

    holds()


def test_a_cut_at_any_byte_keeps_exactly_the_rows_before_it(site):
    whole = posts(SEALED)
    clean = records(look(site, site.write(whole)))
    ends = [whole.index(row) + len(row) for row in SEALED]

    @SETTINGS
    @given(st.integers(ends[2], len(whole) - 1), SIZES)
    def holds(length: int, size: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            in_blocks(patch, size)
            seen = look(site, site.write(whole[:length]), allow_incomplete=True)
        rows = sum(end <= length for end in ends)
        assert (seen.rows["read"], seen.rows["quarantined"], seen.card["incomplete"]) == (rows, 0, True)
        found = records(seen)
        for id in list(clean)[: rows // 3]:
            if id in found and len(found[id]["answers"]) == 2:
                assert found[id] == clean[id]
        assert sum(len(q["answers"]) == 2 for q in found.values()) == rows // 3

    holds()
