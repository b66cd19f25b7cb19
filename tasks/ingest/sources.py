"""Find the tables of a dump in the forms that people have them in, and stream them unpacked, never onto the disk."""

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import py7zr
import py7zr.exceptions
import zstandard
from py7zr.io import Py7zIO, WriterFactory

TABLES = ("posts", "users", "postlinks")
FORMS = "a .7z archive, .xml, .xml.gz, .xml.zst, or a folder that holds them"
CHUNK = 1_000_000  # bytes
MAX_UNPACKED = 10**12  # bytes; stackoverflow's largest table is about 2 * 10^11
MAX_RATIO = 200  # unpacked to packed, beyond RATIO_FROM; dumps have 3 to 10
RATIO_FROM = 64_000_000  # bytes

# `beer.stackexchange.com.Posts.xml.gz`, `Posts.xml`, `stackoverflow.com-Posts.7z`
TABLE_FILE = re.compile(r"(?:(?P<site>.+)[.-])?(?P<table>posts|users|postlinks)\.(?P<form>xml|xml\.gz|xml\.zst|7z)", re.IGNORECASE)
OTHER_TABLE = re.compile(r".+-(?:badges|comments|posthistory|tags|votes)\.7z", re.IGNORECASE)
SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
UNSUPPORTED = (".zip", ".rar", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True)
class File:
    """A file of a dump and the tables in it."""

    path: str
    form: str  # xml, xml.gz, xml.zst or 7z
    tables: dict[str, str]  # table -> member of the archive, or the file's own name
    packed: int  # bytes
    unpacked: int  # bytes of the tables; an estimate for gz, and for zst without a size

    @property
    def name(self) -> str:
        return _name(self.path)


@dataclass(frozen=True)
class Site:
    """A site's name and the files that its tables stand in."""

    name: str
    files: list[File] = field(default_factory=list)

    @property
    def unpacked(self) -> int:
        return sum(file.unpacked for file in self.files)


def find(dump: tuple[str, ...], site: str | None = None) -> list[Site]:
    """The sites in these places, each with its tables; ValueError says what is wrong with a place."""
    found: dict[str, dict[str, File]] = {}
    for place in dump:
        for path in _expand(place):
            name, file = _look_at(path)
            tables = found.setdefault(site or name, {})
            for table in file.tables:
                if table in tables and tables[table] != file:
                    raise ValueError(
                        f"{file.path}: {table} of {site or name} is also in {tables[table].path}, and ids of two dumps collide: "
                        + ("ingest.site can name one dump only" if site else "give one of them, or rename one after its site")
                    )
                tables[table] = file
    for tables in found.values():
        for file in _beside(tables.get("posts")):
            for table in file.tables:
                tables.setdefault(table, file)
    if not found:
        raise ValueError(f"no Posts table found in {', '.join(dump)}: give {FORMS}")
    sites = []
    for name, tables in sorted(found.items()):
        if not SITE_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name for a site: set ingest.site, such as beer.stackexchange.com")
        if "posts" not in tables:
            raise ValueError(f"{next(iter(tables.values())).path}: no Posts table of {name} is given beside it")
        files = {tables[table].path: tables[table] for table in TABLES if table in tables}
        sites.append(Site(name, list(files.values())))
    return sites


def read(file: File, feed: Callable[[str, bytes], Any]) -> str | None:
    """Push the unpacked bytes of the file's tables into feed(table, chunk). Returns why the file ends too early, or None."""
    if file.form == "7z":
        _read_archive(file, feed)
        return None
    (table,) = file.tables
    limit = _Limit(file)
    try:
        with _open(file.path) as raw:
            take: Callable[[int], bytes] = raw.read
            if file.form == "xml.gz":
                take = gzip.GzipFile(fileobj=raw).read1  # read() would drop what stands before a cut
            elif file.form == "xml.zst":
                take = zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(raw, read_across_frames=True).read
            while chunk := take(CHUNK):
                limit.count(len(chunk))
                feed(table, chunk)
    except EOFError:
        return f"{file.name} ends in the middle of its compressed stream"
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise ValueError(f"{file.path}: the file is corrupt ({error}): fetch it again") from error
    return None


def inside(file: File) -> list[tuple[str, str]]:
    """(table, name to show) of the file's tables; names an archive's member as `beer.7z/Posts.xml`."""
    return [(table, f"{file.name}/{member}" if file.form == "7z" else file.name) for table, member in file.tables.items()]


def open_file(path: str) -> Any:
    """Open a local path or a URL such as s3://bucket/key for reading; a context manager."""
    return _open(path)


def _expand(place: str) -> list[str]:
    """The files at a place: itself, or the tables and archives in a folder."""
    if not _exists(place):
        raise ValueError(f"{place}: no such file or folder: check --dump, or run `stackrlhf simulate` for a dump to try with")
    if not _is_folder(place):
        return [place]
    names = [path for path in _list(place) if TABLE_FILE.fullmatch(_name(path)) or _name(path).lower().endswith(".7z")]
    names = [path for path in names if not OTHER_TABLE.fullmatch(_name(path))]
    if not names:
        raise ValueError(f"{place}: no Posts.xml (.gz, .zst) and no .7z archive in this folder")
    return names


def _look_at(path: str) -> tuple[str, File]:
    """The site that a file belongs to, and the file."""
    name = _name(path)
    if re.search(r"\.7z\.\d+$", name):
        whole = name.rsplit(".", 1)[0]
        raise ValueError(f"{path}: one volume of several: join them first (cat {whole}.* > {whole})")
    if match := TABLE_FILE.fullmatch(name):
        return match["site"] or _folder_name(path), _table(path, match)
    if name.lower().endswith(".7z"):
        return name[:-3], _archive(path, None)
    plain = re.fullmatch(r"(?P<site>.+)\.(?P<form>xml|xml\.gz|xml\.zst)", name, re.IGNORECASE)
    if plain is None:
        kind = "a form that is not supported" if name.lower().endswith(UNSUPPORTED) else "not a dump"
        raise ValueError(f"{path}: {kind}: give {FORMS}")
    return plain["site"], _single(path, "posts", plain["form"].lower())


def _beside(posts: File | None) -> Iterator[File]:
    """The site's other tables, where each table is a file of its own and they stand in one folder."""
    match = posts and TABLE_FILE.fullmatch(posts.name)
    if not posts or not match:
        return
    for path in _list(posts.path.rsplit("/", 1)[0] if "/" in posts.path else "."):
        other = TABLE_FILE.fullmatch(_name(path))
        if other and other["site"] == match["site"] and other["table"].lower() != "posts":
            yield _table(path, other)


def _table(path: str, match: re.Match[str]) -> File:
    table, form = match["table"].lower(), match["form"].lower()
    return _archive(path, table) if form == "7z" else _single(path, table, form)


def _single(path: str, table: str, form: str) -> File:
    packed = _size(path)
    unpacked = packed
    with _open(path) as raw:
        head = raw.read(64)
        if form == "xml.gz":
            if not head.startswith(b"\x1f\x8b"):
                raise ValueError(f"{path}: the file is corrupt (no gzip header): fetch it again")
            unpacked = packed * 5
        elif form == "xml.zst":
            if not head.startswith(b"\x28\xb5\x2f\xfd"):
                raise ValueError(f"{path}: the file is corrupt (no zstd header): fetch it again")
            declared = zstandard.frame_content_size(head)
            unpacked = declared if declared > 0 else packed * 5
    if not packed:
        raise ValueError(f"{path}: the file is empty")
    return File(path, form, {table: _name(path)}, packed, unpacked)


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
        with _open(path) as raw, py7zr.SevenZipFile(raw) as archive:
            if archive.needs_password():
                raise ValueError(f"{path}: the archive is encrypted: unpack it first")
            yield archive
    except py7zr.exceptions.UnsupportedCompressionMethodError as error:
        raise ValueError(f"{path}: a compression that is not supported ({error}): pack it again with LZMA2") from error
    except Exception as error:  # damaged headers and streams surface as almost anything: LZMAError, struct.error, IndexError, ...
        if error in (own or ()) or isinstance(error, (ValueError, OSError, MemoryError)):
            raise
        raise ValueError(f"{path}: the archive is corrupt or cut ({type(error).__name__}: {error}): fetch it again") from error


class _Sink(Py7zIO):
    """What py7zr writes a member into: straight on to the reader."""

    def __init__(self, feed: Callable[[bytes], Any]) -> None:
        self._feed, self._size = feed, 0

    def write(self, s: bytes | bytearray) -> int:
        self._size += len(s)
        for start in range(0, len(s), CHUNK):
            self._feed(bytes(s[start : start + CHUNK]))
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


def _remote(path: str) -> bool:
    return "://" in path


def _filesystem(path: str) -> Any:
    import fsspec

    return fsspec.core.url_to_fs(path, use_listings_cache=False, skip_instance_cache=True)[0]


def _open(path: str) -> Any:
    if _remote(path):
        return _filesystem(path).open(path, "rb")
    return Path(path).expanduser().open("rb")


def _exists(path: str) -> bool:
    return bool(_filesystem(path).exists(path)) if _remote(path) else Path(path).expanduser().exists()


def _is_folder(path: str) -> bool:
    return bool(_filesystem(path).isdir(path)) if _remote(path) else Path(path).expanduser().is_dir()


def _size(path: str) -> int:
    return int(_filesystem(path).size(path)) if _remote(path) else Path(path).expanduser().stat().st_size


def _list(folder: str) -> list[str]:
    """The files in a folder, sorted."""
    if _remote(folder):
        protocol = folder.split("://", 1)[0]
        found = _filesystem(folder).ls(folder, detail=True)
        return sorted(f"{protocol}://{entry['name']}" for entry in found if entry["type"] == "file")
    return sorted(str(path) for path in Path(folder).expanduser().iterdir() if path.is_file())


def _name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _folder_name(path: str) -> str:
    """The name of the folder that a file stands in."""
    return _name(path.rsplit("/", 1)[0]) if _remote(path) else Path(path).resolve().parent.name
