"""Find the tables of a dump in the forms that people have them in, and stream them unpacked, never onto the disk.

Places are local files, folders and globs; s3:// objects, folders and globs; https:// files; and bare names of sites, whose
archive is fetched. What is not on this machine is fetched whole into a cache first (see `fetch`), so every `File` is local.
"""

import codecs
import glob
import gzip
import hashlib
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import py7zr
import py7zr.exceptions
import zstandard
from py7zr.io import Py7zIO, WriterFactory

from tasks.ingest import fetch
from tasks.ingest.config import IngestConfig
from tasks.progress import Progress

TABLES = ("posts", "users", "postlinks")
FORMS = "a .7z archive, .xml, .xml.gz, .xml.zst, or a folder that holds them"
CHUNK = 4_000_000  # bytes
MAX_UNPACKED = 10**12  # bytes; stackoverflow's largest table is about 2 * 10^11
MAX_RATIO = 200  # unpacked to packed, beyond RATIO_FROM; dumps have 3 to 10
RATIO_FROM = 64_000_000  # bytes

# `beer.stackexchange.com.Posts.xml.gz`, `Posts.xml`, `stackoverflow.com-Posts.7z`, `stackoverflow.com-Posts.7z.001`
TABLE_FILE = re.compile(
    r"(?:(?P<site>.+)[.-])?(?P<table>posts|users|postlinks)\.(?P<form>xml|xml\.gz|xml\.zst|7z)(?:(?<=7z)\.0*1)?", re.IGNORECASE
)
OTHER_TABLE = re.compile(
    r"(?:.+[.-])?(?:badges|comments|posthistory|tags|votes)\.(?:xml|xml\.gz|xml\.zst|7z(?:\.\d+)?)", re.IGNORECASE
)
ARCHIVE = re.compile(r"(?P<site>.+)\.7z(?:\.0*1)?", re.IGNORECASE)
PLAIN = re.compile(r"(?P<site>.+)\.(?P<form>xml|xml\.gz|xml\.zst)", re.IGNORECASE)
VOLUME = re.compile(r"(?P<whole>.+\.7z)\.(?P<number>\d+)", re.IGNORECASE)
SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
BARE_NAME = re.compile(r"[a-z0-9-]+(?:\.[a-z0-9-]+)*\.[a-z]{2,}", re.IGNORECASE)
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
UNSUPPORTED = (".zip", ".rar", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst")
FILE_ENDINGS = (*UNSUPPORTED, ".7z", ".xml", ".txt", ".md", ".csv", ".json", ".jsonl", ".parquet", ".html", ".part", ".torrent")
SPLIT_SITE = "stackoverflow.com"  # the one site whose public dump is an archive a table


@dataclass(frozen=True)
class File:
    """A file of a dump, on this machine, and the tables in it."""

    path: str
    form: str  # xml, xml.gz, xml.zst or 7z
    tables: dict[str, str]  # table -> member of the archive, or the file's own name
    packed: int  # bytes
    unpacked: int  # bytes of the tables; an estimate for gz, and for zst without a size
    plain: bool = False
    """Neither packed nor in another encoding than UTF-8: any range of its bytes can be read on its own."""

    @property
    def name(self) -> str:
        match = VOLUME.fullmatch(_name(self.path))
        return match["whole"] if match else _name(self.path)


@dataclass(frozen=True)
class Site:
    """A site's name and the files that its tables stand in."""

    name: str
    files: list[File] = field(default_factory=list)

    @property
    def unpacked(self) -> int:
        return sum(file.unpacked for file in self.files)


@dataclass(frozen=True)
class Place:
    """A file that is to be read, before it is fetched."""

    where: str  # a local path, or an address
    given: str  # as the user wrote it
    etag: str | None = None  # of an object in S3
    modified: str | None = None  # of an object in S3: when, as ISO 8601
    optional: bool = False
    """Is it left out where it is not there?"""

    @property
    def remote(self) -> bool:
        return _remote(self.where)

    @property
    def name(self) -> str:
        return fetch.name(self.where) if self.remote else _name(self.where)

    @property
    def folder(self) -> str:
        return fetch.shown(self.where).rsplit("/", 1)[0] if self.remote else str(Path(self.where).parent.resolve())

    @property
    def site(self) -> str:
        """The name that the file, or else its folder, gives the site."""
        match = TABLE_FILE.fullmatch(self.name)
        if match:
            return str(match["site"] or _name(self.folder))
        match = ARCHIVE.fullmatch(self.name) or PLAIN.fullmatch(self.name)
        assert match is not None, "_checked lets no other name through"
        return str(match["site"])

    @property
    def table(self) -> str:
        """The table in the file; posts also where it is an archive of several."""
        match = TABLE_FILE.fullmatch(self.name)
        return match["table"].lower() if match else "posts"


def find(
    dump: tuple[str, ...],
    site: str | None = None,
    *,
    site_names: dict[str, str] | None = None,
    archive: str | None = None,
    progress: Progress | None = None,
) -> list[Site]:
    """The sites in these places, each with its tables; what is elsewhere is fetched. ValueError says what is wrong with a place.

    `site` names the site of one dump, `site_names` those of several: name, path or folder of a file, or the site that its name
    says -> site. `archive` is where the dump of a bare site name is, {site} for the name. `progress` is told of what is fetched.
    """
    names = expand(dump, site, site_names=site_names, archive=archive)
    _one_dump_a_site(list(names), names, site)
    found: dict[str, dict[str, File]] = {}
    folders: dict[str, Place] = {}
    for place, name in names.items():
        try:
            file = open_place(place, progress)
        except fetch.NotThere:
            if not place.optional:
                raise
            if progress:
                progress.note(f"{place.where}: there is no such file, so {name} goes without its table {place.table}")
            continue
        tables = found.setdefault(name, {})
        for table in file.tables:
            if table in tables and tables[table] != file:
                raise ValueError(_twice(name, table, tables[table].path, file.path, site))
            tables[table] = file
        if place.table == "posts":
            folders[name] = place
    for name, tables in found.items():
        for place in beside(folders.get(name)):
            if place.table not in tables:
                file = open_place(place, progress)
                for table in file.tables:
                    tables.setdefault(table, file)
    if not found:
        raise ValueError(f"no Posts table found in {', '.join(dump)}: give {FORMS}")
    sites = []
    for name, tables in sorted(found.items()):
        if "posts" not in tables:
            raise ValueError(f"{next(iter(tables.values())).path}: no Posts table of {name} is given beside it")
        files = {tables[table].path: tables[table] for table in TABLES if table in tables}
        sites.append(Site(name, list(files.values())))
    return sites


def expand(
    dump: tuple[str, ...], site: str | None = None, *, site_names: dict[str, str] | None = None, archive: str | None = None
) -> dict[Place, str]:
    """The files that these places stand for, and the site of each; nothing is fetched or opened. ValueError as in `find`."""
    places: dict[str, Place] = {}
    for given in dump:
        for place in _expand(given, archive or IngestConfig.model_fields["archive"].default):
            _checked(place)
            places.setdefault(place.where if place.remote else os.path.abspath(place.where), place)
    return _named(list(places.values()), site, site_names or {})


def read(file: File, feed: Callable[[str, bytes], Any]) -> str | None:
    """Push the unpacked bytes of the file's tables into feed(table, chunk). Returns why the file ends too early, or None."""
    if file.form == "7z":
        _read_archive(file, feed)
        return None
    (table,) = file.tables
    limit = _Limit(file)

    def push(chunk: bytes) -> None:
        limit.count(len(chunk))
        feed(table, chunk)

    try:
        with open_file(file.path) as raw:
            if file.form == "xml.gz":
                _gunzip(raw, push)
            else:
                take = raw.read
                if file.form == "xml.zst":
                    take = zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(raw, read_across_frames=True).read
                while chunk := take(CHUNK):
                    push(chunk)
    except EOFError:
        return f"{file.name} ends in the middle of its compressed stream"
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise ValueError(f"{file.path}: the file is corrupt ({error}): {_again(file.path)}") from error
    return None


def inside(file: File) -> list[tuple[str, str]]:
    """(table, name to show) of the file's tables; names an archive's member as `beer.7z/Posts.xml`."""
    return [(table, f"{file.name}/{member}" if file.form == "7z" else file.name) for table, member in file.tables.items()]


def open_file(path: str) -> Any:
    """Open a file of a dump for reading; the first of several volumes opens all of them. A context manager."""
    if VOLUME.fullmatch(_name(path)):
        return io.BufferedReader(_Volumes(volumes(path)), CHUNK)
    return Path(path).expanduser().open("rb")


def digest(file: File) -> str | None:
    """sha256 of a file of several volumes, as if it were one; None for others."""
    if not VOLUME.fullmatch(_name(file.path)):
        return None
    content = hashlib.sha256()
    with open_file(file.path) as stream:
        while chunk := stream.read(CHUNK):
            content.update(chunk)
    return content.hexdigest()


# ---- from what the user wrote to files


def _expand(given: str, archive: str) -> list[Place]:
    """The files that a place stands for: itself, the tables and archives in a folder, what a glob matches, a site's archive."""
    scheme = SCHEME.match(given)
    kind = scheme[1].lower() if scheme else ""
    if kind == "s3":
        return _expand_bucket(given)
    if kind in {"http", "https"}:
        path = given.split("?", 1)[0].split("#", 1)[0]
        if "*" in path or path.endswith("/"):
            raise ValueError(f"{fetch.shown(given)}: folders and globs cannot be looked into over {kind}://: name each file")
        fetch.name(given)
        return [Place(given, given)]
    if kind and kind != "file":
        raise ValueError(f"{given}: {kind}:// is not supported: give a local path, s3://, https://, or the name of a site")
    return _expand_local(given[len("file://") :] if kind else given, given, archive)


def _expand_local(text: str, given: str, archive: str) -> list[Place]:
    path = Path(text).expanduser()
    if path.is_dir():
        found = _local(path)
        if not found:
            raise ValueError(f"{given}: no Posts.xml (.gz, .zst) and no .7z archive in this folder")
    elif path.exists():
        found = [str(path)]
    elif glob.has_magic(text):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        # A folder that a glob matches counts only where no file does: `dumps/**` names both a folder and the files in it.
        found = [str(match) for match in matches if match.is_file() and _wanted(match.name)]
        found = found or [file for match in matches if match.is_dir() for file in _local(match)]
        if not found:
            raise fetch.NotThere(f"{given}: nothing matches that is a dump: check --dump; wanted is {FORMS}")
    elif BARE_NAME.fullmatch(text) and not text.lower().endswith(FILE_ENDINGS):
        return _of_site(text.lower(), given, archive)
    else:
        raise fetch.NotThere(f"{given}: no such file or folder: check --dump, or run `stackrlhf simulate` for a dump to try with")
    return [Place(where, given) for where in found]


def _of_site(site: str, given: str, archive: str) -> list[Place]:
    """The public archive of a site, or its three of the one site that has an archive a table."""
    if "{site}" not in archive:
        raise ValueError(f"ingest.archive={archive}: it must hold {{site}}, which stands for the name of the site, here {site}")
    names = [f"{site}-{table}" for table in ("Posts", "Users", "PostLinks")] if site == SPLIT_SITE else [site]
    places = []
    for number, name in enumerate(names):
        where = archive.replace("{site}", name)
        try:
            places += [replace(place, given=given, optional=number > 0) for place in _expand(where, "")]
        except fetch.NotThere as error:
            if not number:
                raise fetch.NotThere(f"{site}: no such file or folder, and where ingest.archive looks is none: {where}") from error
    return places


def _local(folder: Path) -> list[str]:
    """The dumps and tables in a folder."""
    return sorted(str(path) for path in folder.iterdir() if path.is_file() and _wanted(path.name))


def _wanted(name: str) -> bool:
    """Is a file of this name, found in a folder or by a glob, a dump or a table of one?"""
    if OTHER_TABLE.fullmatch(name):
        return False
    plain = PLAIN.fullmatch(name)
    return bool(TABLE_FILE.fullmatch(name) or ARCHIVE.fullmatch(name) or (plain and "." in plain["site"]))


def _expand_bucket(given: str) -> list[Place]:
    address, mark, pin = given.partition("#sha256=")

    def place(about: dict[str, Any]) -> Place:
        return _object(f"s3://{about['name']}", given, about)

    with _asking(address):
        files = fetch.bucket_filesystem()
        try:
            about = files.info(address)
        except FileNotFoundError:
            about = None
        if about and about["type"] == "file":
            return [_object(address + mark + pin, given, about)]
        if about:
            found = [place(entry) for entry in files.ls(address, detail=True) if entry["type"] == "file"]
        elif glob.has_magic(address):
            found = [place(entry) for entry in files.glob(address, detail=True).values() if entry["type"] == "file"]
        else:
            raise fetch.NotThere(f"{address}: there is no such object or folder in S3: check --dump")
    found = sorted((one for one in found if not one.where.endswith("/") and _wanted(one.name)), key=lambda one: one.where)
    if not found:
        raise ValueError(f"{address}: {'no dump in this folder' if about else 'nothing matches that is a dump'}: wanted is {FORMS}")
    return found


def _object(where: str, given: str, about: dict[str, Any]) -> Place:
    modified = about.get("LastModified")
    return Place(where, given, about.get("ETag"), modified.isoformat() if modified is not None else None)


@contextmanager
def _asking(address: str) -> Iterator[None]:
    with fetch.bucket_errors(address, last=True):
        yield


def _checked(place: Place) -> None:
    """ValueError where a file's name already says that it cannot be read, before anything is fetched."""
    name = place.name
    if TABLE_FILE.fullmatch(name) or ARCHIVE.fullmatch(name) or PLAIN.fullmatch(name):
        return
    where = fetch.shown(place.where) if place.remote else place.where
    if volume := VOLUME.fullmatch(name):
        first = f"{volume['whole']}.{'1'.zfill(len(volume['number']))}"
        raise ValueError(f"{where}: one volume of several: give the first one, {first}")
    kind = "a form that is not supported" if name.lower().endswith(UNSUPPORTED) else "not a dump"
    raise ValueError(f"{where}: {kind}: give {FORMS}")


def _named(places: list[Place], site: str | None, site_names: dict[str, str]) -> dict[Place, str]:
    """The site that each file belongs to."""
    if site and site_names:
        raise ValueError("ingest.site and ingest.site_names are both set: the one is for one dump, the other for several")
    used: set[str] = set()
    names = {}
    for place in places:
        names[place] = site or place.site
        local = set() if place.remote else {_absolute(place.given), _absolute(place.where), place.folder}
        for key, name in sorted(site_names.items(), key=lambda item: "/" in item[0]):  # a path says more than a name
            if key in {place.given, place.where, place.folder, place.name, place.site} or _absolute(key) in local:
                names[place] = name
                used.add(key)
    for key in site_names:
        if key not in used:
            listed = ", ".join(sorted({place.name for place in places})[:8])
            raise ValueError(f"ingest.site_names: {key!r} is no dump that was given: name one of {listed}")
    for place, name in names.items():
        if not SITE_NAME.fullmatch(name):
            setting = "ingest.site" if len(places) == 1 else "ingest.site_names"
            raise ValueError(f"{place.name}: {name!r} is no name for a site: set {setting}, such as beer.stackexchange.com")
    return names


def _one_dump_a_site(places: list[Place], names: dict[Place, str], site: str | None) -> None:
    seen: dict[tuple[str, str], Place] = {}
    for place in places:
        other = seen.setdefault((names[place], place.table), place)
        if other is not place:
            raise ValueError(_twice(names[place], place.table, other.where, place.where, site))


def _twice(name: str, table: str, one: str, other: str, site: str | None) -> str:
    remedy = "ingest.site can name one dump only" if site else "give one of them, or name one otherwise in ingest.site_names"
    return f"{other}: {table} of {name} is also in {one}, and ids of two dumps collide: {remedy}"


def open_place(place: Place, progress: Progress | None = None) -> File:
    """The file, on this machine, checked before a byte of it is unpacked."""
    path = str(_fetched(place, progress) if place.remote else place.where)
    if match := TABLE_FILE.fullmatch(place.name):
        table, form = match["table"].lower(), match["form"].lower()
        return _archive(path, table) if form == "7z" else _single(path, table, form)
    if ARCHIVE.fullmatch(place.name):
        return _archive(path, None)
    plain = PLAIN.fullmatch(place.name)
    assert plain is not None, "_checked lets no other name through"
    return _single(path, "posts", plain["form"].lower())


def _fetched(place: Place, progress: Progress | None) -> Path:
    if VOLUME.fullmatch(place.name):
        where = fetch.shown(place.where)
        raise ValueError(f"{where}: one volume of several: fetch all of them, and give the first as a local file")
    return fetch.fetch(place.where, etag=place.etag, progress=progress)


def beside(posts: Place | None) -> Iterator[Place]:
    """Files with the site's other tables, where each table is a file of its own and they stand in one folder."""
    match = posts and TABLE_FILE.fullmatch(posts.name)
    if not posts or not match or posts.where.startswith("http"):
        return
    if posts.remote:
        with _asking(posts.folder):
            entries = fetch.bucket_filesystem().ls(posts.folder, detail=True)
        places = [_object(f"s3://{entry['name']}", posts.given, entry) for entry in entries if entry["type"] == "file"]
    else:
        places = [Place(path, posts.given) for path in _local(Path(posts.folder))]
    for place in sorted(places, key=lambda one: one.where):
        other = TABLE_FILE.fullmatch(place.name)
        if other and other["site"] == match["site"] and place.table != "posts":
            yield place


def _single(path: str, table: str, form: str) -> File:
    packed = _size(path)
    unpacked = packed
    with open_file(path) as raw:
        head = raw.read(200)
        if form == "xml.gz":
            if not head.startswith(b"\x1f\x8b"):
                raise ValueError(f"{path}: the file is corrupt (no gzip header): {_again(path)}")
            unpacked = packed * 5
        elif form == "xml.zst":
            if not head.startswith(b"\x28\xb5\x2f\xfd"):
                raise ValueError(f"{path}: the file is corrupt (no zstd header): {_again(path)}")
            declared = zstandard.frame_content_size(head)
            unpacked = declared if declared > 0 else packed * 5
    if not packed:
        raise ValueError(f"{path}: the file is empty")
    return File(path, form, {table: _name(path)}, packed, unpacked, form == "xml" and _is_utf8(head))


def _is_utf8(head: bytes) -> bool:
    """Do a file's first bytes let it be cut at any end of a line?"""
    if b"\0" in head or head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return False
    declared = re.search(rb"""^\s*<\?xml[^>]*encoding=["']([\w.-]+)["']""", head.removeprefix(codecs.BOM_UTF8))
    return declared is None or declared[1].lower() in {b"utf-8", b"us-ascii", b"ascii"}


def _archive(path: str, table: str | None) -> File:
    """What the archive says it holds, checked before a byte of it is unpacked."""
    with _opened_archive(path) as archive:
        members = archive.list()
        tables: dict[str, Any] = {}
        for member in members:
            if member.filename.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", member.filename) or ":" in member.filename[:3]:
                raise ValueError(f"{path}: the archive names {member.filename!r}, which leaves the folder: refused")
            stem = PurePosixPath(member.filename.replace("\\", "/")).name.lower()
            found = stem.removesuffix(".xml")
            if stem.endswith(".xml") and found in TABLES and not member.is_directory and table in (None, found):
                if found in tables:
                    raise ValueError(
                        f"{path}: the archive holds {tables[found].filename} and {member.filename}: give one site an archive"
                    )
                if member.is_symlink:
                    raise ValueError(f"{path}: {member.filename} is a link in the archive: refused")
                tables[found] = member
        if (table or "posts") not in tables:
            nested = next((m.filename for m in members if m.filename.lower().endswith((".7z", ".zip", ".gz", ".zst"))), None)
            names = ", ".join(archive.namelist()[:6])
            hint = f"it holds {nested}: unpack it and give that" if nested else f"it holds {names or 'nothing'}"
            raise ValueError(f"{path}: no {(table or 'posts').capitalize()}.xml in the archive; {hint}")
        unpacked = sum(member.uncompressed for member in tables.values())
        file = File(path, "7z", {name: member.filename for name, member in tables.items()}, _size(path), unpacked)
        _Limit(file).count(sum(m.uncompressed for m in members))
        return file


@contextmanager
def _opened_archive(path: str, own: list[BaseException] | None = None) -> Iterator[py7zr.SevenZipFile]:
    """Turns what py7zr says of a bad archive into a line for the user; errors in `own` are not the archive's."""
    try:
        # A file object, not a path: py7zr then unpacks in this thread, in order.
        with open_file(path) as raw, py7zr.SevenZipFile(raw) as archive:
            if archive.needs_password():
                raise ValueError(f"{path}: the archive is encrypted: unpack it first")
            yield archive
    except py7zr.exceptions.UnsupportedCompressionMethodError as error:
        raise ValueError(f"{path}: a compression that is not supported ({error}): pack it again with LZMA2") from error
    except Exception as error:  # damaged headers and streams surface as almost anything: LZMAError, struct.error, IndexError, ...
        if error in (own or ()) or isinstance(error, (ValueError, OSError, MemoryError)):
            raise
        raise ValueError(f"{path}: the archive is corrupt or cut ({type(error).__name__}: {error}): {_again(path)}") from error


class _Sink(Py7zIO):
    """What py7zr writes a member into: straight on to the reader."""

    def __init__(self, feed: Callable[[bytes], Any]) -> None:
        self._feed, self._size = feed, 0

    def write(self, s: bytes | bytearray) -> int:
        self._size += len(s)
        if len(s) <= 2 * CHUNK:
            self._feed(bytes(s))
        else:
            with memoryview(s) as view:
                for start in range(0, len(s), CHUNK):
                    self._feed(bytes(view[start : start + CHUNK]))
        return len(s)

    def read(self, size: int | None = None) -> bytes:
        return b""

    def seek(self, offset: int, whence: int = 0) -> int:
        return 0

    def flush(self) -> None: ...

    def size(self) -> int:
        return self._size


class _Sinks(WriterFactory):
    """py7zr asks for members by full path; the last parts of it are the member's name."""

    def __init__(self, file: File, feed: Callable[[str, bytes], Any]) -> None:
        self._feed, self._limit = feed, _Limit(file)
        self.errors: list[BaseException] = []

    def create(self, filename: str) -> Py7zIO:
        member = PurePosixPath(filename).name.lower().removesuffix(".xml")

        def push(chunk: bytes) -> None:
            try:
                self._limit.count(len(chunk))
                self._feed(member, chunk)
            except BaseException as error:
                self.errors.append(error)
                raise

        return _Sink(push)


def _read_archive(file: File, feed: Callable[[str, bytes], Any]) -> None:
    sinks = _Sinks(file, feed)
    with _opened_archive(file.path, sinks.errors) as archive:
        archive.extract(targets=list(file.tables.values()), factory=sinks)


class _Limit:
    """Stops a file that unpacks to more than any dump would."""

    def __init__(self, file: File) -> None:
        self._file, self._seen = file, 0

    def count(self, size: int) -> None:
        self._seen += size
        too_dense = self._seen > RATIO_FROM and self._seen > MAX_RATIO * self._file.packed and self._file.form != "xml"
        if self._seen > MAX_UNPACKED or too_dense:
            raise ValueError(
                f"{self._file.path}: {self._file.packed} bytes unpack to {self._seen} or more, which no dump does: refused; "
                "if it is one all the same, unpack it yourself and give the .xml"
            )


def _gunzip(raw: Any, push: Callable[[bytes], Any]) -> None:
    """All members of a gzip file; EOFError where it is cut, after everything before the cut was pushed."""
    decoder, packed, whole = zlib.decompressobj(31), b"", False
    while True:
        packed = packed or raw.read(CHUNK // 4)
        if whole:
            packed = packed.lstrip(b"\0")  # tapes and some tools pad with zeros
        if not packed:
            break
        if whole:
            decoder, whole = zlib.decompressobj(31), False
        chunk = decoder.decompress(packed, CHUNK)
        packed, whole = (decoder.unused_data, True) if decoder.eof else (decoder.unconsumed_tail, False)
        if chunk:
            push(chunk)
    if not whole:
        if rest := decoder.flush():
            push(rest)
        raise EOFError


class _Volumes(io.RawIOBase):
    """The volumes of an archive, read as one file."""

    def __init__(self, paths: list[Path]) -> None:
        self._files = [path.open("rb") for path in paths]
        self._starts = [0]
        for path in paths:
            self._starts.append(self._starts[-1] + path.stat().st_size)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._starts[-1]}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        number = next((n for n, end in enumerate(self._starts[1:]) if self._at < end), None)
        if number is None:
            return 0
        stream = self._files[number]
        stream.seek(self._at - self._starts[number])
        count = stream.readinto(memoryview(buffer)[: self._starts[number + 1] - self._at])
        self._at += count
        return count

    def close(self) -> None:
        for stream in self._files:
            stream.close()
        super().close()


def volumes(path: str) -> list[Path]:
    """All volumes of the archive whose first one this is."""
    first = Path(path).expanduser()
    match = VOLUME.fullmatch(first.name)
    assert match is not None
    found = {}
    for other in first.parent.iterdir():
        if (same := VOLUME.fullmatch(other.name)) and same["whole"] == match["whole"]:
            found[int(same["number"])] = other
    if missing := sorted({*range(1, max(found) + 1)} - set(found)):
        raise ValueError(f"{path}: volume {missing[0]} of {max(found)} or more is not beside it: fetch it too")
    return [found[number] for number in sorted(found)]


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def _again(path: str) -> str:
    return "delete it, and it is fetched again" if fetch.digest(Path(path)) else "fetch it again"


def _remote(path: str) -> bool:
    return path.startswith(("s3://", "http://", "https://"))


def _size(path: str) -> int:
    return sum(p.stat().st_size for p in (volumes(path) if VOLUME.fullmatch(_name(path)) else [Path(path).expanduser()]))


def _name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]
