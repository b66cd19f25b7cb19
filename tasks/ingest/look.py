"""What stands at the places of a dump now: told apart from what stood there before, without fetching or reading a dump.

Several dumps of one site may be there (`dumps/*/beer.stackexchange.com.7z`): the newest counts, by the first of
these that tells them apart: its own newest post, where the dumps are local and small enough to be read in seconds; the last date in
its path (2020-06, 20240402); the time of the file, or what its server says. The time inside an archive is not asked: it is that of
the packing, and old dumps are packed anew.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.ingest import fetch, sources
from tasks.ingest.config import IngestConfig

READ_FOR_ITS_DATE = 500_000_000
"""Bytes of unpacked tables that are read, of all dumps of a site together, to learn which is the newest: some 5 seconds."""
DAY_OF_POST = re.compile(rb'(?:LastActivityDate|CreationDate)="(\d{4}-\d\d-\d\d)')
DATE_IN_NAME = re.compile(r"(?<!\d)((?:19|20)\d\d)[-_.]?(0[1-9]|1[0-2])(?:[-_.]?(0[1-9]|[12]\d|3[01]))?(?!\d)")


@dataclass(frozen=True)
class Standing:
    """One file as it stands at its place."""

    where: str
    """Path or address, without what may be secret in it."""
    site: str
    mark: str | None
    """What differs between two versions: size and time of a local file, ETag in S3, what a server says. None: nothing does."""


@dataclass(frozen=True)
class Look:
    """What there is to read."""

    files: tuple[Standing, ...]
    dump: tuple[str, ...]
    """The places to give to ingest."""
    site_names: dict[str, str]
    """For ingest too, where its configuration has any."""
    passed_over: tuple[str, ...]
    """A line for every older dump of a site that has a newer one."""


def look(config: IngestConfig) -> Look:
    """What stands at `config.dump`. ValueError where nothing does, or where a server does not say."""
    names = sources.expand(config.dump, config.site, site_names=config.site_names, archive=config.archive)
    by_site: dict[str, list[sources.Place]] = {}
    for place, site in names.items():
        by_site.setdefault(site, []).append(place)
    files, dump, passed_over = [], [], []
    for site, places in sorted(by_site.items()):
        chosen, line = _newest(site, places)
        passed_over += [line] if line else []
        posts = next((place for place in chosen if place.table == "posts"), None)
        given = {place.where for place in chosen}
        for place in [*chosen, *(other for other in sources.beside(posts) if other.where not in given)]:
            try:
                files.append(Standing(_shown(place), site, _mark(place)))
            except fetch.NotThere:
                if not place.optional:
                    raise
                continue
            if place.where in given:
                dump.append(place.where)
    site_names = {place.where: site for place, site in names.items() if place.where in dump} if config.site_names else {}
    return Look(tuple(files), tuple(dump), site_names, tuple(passed_over))


def _newest(site: str, places: list[sources.Place]) -> tuple[list[sources.Place], str]:
    """The files of the newest of a site's dumps, and a line about the others."""
    posts = [place for place in places if place.table == "posts"]
    if len(posts) < 2:
        return places, ""
    newest, how, dates = _measured(posts)
    others = ", ".join(f"{_shown(place)} ({dates[place]})" for place in posts if place is not newest)
    line = f"{site}: {_shown(newest)} is the newest ({dates[newest]}, {how}); passed over: {others}"
    return [newest, *(place for place in places if place.table != "posts" and place.folder == newest.folder)], line


def _measured(places: Sequence[sources.Place]) -> tuple[sources.Place, str, dict[sources.Place, str]]:
    """The newest dump, by which measure that is known, and what that says of each."""
    measures: dict[str, Callable[[sources.Place], str | None]] = {
        "its path": _date_in_name,
        "the time of the file": _time_of_file,
    }
    if all(not place.remote for place in places):
        opened = {place: sources.open_place(place) for place in places}
        if sum(file.unpacked for file in opened.values()) <= READ_FOR_ITS_DATE:
            measures = {"its newest post": lambda place: newest_post(opened[place])} | measures
    for how, measure in measures.items():
        dates = {place: date for place in places if (date := measure(place))}
        if len(dates) == len(places) and list(dates.values()).count(max(dates.values())) == 1:
            return max(dates, key=lambda place: dates[place]), how, dates
    shown = ", ".join(_shown(place) for place in places)
    raise ValueError(f"{shown}: dumps of one site, and nothing says which is the newest: put its date into each one's path")


def newest_post(file: sources.File) -> str | None:
    """The day of the last activity in a dump, by reading all of its posts."""
    newest, rest = b"", b""

    def feed(table: str, chunk: bytes) -> None:
        nonlocal newest, rest
        if table == "posts":
            newest = max([newest, *DAY_OF_POST.findall(rest + chunk)])
            rest = chunk[-40:]  # longer than what is looked for, which may be cut here

    cut = sources.read(file, feed)
    if cut:
        raise ValueError(f"{file.path}: {cut}: fetch it again")
    return newest.decode() or None


def _date_in_name(place: sources.Place) -> str | None:
    found = DATE_IN_NAME.findall(_shown(place))
    return "-".join(part for part in found[-1] if part) if found else None


def _time_of_file(place: sources.Place) -> str | None:
    if place.modified:
        return place.modified
    if place.remote:
        modified = fetch.standing(place.where).modified
        return fetch.moment(modified) if modified else None
    return f"{max(path.stat().st_mtime for path in _parts(place)):017.6f}"


def _mark(place: sources.Place) -> str | None:
    if not place.remote:
        return "; ".join(f"{about.st_size} bytes, {about.st_mtime_ns} ns" for about in (path.stat() for path in _parts(place)))
    if place.etag:
        return f"ETag {place.etag}"
    if pin := fetch.pinned(place.where):
        return f"sha256 {pin}"
    if place.where.startswith("s3://"):
        return None
    now = fetch.standing(place.where)
    # With an ETag the date says nothing more, and differs between the servers that share one address.
    told = {"ETag": now.etag, "Last-Modified": None if now.etag else now.modified, "bytes": now.size}
    return ", ".join(f"{name} {value}" for name, value in told.items() if value is not None) or None


def _parts(place: sources.Place) -> list[Path]:
    path = Path(place.where).expanduser()
    return sources.volumes(str(path)) if sources.VOLUME.fullmatch(path.name) else [path]


def _shown(place: sources.Place) -> str:
    return fetch.shown(place.where) if place.remote else str(Path(place.where).expanduser().absolute())
