"""Write a simulated site as a dump: Posts.xml and Users.xml in the exact format of StackExchange's."""

import datetime
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO
from xml.sax.saxutils import quoteattr

from tasks.ingest.config import SimulatedSiteConfig
from tasks.ingest.simulated import writing
from tasks.ingest.simulated.truth import true_reward
from tasks.ingest.simulated.votes import cast_votes

START = datetime.datetime(2021, 1, 4, 8, 0)
SYLLABLES = ("ka", "lo", "mi", "ne", "ru", "sa", "ti", "vo", "be", "du")
ANSWERS = (2, 3, 3, 4, 4, 5)
USERS = 400

Row = dict[str, str]


def write_site(config: SimulatedSiteConfig, path: Path) -> None:
    """Write `path`/Posts.xml and `path`/Users.xml; the same config gives the same bytes."""
    path.mkdir(parents=True, exist_ok=True)
    with (path / "Posts.xml").open("w", encoding="utf-8-sig", newline="") as file:
        _write_table(file, "posts", _posts(config))
    with (path / "Users.xml").open("w", encoding="utf-8-sig", newline="") as file:
        _write_table(file, "users", ({"Id": str(user), "DisplayName": user_name(user)} for user in range(1, USERS + 1)))


def user_name(user: int) -> str:
    """A name that is nobody's."""
    rng = random.Random(user)
    return "".join(rng.choices(SYLLABLES, k=rng.choice((2, 3)))).capitalize()


def _write_table(file: TextIO, table: str, rows: Iterable[Row | str]) -> None:
    file.write(f'<?xml version="1.0" encoding="utf-8"?>\r\n<{table}>\r\n')
    for row in rows:
        file.write(row if isinstance(row, str) else _row(row))
    file.write(f"</{table}>")


def _row(attributes: Row) -> str:
    cells = " ".join(f"{name}={quoteattr(value, {chr(10): '&#xA;', chr(34): '&quot;'})}" for name, value in attributes.items())
    return f"  <row {cells} />\r\n"


def _posts(config: SimulatedSiteConfig) -> Iterator[Row | str]:
    rng = random.Random(config.seed)
    odd = random.Random(f"oddities {config.seed}")  # draws of its own, so that the content is the same without oddities
    post_id, moment = 0, START
    held_back: list[Row] = []  # rows that come at the end of the file
    for number in range(config.questions):
        moment += datetime.timedelta(minutes=rng.randint(20, 600))
        part, sign, attribute, title, body = writing.question(rng)
        answers = [writing.answer(part, sign, attribute, rng) for _ in range(rng.choice(ANSWERS))]
        votes, accepted = cast_votes([true_reward(title, _visible(answer)) for answer in answers], rng)
        post_id += 1
        question_id = post_id
        rows: list[Row] = []
        answered = moment
        for place, (answer, score) in enumerate(zip(answers, votes, strict=True)):
            post_id += 1
            answered += datetime.timedelta(minutes=rng.randint(5, 300))
            owned = _common(answered, score, answer, str(rng.randint(1, USERS)))
            rows.append({"Id": str(post_id), "PostTypeId": "2", "ParentId": str(question_id), **owned})
            if place == accepted:
                accepted_id = post_id
        question = {"Id": str(question_id), "PostTypeId": "1"}
        if accepted is not None:
            question["AcceptedAnswerId"] = str(accepted_id)
        question |= _common(moment, rng.randint(-1, 12), body, str(rng.randint(1, USERS)))
        question |= {
            "ViewCount": str(rng.randint(20, 5000)),
            "Title": title,
            "Tags": f"<{attribute.name}>",
            "AnswerCount": str(len(answers)),
        }
        post_id += 1  # spare: an odd row's id, so that ids are the same with and without oddities
        if config.oddities:
            yield from _with_oddities(question, rows, str(post_id), number % 8, odd, held_back)
        else:
            yield question
            yield from rows
    yield from held_back


def _common(moment: datetime.datetime, score: int, body: str, owner: str) -> Row:
    stamp = moment.isoformat(timespec="milliseconds")
    return {
        "CreationDate": stamp, "Score": str(score), "Body": body, "OwnerUserId": owner,
        "LastActivityDate": stamp, "ContentLicense": "CC BY-SA 4.0",
    }  # fmt: skip


def _visible(body: str) -> str:
    """The body's text as a reader sees it; our own HTML has no entities beyond &amp; &lt; &gt;."""
    return re.sub(r"<[^>]+>", " ", body)


def _with_oddities(
    question: Row, rows: list[Row], spare_id: str, kind: int, rng: random.Random, held_back: list[Row]
) -> Iterator[Row | str]:
    """The same content written as real dumps have it at times; the pairs that come of it stay the same."""
    if kind == 1:  # an answer stands before its question
        yield rows.pop(0)
    elif kind == 2:  # a tag wiki stands between posts
        yield {"Id": spare_id, "PostTypeId": rng.choice(("4", "5")), **_common(START, 0, "<p>About this tag.</p>\n", "1")}
    elif kind == 3:  # the author was deleted: no id, the name stands in the row
        del rows[0]["OwnerUserId"]
        rows[0]["OwnerDisplayName"] = f"user{rng.randint(1000, 9999)}"
    elif kind == 4:  # an answer whose question is not in the file
        yield {"Id": spare_id, "PostTypeId": "2", "ParentId": "900000000", **_common(START, 3, "<p>Lost.</p>\n", "1")}
    elif kind == 5:  # an invalid character reference
        yield _row({"Id": spare_id, "PostTypeId": "6", **_common(START, 0, "<p>bell</p>\n", "1")}).replace("bell", "bell&#xE;")
    elif kind == 6:  # an accepted answer that is not there, Community as an owner, no answer count
        question.setdefault("AcceptedAnswerId", "900000001")
        question["OwnerUserId"] = "-1"
        del question["AnswerCount"]
    elif kind == 7:  # the last answer comes at the end of the file
        held_back.append(rows.pop())
    yield question
    yield from rows
