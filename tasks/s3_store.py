"""The store in an S3 bucket. No rename there: data first, the manifest last, each write to a name that may be written once.

    <prefix>/<step>/<key>/data/<attempt>/...   files, never overwritten: every attempt has a name of its own
    <prefix>/<step>/<key>/manifest.json        written last, and only if none is there; replaced only if its ETag is still the same
    <prefix>/pointers/<name>/<number>.json     written only if none is there
    <prefix>/leases/<uuid>.json                what an attempt uses while it lives, for `stackrlhf store gc`

A reply that got lost leaves open whether a write was applied, so the manifest is read back: with our attempt's name in it
we won, with another's name theirs is used and ours is dropped.

*The cache.* Steps read local files, so an artifact is brought whole to `$STACKRLHF_CACHE/store/<digest of the address>/<step>/
<key>/<attempt>`. What it is worth is asked of the bucket each time (the manifest, and a list of the files' sizes), and every
byte is checked against that manifest: two machines' caches cannot disagree, and a damaged one is fetched again.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from tasks.disk import (
    Damaged,
    StoreError,
    attempt,
    cache_folder,
    collect_attempts,
    dead_attempts,
    guarded,
    inode,
    make_folder,
    size_of,
    used_by_attempts,
)
from tasks.local_store import check_names, must_go, put_in_place, read_folder, sha256_of
from tasks.manifest import MANIFEST, FileEntry, Manifest, one_line
from tasks.s3 import Bucket, Garbled, Listed, Missing, Taken, Unreachable, in_parallel

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

STEP = re.compile(r"[a-z0-9][a-z0-9_-]*")
KEY = re.compile(r"[0-9a-f]{64}")
ATTEMPT = re.compile(r"[0-9a-f]{32}")
DATA = re.compile(rf"{STEP.pattern}/{KEY.pattern}/data/{ATTEMPT.pattern}/")
LEASES = "leases"
ATTEMPT_HOURS = 24
"""Data that no manifest names, and uploads that were not ended, are taken for dead after this."""


class S3Store:
    """Artifacts and pointers in an S3 bucket; `root` is the local cache."""

    def __init__(self, text: str):
        self.bucket = Bucket(text)
        self.uri = self.bucket.uri
        self.root = cache_folder() / "store" / hashlib.sha256(self.uri.encode()).hexdigest()[:16]

    def address(self, step: str, key: str) -> str:
        return self.bucket.address(f"{step}/{key}")

    # -- reading

    def look(self, step: str, key: str) -> Manifest | None:
        found = self._read(step, key, lambda manifest: None)
        return found[0] if found else None

    def fetch(self, step: str, key: str) -> tuple[Manifest, Path] | None:
        return self._read(step, key, self._bring)

    def check(self, step: str, key: str) -> None:
        """Not the cache but what the bucket holds, every byte."""

        def check(manifest: Manifest) -> None:
            for name, entry in manifest.files.items():
                with attempt(self.root, "check") as folder:
                    self._download(manifest, name, entry, folder / "file")

        self._read(step, key, check)

    def _read(self, step: str, key: str, work: Callable[[Manifest], Result]) -> tuple[Manifest, Result] | None:
        """The manifest, its files' sizes compared with the list of what is there, and what `work` makes of it."""
        found = self.bucket.get(f"{step}/{key}/{MANIFEST}")
        while found is not None:
            try:
                manifest = self._parse(step, key, found[0])
                self._compare(manifest)
                return manifest, work(manifest)
            except Damaged:
                again = self.bucket.get(f"{step}/{key}/{MANIFEST}")
                if again == found:
                    raise
                found = again  # it was replaced meanwhile, or hurt on its way
        return None

    def _parse(self, step: str, key: str, content: bytes) -> Manifest:
        try:
            manifest = Manifest.parse(content.decode())
            check_names(manifest, step, key)
            if not ATTEMPT.fullmatch(manifest.attempt or ""):
                raise ValueError(f"attempt is {manifest.attempt!r}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Damaged(f"{self.address(step, key)}/{MANIFEST}: {one_line(error)}") from error
        return manifest

    def _compare(self, manifest: Manifest) -> None:
        """Are the files there, whole, and no others?"""
        data = _data(manifest)
        there = {name.removeprefix(data): listed.bytes for name, listed in self.bucket.list(data).items()}
        for name, size in there.items():
            if name not in manifest.files:
                raise Damaged(f"{self.bucket.address(data + name)}: not in the manifest")
            if size != manifest.files[name].bytes:
                raise Damaged(f"{self.bucket.address(data + name)}: {size} bytes, not {manifest.files[name].bytes}")
        if missing := [name for name in manifest.files if name not in there]:
            raise Damaged(f"{self.bucket.address(data + missing[0])}: is missing")

    def _bring(self, manifest: Manifest) -> Path:
        """The folder in the cache, every byte checked; what is not there, or not as it should be, is fetched."""
        step, key = manifest.step, manifest.key
        final = self.root / step / key / str(manifest.attempt)
        for _ in range(10):
            before = inode(final)
            try:
                if read_folder(final, step, key, digests=True) == manifest:
                    return final
            except Damaged as damage:
                logger.warning("damaged in the cache: %s; fetched again", damage)
            self._drop(final, before)
            with attempt(self.root, key) as out:
                with guarded(final, needed=manifest.bytes):
                    for folder in {(out / name).parent for name in manifest.files}:
                        folder.mkdir(parents=True, exist_ok=True)
                    in_parallel(lambda item: self._download(manifest, item[0], item[1], out / item[0]), manifest.files.items())
                self._keep(out, manifest)
        raise StoreError(f"{final}: cannot be put in place; is another program writing there?")

    def _download(self, manifest: Manifest, name: str, entry: FileEntry, to: Path) -> None:
        source = _data(manifest) + name
        for last in (False, True):  # what is wrong may have been hurt on its way: once more
            try:
                self.bucket.download(source, to, entry.bytes)
            except Missing as error:
                raise Damaged(f"{self.bucket.address(source)}: is missing") from error
            except Garbled as error:
                raise Damaged(f"{self.bucket.address(source)}: its checksum is not the server's") from error
            if to.stat().st_size == entry.bytes and sha256_of(to) == entry.sha256:
                return
            if last:
                raise Damaged(f"{self.bucket.address(source)}: its sha256 is not the manifest's")

    def _keep(self, out: Path, manifest: Manifest) -> None:
        """Put a whole folder into the cache. Nothing is fsynced: what a power loss damages is fetched again."""
        final = self.root / manifest.step / manifest.key / str(manifest.attempt)
        with guarded(final, needed=manifest.bytes):
            (out / MANIFEST).write_text(manifest.text(), encoding="utf-8")
            make_folder(final.parent)
            put_in_place(out, final)

    def _drop(self, folder: Path, before: tuple[int, int] | None) -> None:
        """Remove a folder of the cache, if it is still the one that was looked at."""
        if before is None:
            return
        aside = self.root / "tmp" / f"dropped.{uuid.uuid4().hex}"
        with suppress(OSError):
            make_folder(aside.parent)
            os.rename(folder, aside)
            if inode(aside) != before:  # meanwhile another process put a good one there: give it back
                os.rename(aside, folder)
            elif aside.is_dir() and not aside.is_symlink():
                shutil.rmtree(aside)
            else:
                aside.unlink()

    def steps(self) -> Sequence[str]:
        return [name for name in self.bucket.children("") if name not in {"pointers", LEASES} and STEP.fullmatch(name)]

    def keys(self, step: str) -> Sequence[str]:
        return [name for name in self.bucket.children(f"{step}/") if KEY.fullmatch(name)]

    # -- writing

    @contextmanager
    def attempt(self, key: str, uses: Sequence[str] = ()) -> Iterator[Path]:
        collect_attempts(self.root, ATTEMPT_HOURS)
        with attempt(self.root, key, uses) as out, self._lease(uses):
            yield out

    @contextmanager
    def _lease(self, uses: Sequence[str]) -> Iterator[None]:
        """Tells other machines what has to stay: a small object for as long as the attempt lives, or 24 hours."""
        if not uses:
            yield
            return
        name = f"{LEASES}/{uuid.uuid4().hex}.json"
        with suppress(StoreError, ValueError, Taken):  # without it the store is as good, but not safe from gc --keep
            self.bucket.put(name, json.dumps({"uses": list(uses)}).encode(), replaces=None)
        try:
            yield
        finally:
            with suppress(StoreError, ValueError):
                self.bucket.delete([name])

    def put(self, out: Path, manifest: Manifest, replace: bool) -> Manifest:
        ours = manifest.model_copy(update={"attempt": uuid.uuid4().hex})
        step, key, data = ours.step, ours.key, _data(ours)
        theirs, etag = self._make_way(ours, replace)  # before gigabytes are sent for nothing
        if theirs is not None:
            return theirs
        with guarded(out):
            in_parallel(lambda name: self.bucket.upload(out / name, data + name), ours.files)
        self._check_upload(ours)
        for _ in range(10):
            try:
                self.bucket.put(f"{step}/{key}/{MANIFEST}", ours.text().encode(), replaces=etag)
                won = True
            except (Taken, Unreachable) as error:  # a lost reply, too, may have been a yes: it is read back
                found = self.bucket.get(f"{step}/{key}/{MANIFEST}")
                won = found is not None and found[0] == ours.text().encode()
                if isinstance(error, Unreachable) and not won:
                    raise  # our data stays: the write may still arrive, and collect() knows when it is too late for that
            if won:
                with suppress(StoreError):  # else it is fetched when it is needed
                    self._keep(out, ours)
                with suppress(StoreError, ValueError):  # it is only tidying
                    self._collect(f"{step}/{key}/data/", ATTEMPT_HOURS)
                return ours
            theirs, etag = self._make_way(ours, replace)
            if theirs is not None:
                with suppress(StoreError, ValueError):  # collect() does it later
                    self.bucket.delete(data + name for name in ours.files)
                return theirs
        raise StoreError(f"{self.address(step, key)}: cannot be put in place; is another program writing there?")

    def _check_upload(self, ours: Manifest) -> None:
        """A manifest is written only for files that are there now, however long ago they were sent."""
        try:
            self._compare(ours)
        except Damaged as damage:
            raise StoreError(f"{damage}, though it was just written there: run again") from damage

    def _make_way(self, ours: Manifest, replace: bool) -> tuple[Manifest | None, str | None]:
        """(the good artifact that stands where ours should go, -), or (None, ETag of the manifest that ours replaces, if any)."""
        step, key = ours.step, ours.key
        while True:
            found = self.bucket.get(f"{step}/{key}/{MANIFEST}")
            if found is None:
                return None, None
            try:
                theirs = self._parse(step, key, found[0])
                self._compare(theirs)
                self._bring(theirs)
            except Damaged as damage:
                if self.bucket.get(f"{step}/{key}/{MANIFEST}") != found:
                    continue
                logger.warning("damaged: %s; replaced", damage)
                return None, found[1]
            return (None, found[1]) if must_go(theirs, ours, replace) else (theirs, None)

    def collect(self, hours: float = ATTEMPT_HOURS) -> None:
        """Remove data that no manifest names, and uploads that were not ended, once `hours` old; the same in the cache. A key
        whose manifest is damaged keeps all it has. Reads only the steps' folders, however full the bucket is."""
        collect_attempts(self.root, hours)
        for step in self.steps():
            self._collect(f"{step}/", hours)
        limit = self.bucket.time() - timedelta(hours=hours)
        self.bucket.delete(name for name, listed in self.bucket.list(f"{LEASES}/").items() if listed.modified <= limit)
        for folder in self.root.glob("*/*/*"):
            step, key, number = folder.parts[-3:]
            with suppress(OSError):
                old = time.time() - folder.stat().st_mtime >= hours * 3600
                if old and ATTEMPT.fullmatch(number) and not self._named(step, key, number):
                    self._drop(folder, inode(folder))

    def leftovers(self, hours: float = ATTEMPT_HOURS) -> Sequence[tuple[str, int]]:
        found = [(f"cache: tmp/{path.name}", size_of(path)) for path in dead_attempts(self.root, hours)]
        for step in self.steps():
            objects, uploads = self._dead(f"{step}/", hours)
            found += [(folder, sum(listed.bytes for listed in listing.values())) for folder, listing in objects.items()]
            found += [(f"upload of {name}", 0) for name, _ in uploads]
        return found

    def in_use(self, hours: float = ATTEMPT_HOURS) -> set[str]:
        """Also what this machine's attempts use; of another's, what it said within `hours`."""
        limit = self.bucket.time() - timedelta(hours=hours)
        found = used_by_attempts(self.root, hours)
        for name, listed in self.bucket.list(f"{LEASES}/").items():
            lease = self.bucket.get(name) if listed.modified > limit else None
            with suppress(ValueError, KeyError, TypeError):
                found |= {str(one) for one in json.loads(lease[0])["uses"]} if lease else set()
        return found

    def remove(self, step: str, key: str, keep: Callable[[], bool]) -> bool:
        """The manifest first: without it nothing is there for any reader."""
        where = f"{step}/{key}/{MANIFEST}"
        found = self.bucket.get(where)
        if found is None or keep():
            return False
        self.bucket.delete([where])
        if keep():  # an attempt that began meanwhile; where another manifest stands by now, that one stays
            with suppress(Taken):
                self.bucket.put(where, found[0], replaces=None)
            return False
        with suppress(Damaged):
            self.bucket.delete(self.bucket.list(_data(self._parse(step, key, found[0]))))
        for folder in (self.root / step / key).glob("*"):
            self._drop(folder, inode(folder))
        return True

    def _collect(self, below: str, hours: float) -> None:
        objects, uploads = self._dead(below, hours)
        for listing in objects.values():
            self.bucket.delete(listing)
        for name, upload in uploads:
            with suppress(Missing):
                self.bucket.abort(name, upload)

    def _dead(self, below: str, hours: float) -> tuple[dict[str, dict[str, Listed]], list[tuple[str, str]]]:
        """(folder of data that no manifest names -> its objects, uploads that were not ended), each `hours` old."""
        limit = self.bucket.time() - timedelta(hours=hours)
        attempts: dict[str, dict[str, Listed]] = {}
        for name, listed in self.bucket.list(below).items():
            if place := DATA.match(name):
                attempts.setdefault(place[0], {})[name] = listed
        dead = {}
        for folder, objects in attempts.items():
            step, key, _, number, _ = folder.split("/")
            if max(listed.modified for listed in objects.values()) <= limit and not self._named(step, key, number):
                dead[folder] = objects
        uploads = [(name, upload) for name, upload, begun in self.bucket.uploads(below) if begun <= limit and DATA.match(name)]
        return dead, uploads

    def _named(self, step: str, key: str, number: str) -> bool:
        """Does the manifest name this attempt, or could it?"""
        found = self.bucket.get(f"{step}/{key}/{MANIFEST}")
        try:
            return found is not None and self._parse(step, key, found[0]).attempt == number
        except Damaged:
            return True

    # -- pointers

    def pointers(self) -> Sequence[str]:
        return self.bucket.children("pointers/")

    def pointer_numbers(self, name: str) -> Sequence[int]:
        below = f"pointers/{name}/"
        found = re.findall(r"^(\d+)\.json$", "\n".join(one.removeprefix(below) for one in self.bucket.list(below)), re.MULTILINE)
        return [int(number) for number in found]

    def pointer_address(self, name: str, number: int) -> str:
        return self.bucket.address(f"pointers/{name}/{number:08d}.json")

    def pointer_text(self, name: str, number: int) -> str:
        found = self.bucket.get(f"pointers/{name}/{number:08d}.json")
        if found is None:
            raise FileNotFoundError(self.pointer_address(name, number))
        return found[0].decode()

    def add_pointer(self, name: str, number: int, text: str) -> bool:
        where = f"pointers/{name}/{number:08d}.json"
        try:
            self.bucket.put(where, text.encode(), replaces=None)
        except (Taken, Unreachable) as error:  # a lost reply, too, may have been a yes: it is read back
            found = self.bucket.get(where)
            if found is None and isinstance(error, Unreachable):
                raise
            return found is not None and found[0] == text.encode()
        return True


def _data(manifest: Manifest) -> str:
    return f"{manifest.step}/{manifest.key}/data/{manifest.attempt}/"
