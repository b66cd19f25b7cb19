"""The tables of a dump that ingest reads, and what the attributes of a post mean."""

import datetime
import math
import re
from typing import NamedTuple

from tasks.ingest.rows import MOMENT, NUMBER, SMALL_NUMBER, TEXT, Field, Layout

NUMERIC = "a whole number"
POSTS = Layout(
    "posts",
    (
        Field("Id", NUMBER, required=True, what=NUMERIC),
        Field("PostTypeId", SMALL_NUMBER, required=True, what=NUMERIC),
        Field("AcceptedAnswerId", NUMBER, what=NUMERIC),
        Field("ParentId", NUMBER, what=NUMERIC),
        Field("CreationDate", MOMENT, what="a date such as 2014-01-21T20:26:05.383"),
        Field("DeletionDate"),
        Field("Score", SMALL_NUMBER, what=NUMERIC),
        Field("ViewCount", NUMBER, what=NUMERIC),
        Field("Body", TEXT),
        Field("OwnerUserId", NUMBER, what=NUMERIC),
        Field("OwnerDisplayName", TEXT),
        Field("LastEditorUserId"),
        Field("LastEditorDisplayName"),
        Field("LastEditDate"),
        Field("LastActivityDate", MOMENT, what="a date such as 2014-01-21T20:26:05.383"),
        Field("Title", TEXT),
        Field("Tags", TEXT),
        Field("AnswerCount"),
        Field("CommentCount"),
        Field("FavoriteCount"),
        Field("ClosedDate"),
        Field("CommunityOwnedDate"),
        Field("ContentLicense", TEXT),
    ),
)
# The groups of POSTS.strict.
ID, KIND, ACCEPTED, PARENT, CREATED, SCORE, VIEWS, BODY, OWNER, OWNER_NAME, ACTIVE, TITLE, TAGS, LICENCE = range(1, 15)

USERS = Layout(
    "users",
    (
        Field("Id", NUMBER, required=True, what=NUMERIC),
        Field("Reputation"),
        Field("CreationDate"),
        Field("DisplayName", TEXT),
        *map(Field, ("LastAccessDate", "WebsiteUrl", "Location", "AboutMe", "Views", "UpVotes", "DownVotes")),
        *map(Field, ("ProfileImageUrl", "EmailHash", "Age", "AccountId")),
    ),
)
POSTLINKS = Layout(
    "postlinks",
    (
        Field("Id", NUMBER, required=True, what=NUMERIC),
        Field("CreationDate"),
        Field("PostId", NUMBER, required=True, what=NUMERIC),
        Field("RelatedPostId", NUMBER, required=True, what=NUMERIC),
        Field("LinkTypeId", SMALL_NUMBER, required=True, what=NUMERIC),
    ),
)

QUESTION, ANSWER = b"1", b"2"
DUPLICATE_LINK = b"3"
FABRICATED_FROM = 1_000_000_000
"""Post ids from here on are the rows that were slipped into the dumps of June 2025; real ids are below 10^8."""

LICENCE_UNTIL = ((datetime.date(2011, 4, 8), "CC BY-SA 2.5"), (datetime.date(2018, 5, 2), "CC BY-SA 3.0"))
CURRENT_LICENCE = "CC BY-SA 4.0"
LICENCE_URLS = {f"CC BY-SA {v}": f"https://creativecommons.org/licenses/by-sa/{v}/" for v in ("2.5", "3.0", "4.0")}

# Sites whose address is another than their dump's name.
HOSTS = {
    "avp.stackexchange.com": "video.stackexchange.com",
    "beer.stackexchange.com": "alcohol.stackexchange.com",
    "cogsci.stackexchange.com": "psychology.stackexchange.com",
    "health.stackexchange.com": "medicalsciences.stackexchange.com",
    "moderators.stackexchange.com": "communitybuilding.stackexchange.com",
    "programmers.stackexchange.com": "softwareengineering.stackexchange.com",
}


class Post(NamedTuple):
    """A question or an answer, with its body still as HTML."""

    id: int
    created: datetime.datetime
    votes: int
    html: str
    accepted: int | None
    views: int | None
    title: str
    tags: list[str]
    licence: str
    author_id: int | None
    author: str | None
    """The name in the row itself: of authors whose account is gone."""


def parse_post(match: re.Match[bytes]) -> Post:
    """From a row in strict form, as the scanner accepted it."""
    group = match.group
    created = parse_moment(group(CREATED))
    return Post(
        id=int(group(ID)),
        created=created,
        votes=int(group(SCORE)),
        html=unescape(group(BODY)),
        accepted=_number(group(ACCEPTED)),
        views=_number(group(VIEWS)),
        title=unescape(group(TITLE)).strip(),
        tags=split_tags(unescape(group(TAGS))) if group(TAGS) else [],
        licence=unescape(group(LICENCE)) or licence_of(created.date()),
        author_id=_number(group(OWNER)),
        author=unescape(group(OWNER_NAME)) or None,
    )


def _number(value: bytes | None) -> int | None:
    return int(value) if value else None


def parse_moment(value: bytes) -> datetime.datetime:
    """`2014-01-21T20:26:05.383` in UTC; ValueError for a day that no calendar has."""
    return datetime.datetime.fromisoformat((value if value.endswith(b"Z") else value + b"Z").decode())


def unescape(value: bytes | None) -> str:
    """XML's five entities and character references; `&amp;` last, so that what it makes is not read again."""
    if not value:
        return ""
    text = value.decode()
    if "&" not in text:
        return text
    text = text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&#xA;", "\n").replace("&apos;", "'")
    if "&#" in text:
        text = re.sub(r"&#(?:x([0-9a-fA-F]+)|([0-9]+));", lambda m: chr(int(m[1], 16) if m[1] else int(m[2])), text)
    return text.replace("&amp;", "&")


def split_tags(tags: str) -> list[str]:
    """`<a><b>` until 2023, `|a|b|` since 2024."""
    return [tag for tag in re.split(r"[<>|]+", tags) if tag]


def licence_of(day: datetime.date) -> str:
    """What applied to a post of that day, for dumps without ContentLicense (before 2020)."""
    return next((name for until, name in LICENCE_UNTIL if day < until), CURRENT_LICENCE)


def pm_score(votes: int, accepted: bool) -> int:
    """round(log2(1 + votes)), and 1 more for the accepted answer; -1 below zero votes, accepted or not.

    As Askell et al. 2021 (https://arxiv.org/abs/2112.00861), appendix C.1, and the original data set.
    """
    if votes < 0:
        return -1
    return round(math.log2(1 + votes)) + accepted


def host_of(site: str) -> str:
    """Where the site stands on the web today."""
    if site in HOSTS:
        return HOSTS[site]
    name, _, rest = site.partition(".meta.")  # beer.meta.stackexchange.com
    main = HOSTS.get(f"{name}.{rest}")
    return main.replace(".", ".meta.", 1) if rest and main else site
