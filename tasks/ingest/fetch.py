"""Fetch dumps from https:// and s3:// once, into a cache, so that a cut costs little and a wrong byte is seen.

    $STACKRLHF_CACHE, else $XDG_CACHE_HOME/stackrlhf, else ~/.cache/stackrlhf
        <digest of the address>/<name>              the file
        <digest of the address>/<name>.json         its size, time and sha256, and which version the server said it is
        <digest of the address>/<name>.part         what came before a cut;  .part.json: of which version that is
        <digest of the address>/<name>.lock         held while it is fetched; the kernel lets go when a process dies

Files are fetched whole instead of being read where they lie: py7zr has to seek, several workers read several places, and no
checksum is told of a range. What came is checked against every digest that the server gives (and S3's ETag), and against one that
the user pins: `https://…/beer.stackexchange.com.7z#sha256=<64 hex digits>`.

A server is asked once in a process whether it has another version than the one in the cache (If-None-Match, If-Modified-Since);
where it does not answer the cached one is used, with a warning. An object in S3 is fetched again when its ETag changed.
"""

import base64
import binascii
import contextlib
import email.utils
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import random
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tasks.disk import cache_folder
from tasks.progress import Progress

logger = logging.getLogger(__name__)

CHUNK = 4_000_000  # bytes
ASK_AGAIN = 12 * 3600.0  # seconds; a run that reads a dump must not find another one at its end
ASK_TRIES = 2
TRIES = 6  # in a row that bring nothing new
MOST_TRIES = 100
LONGEST_WAIT = 60.0  # seconds between two tries; a server's Retry-After may ask for 300
RETRIED = {408, 425, 429, 500, 502, 503, 504}
PIN = re.compile(r"[?&#]sha256=([^&#]*)")
DIGEST_BYTES = {"md5": 16, "sha1": 20, "sha256": 32, "sha512": 64, "crc32": 4}


class NotThere(ValueError):
    """The server answers, and has no such file."""


class _Broken(Exception):
    """It did not work this time; trying again may. `wait`: seconds that the server asks for; `drop`: what came is useless."""

    def __init__(self, text: str, *, contact: bool = True, wait: float = 0.0, drop: bool = False) -> None:
        super().__init__(text)
        self.contact, self.wait, self.drop = contact, wait, drop


@dataclass
class _Answer:
    """What a server says to a request for the bytes from some place on; the names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    read: Callable[[], bytes]
    close: Callable[[], None] = lambda: None


@dataclass
class _Version:
    """Which version of a file the bytes of a .part belong to."""

    guard: str | None = None
    """For If-Range: a strong ETag, or a date old enough to tell versions apart."""
    etag: str | None = None
    modified: str | None = None
    total: int | None = None  # bytes
    digests: dict[str, str] = field(default_factory=dict)
    """Algorithm -> hexadecimal digest that the server promises."""


@dataclass
class Record:
    """What is known of a file in the cache."""

    address: str
    size: int
    mtime_ns: int
    sha256: str
    etag: str | None
    modified: str | None
    checked: list[str]
    """What the file was compared with when it came: size, and digests by algorithm."""


_asked: dict[str, float] = {}
"""Address -> when (time.monotonic) this process learned that its file in the cache is what the server has."""


@dataclass(frozen=True)
class Standing:
    """What a server says of a file that it has now."""

    etag: str | None
    modified: str | None
    size: int | None  # bytes


def standing(address: str, *, wait: float = 1.0, patience: float = 30.0) -> Standing:
    """Which version of a file an http(s) server has now, asked without fetching it; the next `fetch` asks it too.

    NotThere where it has none; a ValueError says in one line why it cannot be told.
    """
    _, bare = _pin(address)
    name(bare)
    with contextlib.closing(_Web(bare, patience, True)) as server:
        try:
            version = _ask(server, {}, wait)
        except _Broken as error:
            raise ValueError(f"{server.shown}: {error}: check the address and the network, or try again") from error
    _asked.pop(bare, None)
    assert version is not None, "only a conditional request is answered by 304"
    return Standing(version.etag, version.modified, version.total)


def fetch(
    address: str, *, etag: str | None = None, progress: Progress | None = None, wait: float = 1.0, patience: float = 60.0
) -> Path:
    """The file at an https://, http:// or s3:// address, from the cache or fetched into it; whole and checked.

    `etag`: the version that it has now, where that is known; another one in the cache is replaced. `wait`: seconds before the
    second try, doubled for each further one. `patience`: seconds without a byte after which a try is given up. A ValueError says
    in one line what does not work; what came until then stays, and the next call goes on from there.
    """
    pin, address = _pin(address)
    place = cache_folder() / hashlib.sha256(address.encode()).hexdigest()[:20]
    path = place / name(address)
    say = progress.note if progress else lambda _: None
    bucket = address.startswith("s3://")
    kept = _kept(path, pin, etag, say)
    if kept and (pin or bucket or time.monotonic() - _asked.get(address, -ASK_AGAIN) < ASK_AGAIN):
        return path
    server: _Web | _Bucket = _Bucket(address, patience) if bucket else _Web(address, patience, bool(pin))
    with _disk(path), contextlib.closing(server):
        stale = None
        if kept and isinstance(server, _Web):
            stale = _record(path)
            if stale is None or _still(server, stale, say, wait):
                _asked[address] = time.monotonic()
                return path
        place.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f"{path.name}.lock"), say):
            if not _kept(path, pin, etag, say) or _record(path) == stale:  # unless another process, while it had the lock
                _download(server, path, pin, progress, wait)
    _asked[address] = time.monotonic()
    return path


def digest(path: Path) -> str | None:
    """sha256 of a file in the cache, without reading it where nothing has touched it; None for any other file."""
    record = _record(path) if cache_folder() in path.parents else None
    if record is None:
        return None
    about = path.stat()
    return record.sha256 if (about.st_size, about.st_mtime_ns) == (record.size, record.mtime_ns) else None


def name(address: str) -> str:
    """The file's name in an address; the site's name is taken from it."""
    _, address = _pin(address)
    parts = urlsplit(address) if not address.startswith("s3://") else None
    found = unquote(parts.path.rsplit("/", 1)[-1]) if parts else address.rsplit("/", 1)[-1]
    bad = found in {"", ".", ".."} or "/" in found or "\0" in found or len(found.encode()) > 200
    if bad or (parts and not parts.hostname):
        raise ValueError(f"{shown(address)}: this address names no file: give one such as https://host/beer.stackexchange.com.7z")
    return found


def shown(address: str) -> str:
    """The address without what may be secret in it: user, password, query."""
    if address.startswith("s3://"):
        return address
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def pinned(address: str) -> str | None:
    """The sha256 that the address asks for."""
    return _pin(address)[0]


def moment(date: str) -> str | None:
    """A date of HTTP in a form that can be sorted."""
    try:
        return email.utils.parsedate_to_datetime(date).isoformat()
    except (ValueError, TypeError):
        return None


def size_text(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size} bytes"


# ---- the cache


def _pin(address: str) -> tuple[str | None, str]:
    """(the sha256 that the user expects, the address to ask for): a fragment is never sent, a query is."""
    bucket = address.startswith("s3://")  # a key may hold any sign
    bare, mark, fragment = address.partition("#sha256=") if bucket else address.partition("#")
    found = PIN.search(mark + fragment if bucket else address)
    if not found:
        return None, bare
    digits = found[1].lower()
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        raise ValueError(f"{shown(bare)}: sha256={digits} is no digest: give its 64 hexadecimal digits")
    return digits, bare


def _record(path: Path) -> Record | None:
    try:
        return Record(**json.loads(path.with_name(f"{path.name}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _kept(path: Path, pin: str | None, etag: str | None, say: Callable[[str], None]) -> bool:
    """Is the file in the cache, unchanged since it came, and the version that is asked for?"""
    record = _record(path)
    if record is None or not path.is_file():
        return False
    if (etag and record.etag and etag != record.etag) or (pin and pin != record.sha256):
        say(f"{record.address} is another version than the one in {path}: fetched again")
        return False
    about = path.stat()
    if (about.st_size, about.st_mtime_ns) == (record.size, record.mtime_ns):
        return True
    if about.st_size == record.size:
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() == record.sha256:
                with contextlib.suppress(OSError):  # a cache that may only be read is fine
                    _write_json(path.with_name(f"{path.name}.json"), asdict(record) | {"mtime_ns": about.st_mtime_ns})
                return True
    say(f"{path} is not what was fetched from {record.address}: fetched again")
    return False


def _write_json(path: Path, content: dict[str, Any]) -> None:
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    with fresh.open("w") as stream:
        json.dump(content, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(path)


@contextlib.contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process fetches {path.name.removesuffix('.lock')}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turns what the disk says into a line for the user. Errors of the network never come as OSError here."""
    try:
        yield
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        why = "the disk is full" if full else error.strerror or str(error)
        remedy = (
            "make room (what was fetched is kept), or set STACKRLHF_CACHE to another folder"
            if full
            else ("set STACKRLHF_CACHE to a folder that can be written")
        )
        raise ValueError(f"{path}: cannot be written ({why}): {remedy}") from error


# ---- another version than the one in the cache?


def _still(server: "_Web", record: Record, say: Callable[[str], None], wait: float) -> bool:
    """Is what is in the cache what the server has? True as well where it does not say: a run can do with what is there."""
    conditions = {"If-None-Match": record.etag, "If-Modified-Since": record.modified}
    known = {key: value for key, value in conditions.items() if value}
    if not known:
        return True  # nothing to tell versions apart by: to fetch it anew each time would be the only way
    try:
        now = _ask(server, known, wait)
    except (_Broken, ValueError) as error:
        logger.warning("%s; whether it changed is not known, and the copy in the cache is used", _line(server, error))
        return True
    if now is None or (now.etag and now.etag == record.etag):
        return True
    if not (now.etag and record.etag) and now.modified == record.modified and now.total == record.size:
        return True
    say(f"{server.shown} changed on the server: fetched again")
    return False


def _ask(server: "_Web", conditions: dict[str, str], wait: float) -> _Version | None:
    """The version that the server has, by the head of its answer; None where it says that the conditions are not met."""
    for left in reversed(range(ASK_TRIES)):
        try:
            answer = server.ask(0, None, conditions)
            try:
                return None if answer.status == 304 else _what(answer, server)
            finally:
                answer.close()
        except _Broken as error:
            if not left:
                raise
            time.sleep(max(wait, min(error.wait, 10.0)))
    raise AssertionError("the last try returns or raises")


def _line(server: "_Web", error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{server.shown}: {error}"


# ---- one download


def _download(server: "_Web | _Bucket", path: Path, pin: str | None, progress: Progress | None, wait: float) -> None:
    part, note = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")
    say = progress.note if progress else lambda _: None
    tries = fruitless = wrong = 0
    farthest = _size(part)
    contact = False
    while True:
        tries += 1
        try:
            version = _version(part, note, pin)
            if not version.total or _size(part) < version.total:
                version = _receive(server, part, note, version, path, progress)
            problem, checked, sha256 = _check(part, version, pin)
            if not problem:
                break
            wrong += 1
            if wrong > 1:
                part.unlink(missing_ok=True)
                raise ValueError(f"{server.shown}: {problem}, fetched twice: the file there is damaged, or not the one you want")
            raise _Broken(problem, drop=True)
        except _Broken as error:
            contact = contact or error.contact
            if error.drop:
                part.unlink(missing_ok=True)
            fruitless = 0 if _size(part) > farthest else fruitless + 1
            farthest = max(farthest, _size(part))
            # Without any answer so far it is most likely the address or the network, which waiting does not mend.
            if fruitless >= (TRIES if contact else TRIES // 2) or tries >= MOST_TRIES:
                kept = f"; {size_text(_size(part))} are kept, run it again to go on" if _size(part) else ""
                raise ValueError(f"{server.shown}: {error} ({tries} tries){kept}") from error
            pause = max(min(wait * 2**fruitless, LONGEST_WAIT) * random.uniform(0.5, 1), min(error.wait, 300.0))
            say(f"{server.shown}: {error}; trying again in {pause:.1f} s, from {size_text(_size(part))} on")
            time.sleep(pause)
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
    about = part.stat()
    record = Record(server.shown, about.st_size, about.st_mtime_ns, sha256, version.etag, version.modified, checked)
    _write_json(path.with_name(f"{path.name}.json"), asdict(record))
    part.replace(path)  # keeps its time, so from here on the record fits
    note.unlink(missing_ok=True)
    say(f"fetched {server.shown}: {size_text(about.st_size)}, sha256 {sha256}, checked by {', '.join(checked) or 'nothing'}")


def _version(part: Path, note: Path, pin: str | None) -> _Version:
    """Of what is there already; it is dropped where nothing could tell that the rest belongs to the same version."""
    try:
        version = _Version(**json.loads(note.read_text()))
    except (OSError, ValueError, TypeError):
        version = _Version()
    if not (version.guard or pin) or (version.total is not None and _size(part) > version.total):
        part.unlink(missing_ok=True)
    return version if _size(part) else _Version()


def _receive(
    server: "_Web | _Bucket", part: Path, note: Path, version: _Version, path: Path, progress: Progress | None
) -> _Version:
    """One request: append to the part what it lacks, or begin it anew. Returns which version it is of."""
    start = _size(part)
    answer = server.ask(start, version.guard)
    try:
        now = _what(answer, server)
        if answer.status == 416 and start and now.total == start and version.total in {None, start}:
            version.total = start
            return version
        same = (
            answer.status == 206
            and start
            and _first_byte(answer) == start
            and all(a is None or b is None or a == b for a, b in ((now.etag, version.etag), (now.total, version.total)))
        )
        if answer.status == 206 and not same:
            raise _Broken("the file changed on the server", drop=True)
        if answer.status in {412, 416}:
            raise _Broken("the file changed on the server, or it has another size than was said", drop=True)
        if same:
            now.digests = version.digests | now.digests
            now.guard = version.guard
        elif start and progress:
            progress.note(f"{server.shown}: the server sends it from the start: it changed, or ranges are not supported there")
        done, told = (start if same else 0), 0.0
        if now.total is not None and (free := shutil.disk_usage(part.parent).free) < now.total - done:
            raise ValueError(
                f"{path}: {server.shown} needs {size_text(now.total - done)} and {size_text(free)} are free: make room, or set "
                "STACKRLHF_CACHE to a folder on a larger disk"
            )
        if progress:
            whole = size_text(now.total) if now.total is not None else "of unknown size"
            rest = f", from {size_text(done)} on" if done else ""
            progress.note(f"fetching {server.shown} ({whole}) into {part.parent}{rest}")
        if not same:
            part.unlink(missing_ok=True)  # before the note: bytes of one version never stand beside the note of another
        _write_json(note, asdict(now))
        with part.open("ab") as out:
            while block := answer.read():
                out.write(block)
                done += len(block)
                if progress and time.monotonic() - told > 0.25:
                    told = time.monotonic()
                    progress(done, max(done, now.total or 0), phase="fetch")
        if now.total is not None and done != now.total:
            raise _Broken(f"the server sent {done} of {now.total} bytes", drop=done > now.total)
        if progress:
            progress(done, done, phase="fetch")
        return now
    finally:
        answer.close()


def _what(answer: _Answer, server: "_Web | _Bucket") -> _Version:
    """The version that an answer is of; raises for answers that bring no bytes of it."""
    headers, status = answer.headers, answer.status
    if status in {404, 410}:
        raise NotThere(f"{server.shown}: there is no such file (the server says {status}): check the address")
    if status in {401, 403}:
        raise ValueError(f"{server.shown}: the server refuses it ({status}): {server.credentials}")
    if status in RETRIED:
        raise _Broken(f"the server answers {status}", wait=_seconds(headers.get("retry-after", "")))
    if status not in {200, 206, 412, 416}:
        raise ValueError(f"{server.shown}: the server answers {status} instead of sending the file: check the address")
    if status in {200, 206} and "html" in headers.get("content-type", "") and not server.shown.endswith((".html", ".htm")):
        raise ValueError(
            f"{server.shown}: the server sends a web page instead of the file: check the address, and whether it needs a login"
        )
    packed = headers.get("content-encoding", "identity").lower()
    if packed not in {"identity", "", "aws-chunked"} and not server.shown.endswith((".gz", ".zst")):
        raise ValueError(
            f"{server.shown}: the server packs it on the way ({packed}), unasked: give an address that sends it as it is"
        )
    etag, modified = headers.get("etag"), headers.get("last-modified")
    guard = etag if etag and not etag.startswith("W/") else _strong_date(modified, headers.get("date"))
    total = None
    if match := re.search(r"/(\d+)\s*$", headers.get("content-range", "")):
        total = int(match[1])
    elif status == 200 and headers.get("content-length", "").isdigit():
        total = int(headers["content-length"])
    return _Version(guard, etag, modified, total, _promised(headers, status == 200) | server.promised(headers, total))


def _strong_date(modified: str | None, date: str | None) -> str | None:
    """Last-Modified, where a second version within the same second can be ruled out (RFC 9110, 8.8.2.2)."""
    try:
        old = email.utils.parsedate_to_datetime(modified or "") <= email.utils.parsedate_to_datetime(date or "")
        apart = email.utils.parsedate_to_datetime(date or "") - email.utils.parsedate_to_datetime(modified or "")
        return modified if old and apart.total_seconds() >= 1 else None
    except (ValueError, TypeError):
        return None


def _seconds(retry_after: str) -> float:
    """Retry-After: a number of seconds, or a date."""
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


def _first_byte(answer: _Answer) -> int | None:
    match = re.match(r"bytes (\d+)-", answer.headers.get("content-range", ""))
    return int(match[1]) if match else None


def _promised(headers: Mapping[str, str], whole: bool) -> dict[str, str]:
    """Digests of the whole file in an answer's headers; some speak of the answer's bytes, and count only when it is `whole`."""
    found: dict[str, str] = {}
    listed = [headers.get("repr-digest", ""), headers.get("digest", ""), headers.get("content-digest", "") if whole else ""]
    pairs = [item.strip().partition("=")[::2] for line in listed for item in line.split(",")]
    if whole:
        pairs.append(("md5", headers.get("content-md5", "")))
        if headers.get("x-amz-checksum-type", "FULL_OBJECT") == "FULL_OBJECT":
            pairs += [(name, headers.get(f"x-amz-checksum-{name}", "")) for name in ("sha256", "sha1", "crc32")]
    for word, text in pairs:
        algorithm = {"sha": "sha1"}.get(word.strip().lower(), word.strip().lower().replace("-", ""))
        with contextlib.suppress(binascii.Error, ValueError):
            value = base64.b64decode(text.strip().strip(":"), validate=True)
            if len(value) == DIGEST_BYTES.get(algorithm):
                found[algorithm] = value.hex()
    return found


def _check(part: Path, version: _Version, pin: str | None) -> tuple[str | None, list[str], str]:
    """(what is wrong with the file, what it was compared with, its sha256), from the bytes on the disk."""
    wanted = {k: v for k, v in version.digests.items() if k in DIGEST_BYTES}
    hashes = {algorithm: hashlib.new(algorithm) for algorithm in {"sha256", *wanted} - {"crc32"}}
    parts, step = None, CHUNK
    if "parts" in version.digests:  # S3: the MD5 of the MD5s of parts of this many bytes
        parts, step = hashlib.md5(usedforsecurity=False), int(version.digests["parts"].split()[1])
    crc, size = 0, 0
    with part.open("rb") as stream:
        left, piece = step, hashlib.md5(usedforsecurity=False)
        while block := stream.read(min(CHUNK, left)):
            size += len(block)
            for each in hashes.values():
                each.update(block)
            crc = zlib.crc32(block, crc) if "crc32" in wanted else 0
            if parts is not None:
                piece.update(block)
                left -= len(block)
                if not left:
                    parts.update(piece.digest())
                    left, piece = step, hashlib.md5(usedforsecurity=False)
        if parts is not None and left != step:
            parts.update(piece.digest())
    found = {algorithm: each.hexdigest() for algorithm, each in hashes.items()} | {"crc32": f"{crc:08x}"}
    checked = ["size"] if version.total is not None else []
    if version.total is not None and size != version.total:
        return f"it has {size} bytes instead of {version.total}", checked, ""
    for algorithm, value in wanted.items():
        if found[algorithm] != value:
            return f"its {algorithm} is {found[algorithm]}, and the server says {value}", checked, ""
        checked.append(algorithm)
    if parts is not None:
        if parts.hexdigest() != version.digests["parts"].split()[0]:
            return f"the MD5 of its parts is {parts.hexdigest()}, and its ETag {version.etag}", checked, ""
        checked.append("md5 of parts")
    if pin:
        if found["sha256"] != pin:
            return f"its sha256 is {found['sha256']}, and {pin} was asked for", checked, ""
        checked.append("sha256 asked for")
    return None, checked, found["sha256"]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# ---- the two kinds of servers


async def _some(stream: Any, beneath: Any) -> bytes:
    """What has come of an answer's body, or comes next; b"" at its end."""
    try:
        return bytes(await stream.read(CHUNK))
    except Exception:
        # Once a connection is cut, aiohttp's reader gives only the error, and keeps what came before it for itself.
        rest = bytes(beneath._read_nowait(-1)) if getattr(beneath, "_buffer", None) and hasattr(beneath, "_read_nowait") else b""
        if not rest:
            raise
        return rest


class _Web:
    """https:// and http://, through fsspec's file system; asked for headers and ranges itself, which its files hide."""

    credentials = "put user and password into ~/.netrc, or give an address that needs none"

    def __init__(self, address: str, patience: float, pinned: bool) -> None:
        import aiohttp
        import fsspec

        self.shown, self._address, self._pinned = shown(address), address, pinned
        self._patience = patience
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=patience)
        self._fs = fsspec.filesystem(
            address.split(":", 1)[0],
            skip_instance_cache=True,
            use_listings_cache=False,
            encoded=address.isascii() and " " not in address,  # a signed address must not be encoded anew
            client_kwargs={
                "auto_decompress": False,
                "trust_env": True,  # proxies, ~/.netrc
                "read_bufsize": CHUNK // 4,
                "timeout": timeout,
                "headers": {"User-Agent": "stackrlhf", "Accept-Encoding": "identity"},
            },
        )

    def ask(self, start: int, guard: str | None, conditions: Mapping[str, str] | None = None) -> _Answer:
        from fsspec.asyn import sync

        headers = {"Range": f"bytes={start}-"} | ({"If-Range": guard} if guard else {}) if start else dict(conditions or {})

        async def get() -> Any:
            session = await self._fs.set_session()
            return await session.get(self._fs.encode_url(self._address), headers=headers)

        with self._errors():
            response = sync(self._fs.loop, get)
        if self._address.startswith("https:") and response.url.scheme != "https" and not self._pinned:
            response.close()
            raise ValueError(
                f"{self.shown}: the server leads on to {response.url.scheme}://, where anyone may alter it: pin it by #sha256="
            )

        def read() -> bytes:
            with self._errors():
                return bytes(sync(self._fs.loop, _some, response.content, response.content))

        async def close() -> None:
            response.close()

        return _Answer(
            response.status,
            {key.lower(): value for key, value in response.headers.items()},
            read,
            lambda: sync(self._fs.loop, close),
        )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        import aiohttp
        from fsspec.exceptions import FSTimeoutError

        try:
            yield
        except (aiohttp.InvalidURL, aiohttp.TooManyRedirects, aiohttp.NonHttpUrlRedirectClientError) as error:
            raise ValueError(f"{self.shown}: {type(error).__name__}: check the address") from error
        except aiohttp.ClientSSLError as error:
            raise ValueError(f"{self.shown}: its certificate is not to be trusted ({error})") from error
        except aiohttp.ClientConnectorError as error:
            why = error.os_error.strerror or str(error.os_error)
            raise _Broken(f"no connection to {error.host}:{error.port} ({why})", contact=False) from error
        except (FSTimeoutError, TimeoutError) as error:
            raise _Broken(f"the server sent nothing for {self._patience:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            said = str(error).split(":", 1)[0] or type(error).__name__
            raise _Broken(f"the connection was cut ({said})") from error

    def promised(self, headers: Mapping[str, str], total: int | None) -> dict[str, str]:
        return {}

    def close(self) -> None:
        self._fs.close_session(self._fs.loop, self._fs._session) if self._fs._session else None


def bucket_filesystem(patience: float = 60.0) -> Any:
    """s3:// with credentials, region and endpoint from the environment (AWS_PROFILE, AWS_ENDPOINT_URL, …); remembers no listing."""
    environment = tuple(sorted((key, value) for key, value in os.environ.items() if key.startswith("AWS_")))
    return _bucket_filesystem(patience, os.getpid(), environment)


@functools.lru_cache(maxsize=4)  # making one takes half a second
def _bucket_filesystem(patience: float, pid: int, environment: tuple[tuple[str, str], ...]) -> Any:
    import s3fs

    return s3fs.S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={"connect_timeout": 10, "read_timeout": patience, "retries": {"mode": "standard", "max_attempts": 4}},
    )


@contextlib.contextmanager
def bucket_errors(address: str, last: bool = False) -> Iterator[None]:
    """Turns what S3 says into a line for the user, or into another try, unless it was the `last`."""
    try:
        with _bucket_errors(address):
            yield
    except _Broken as error:
        if last:
            raise ValueError(f"{address}: {error}: check the address and AWS_ENDPOINT_URL, or try again") from error
        raise


@contextlib.contextmanager
def _bucket_errors(address: str) -> Iterator[None]:
    import aiohttp
    import botocore.exceptions as aws

    try:
        yield
    except FileNotFoundError as error:
        raise NotThere(f"{address}: there is no such object or bucket: check the address") from error
    except PermissionError as error:
        raise ValueError(f"{address}: S3 refuses it ({error}): {_Bucket.credentials}") from error
    except (aws.NoCredentialsError, aws.PartialCredentialsError, aws.ProfileNotFound, aws.NoRegionError) as error:
        raise ValueError(f"{address}: {error}: {_Bucket.credentials}") from error
    except aws.ParamValidationError as error:
        raise ValueError(f"{address}: this is no address of an object ({' '.join(str(error).split())})") from error
    except (aws.EndpointConnectionError, aws.ConnectTimeoutError, aws.ProxyConnectionError) as error:
        raise _Broken(f"no connection ({error})", contact=False) from error
    except aws.FlexibleChecksumError as error:
        raise _Broken(str(error), drop=True) from error
    except (aws.BotoCoreError, aws.ClientError, aiohttp.ClientError, OSError) as error:
        raise _Broken(f"S3 failed ({type(error).__name__}: {' '.join(str(error).split())})") from error


class _Bucket:
    """An object in S3, or what speaks like it."""

    credentials = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and AWS_ENDPOINT_URL where it is not Amazon's"

    def __init__(self, address: str, patience: float) -> None:
        self.shown = address
        bucket, _, key = address.removeprefix("s3://").partition("/")
        self._object = {"Bucket": bucket, "Key": key}
        self._fs = bucket_filesystem(patience)

    def ask(self, start: int, guard: str | None) -> _Answer:
        import botocore.exceptions as aws
        from fsspec.asyn import sync

        more = {"Range": f"bytes={start}-"} | ({"IfMatch": guard} if guard else {}) if start else {"ChecksumMode": "ENABLED"}
        try:
            with bucket_errors(self.shown):
                answer = self._fs.call_s3("get_object", **self._object, **more)
        except (NotThere, _Broken) as error:
            cause = error.__cause__
            while cause is not None and not isinstance(cause, aws.ClientError):
                cause = cause.__cause__
            if start and cause is not None and cause.response["ResponseMetadata"]["HTTPStatusCode"] in {412, 416}:
                return _Answer(412, {}, lambda: b"")
            raise
        body, about = answer["Body"], answer["ResponseMetadata"]

        def read() -> bytes:
            with bucket_errors(self.shown):
                return bytes(sync(self._fs.loop, _some, body, getattr(body.raw_stream, "content", None)))

        async def close() -> None:
            body.close()

        headers = {key.lower(): value for key, value in about["HTTPHeaders"].items()}
        return _Answer(about["HTTPStatusCode"], headers, read, lambda: sync(self._fs.loop, close))

    def promised(self, headers: Mapping[str, str], total: int | None) -> dict[str, str]:
        """The ETag of an object that is not encrypted by KMS is its MD5, or the MD5 of the MD5s of its parts and their number."""
        match = re.fullmatch(r'"?([0-9a-f]{32})(?:-(\d+))?"?', headers.get("etag", ""))
        secret = headers.get("x-amz-server-side-encryption", "AES256") != "AES256"
        if not match or secret or "x-amz-server-side-encryption-customer-algorithm" in headers:
            return {}
        if not match[2]:
            return {"md5": match[1]}
        with contextlib.suppress(_Broken, ValueError), bucket_errors(self.shown):
            first = self._fs.call_s3("head_object", **self._object, PartNumber=1)
            size = first["ContentLength"]
            if size and total and -(-total // size) == int(match[2]):
                return {"parts": f"{match[1]} {size}"}
        return {}

    def close(self) -> None: ...
