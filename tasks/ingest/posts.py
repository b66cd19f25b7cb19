"""The tables of a dump that ingest reads, and what the attributes of a post mean."""

import math
import re

import numpy as np

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
# Places in the values of POSTS.
ID, KIND, ACCEPTED, PARENT, CREATED, SCORE, VIEWS, BODY, OWNER, OWNER_NAME, ACTIVE, TITLE, TAGS, LICENCE = range(14)

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

LICENCE_UNTIL = ((b"2011-04-08", "CC BY-SA 2.5"), (b"2018-05-02", "CC BY-SA 3.0"))
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


def moment(value: bytes) -> bytes:
    """A date and time in UTC to the millisecond, such as 2014-01-21T20:26:05.383, from one with or without fractions and Z."""
    text, _, fraction = value.removesuffix(b"Z").partition(b".")
    return text + b"." + fraction[:3].ljust(3, b"0")


_REFERENCE = re.compile(r"&(?:(lt|gt|quot|amp|apos)|#([0-9]+)|#x([0-9a-fA-F]+));")
_NAMED = {"lt": "<", "gt": ">", "quot": '"', "amp": "&", "apos": "'"}


def unescape(value: bytes | None) -> str:
    """XML's five entities and character references; anything else that looks like one stays as it is."""
    if not value:
        return ""
    text = value.decode()
    if "&" not in text:
        return text
    return _REFERENCE.sub(lambda m: _NAMED[m[1]] if m[1] else chr(int(m[2]) if m[2] else int(m[3], 16)), text)


_BETWEEN = b"\x1e"  # no control character is left in a row
_COMMON = ((b"lt;", "<"), (b"gt;", ">"), (b"#xA;", "\n"), (b"quot;", '"'), (b"amp;", "&"), (b"#xD;", "\r"), (b"apos;", "'"))


def unescape_all(values: list[bytes]) -> list[str]:
    """What `unescape` gives for each. numpy reads the frequent references of many values at once, a third as fast alone."""
    if not values:
        return []
    text = np.frombuffer(_BETWEEN.join(values) + b"     ", np.uint8)  # so that every reference has five bytes behind it
    at = np.flatnonzero(text == ord("&"))
    code = (text[at + 1].astype(np.uint32) << 16) | (text[at + 2].astype(np.uint32) << 8) | text[at + 3]
    out, keep = text.copy(), np.ones(len(text), bool)
    keep[-5:] = False
    read = 0
    for reference, character in _COMMON:
        found = at[code == int.from_bytes(reference[:3], "big")]
        for place in range(3, len(reference)):  # `&quo` may be no reference
            found = found[text[found + 1 + place] == reference[place]]
        read += len(found)
        out[found] = ord(character)
        for place in range(len(reference)):
            keep[found + 1 + place] = False
    plain = out[keep].tobytes().split(_BETWEEN)
    if read == len(at):
        return [value.decode() for value in plain]
    rare = re.compile(rb"&(?!(?:lt|gt|#xA|quot|amp|#xD|apos);)")
    return [unescape(value) if rare.search(value) else one.decode() for value, one in zip(values, plain, strict=True)]


def split_tags(tags: bytes) -> list[str]:
    """`<a><b>` until 2023, `|a|b|` since 2024; still escaped."""
    return [tag for tag in re.split(r"[<>|]+", unescape(tags)) if tag] if tags else []


def licence_of(created: bytes) -> str:
    """What applied to a post of that day, for dumps without ContentLicense (before 2020)."""
    return next((name for until, name in LICENCE_UNTIL if created < until), CURRENT_LICENCE)


LOGARITHMS = [round(math.log2(1 + votes)) for votes in range(1000)]


def pm_score(votes: int, accepted: bool) -> int:
    """round(log2(1 + votes)), and 1 more for the accepted answer; -1 below zero votes, accepted or not.

    As Askell et al. 2021 (https://arxiv.org/abs/2112.00861), appendix C.1, and the original data set.
    """
    if votes < 0:
        return -1
    return (LOGARITHMS[votes] if votes < len(LOGARITHMS) else round(math.log2(1 + votes))) + accepted


def host_of(site: str) -> str:
    """Where the site stands on the web today."""
    if site in HOSTS:
        return HOSTS[site]
    name, _, rest = site.partition(".meta.")  # beer.meta.stackexchange.com
    main = HOSTS.get(f"{name}.{rest}")
    return main.replace(".", ".meta.", 1) if rest and main else site
