"""The artifact store: what a step made, found again by what it was made from.

    <store>/<step>/<key>/       one immutable artifact, whole when its manifest.json is there
    <store>/pointers/<name>/    numbered files, the newest is the pointer (such as the champion)

A store is a local folder (tasks/local_store.py) or s3://bucket/prefix (tasks/s3_store.py). Publishing is all or nothing: an
attempt is built aside, its manifest (size and sha256 of every file) is written last. The first writer wins. Loading believes
nothing: an artifact that is not exactly what its manifest says is a miss and is named in a warning, so that the step runs again.

*Refresh.* A key says what went in, not what came out, and a step need not give the same bits twice. So a manifest also keeps
the digests of its inputs, and is a hit only for the very inputs that it was made from. A refreshed step that reproduces its
digest changes nothing; one that does not replaces its artifact, and every step made from the old one runs again when asked for.
"""

import json
import logging
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tasks.disk import Damaged, StoreError, disk_error, guarded, is_disk_trouble, refusal, size_of, walk
from tasks.local_store import LocalStore, sha256_of
from tasks.manifest import (
    MANIFEST,
    Artifact,
    FileEntry,
    Identity,
    Manifest,
    Pointer,
    canonical,
    clean_metrics,
    code_fingerprint,
    file_digest,
    library_versions,
    now,
    one_line,
    same_inputs,
)

__all__ = [
    "Artifact",
    "Check",
    "Damaged",
    "Identity",
    "Manifest",
    "Pointer",
    "Store",
    "StoreError",
    "canonical",
    "clean_metrics",
    "code_fingerprint",
    "disk_error",
    "file_digest",
    "is_disk_trouble",
    "library_versions",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Check:
    """One artifact as `verify` found it; `problem` is None where all is well."""

    step: str
    key: str
    problem: str | None


class Place(Protocol):
    """Where artifacts and pointers lie, and how they get there whole. Damaged names the file that is not as it should be."""

    uri: str
    root: Path
    """A local folder: the store itself, or its cache; attempts are built in its tmp/."""

    def address(self, step: str, key: str) -> str: ...

    def look(self, step: str, key: str) -> Manifest | None:
        """Manifest and sizes, no digests. None where there is nothing; Damaged."""

    def fetch(self, step: str, key: str) -> tuple[Manifest, Path] | None:
        """Every byte checked, in a local folder. None where there is nothing; Damaged, after it was moved out of the way."""

    def check(self, step: str, key: str) -> None:
        """Every byte where it is stored; Damaged."""

    def steps(self) -> Sequence[str]: ...

    def keys(self, step: str) -> Sequence[str]: ...

    def attempt(self, key: str, uses: Sequence[str] = ()) -> AbstractContextManager[Path]:
        """`uses`: step/key of what has to stay as long as the attempt lives."""

    def put(self, out: Path, manifest: Manifest, replace: bool) -> Manifest:
        """What stands there in the end: ours, or another's that was first."""

    def collect(self, hours: float = ...) -> None: ...

    def leftovers(self, hours: float = ...) -> Sequence[tuple[str, int]]:
        """What collect() would remove: name, bytes."""

    def in_use(self, hours: float = ...) -> set[str]:
        """step/key of what living attempts use."""

    def remove(self, step: str, key: str, keep: Callable[[], bool]) -> bool:
        """Whether the artifact is gone, whole: it stays if `keep()` says so once no reader finds it any more."""

    def pointers(self) -> Sequence[str]: ...

    def pointer_numbers(self, name: str) -> Sequence[int]: ...

    def pointer_address(self, name: str, number: int) -> str: ...

    def pointer_text(self, name: str, number: int) -> str: ...

    def add_pointer(self, name: str, number: int, text: str) -> bool:
        """False where that number is taken."""


def place_of(uri: str | os.PathLike[str]) -> Place:
    """The kind of store that an address means. ValueError where there is none. Nothing is connected to yet."""
    text = os.fspath(uri)
    scheme = re.match(r"([a-z][a-z0-9+.-]*)://", text)
    if scheme and scheme[1] == "s3":
        from tasks.s3_store import S3Store

        return S3Store(text)
    if scheme and scheme[1] != "file":
        raise ValueError(
            f"store {scheme[1]}://...: such stores are not supported: give a local folder, such as ./store, or s3://bucket/prefix"
        )
    return LocalStore(text)


class Store:
    """Artifacts and pointers in a local folder, or in S3."""

    def __init__(self, uri: str | os.PathLike[str]):
        self._place = place_of(uri)
        self._opened: set[str] = set()
        self.uri = self._place.uri
        self.root = self._place.root

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def folder(self, step: str, key: str) -> Path:
        """Where a local store keeps an artifact, whether it is there or not; use open() to read one, of any store."""
        if not isinstance(self._place, LocalStore):
            raise ValueError(f"{self._place.address(step, key)} is no local folder: open() brings it here")
        return self.root / step / key

    def artifact(self, manifest: Manifest) -> Artifact:
        address = self._place.address(manifest.step, manifest.key)
        return Artifact(step=manifest.step, key=manifest.key, uri=address, digest=manifest.digest)

    # -- reading

    def find(self, identity: Identity, input_digests: Mapping[str, str] | None = None) -> Manifest | None:
        """A look without hashing or moving anything, for the planner."""
        try:
            manifest = self._place.look(identity.step, identity.key)
        except Damaged as damage:
            logger.warning("damaged: %s; %s will run again", damage, identity.step)
            return None
        return manifest if manifest and same_inputs(manifest, input_digests or {}) else None

    def load(self, identity: Identity, input_digests: Mapping[str, str] | None = None) -> Manifest | None:
        """The artifact, every byte of it checked; None when it has to be made (again)."""
        try:
            found = self._place.fetch(identity.step, identity.key)
        except Damaged as damage:
            logger.warning("damaged: %s; %s runs again", damage, identity.step)
            return None
        if found is None:
            return None
        if not same_inputs(found[0], input_digests or {}):
            logger.warning("%s was made from inputs that were since recomputed with another content; it runs again", identity.step)
            return None
        return found[0]

    def open(self, artifact: Artifact) -> Path:
        """The local folder of an artifact, every byte of it checked."""
        try:
            found = self._place.fetch(artifact.step, artifact.key)
        except Damaged as damage:
            raise StoreError(f"damaged: {damage}; run again, and {artifact.step} is made anew") from damage
        if found is None:
            raise StoreError(f"{artifact.uri} is not in {self.uri}; run again, and {artifact.step} is made anew")
        manifest, folder = found
        if manifest.digest != artifact.digest:
            raise StoreError(f"{artifact.step} {artifact.key[:12]} was recomputed by another run with another content; run again")
        self._opened.add(f"{artifact.step}/{artifact.key}")
        return folder

    def unchanged(self, artifact: Artifact) -> bool:
        """Is it still the one that was opened? Reads the manifest only."""
        with suppress(Damaged):
            manifest = self._place.look(artifact.step, artifact.key)
            return manifest is not None and manifest.digest == artifact.digest
        return False

    def manifest(self, step: str, key: str) -> Manifest | None:
        """Of one whole artifact; None where there is none, or something odd."""
        with suppress(Damaged):
            return self._place.look(step, key)
        return None

    def manifests(self, step: str) -> Sequence[Manifest]:
        """The whole artifacts of a step, the oldest first; odd ones are left out."""
        found = []
        for key in self._place.keys(step):
            with suppress(Damaged):
                if manifest := self._place.look(step, key):
                    found.append(manifest)
        return sorted(found, key=lambda m: m.created)

    def keys(self, step: str) -> Sequence[str]:
        """Of everything that lies there, whole or not."""
        return self._place.keys(step)

    def list(self) -> Sequence[Manifest]:
        """Every whole artifact."""
        return [manifest for step in self._place.steps() for manifest in self.manifests(step)]

    def verify(self) -> Iterator[Check]:
        """Every artifact, every byte."""
        for step in self._place.steps():
            for key in self._place.keys(step):
                try:
                    self._place.check(step, key)
                    yield Check(step, key, None)
                except Damaged as damage:
                    yield Check(step, key, str(damage))

    # -- writing

    def attempt(self, key: str) -> AbstractContextManager[Path]:
        """An empty local folder to build the artifact `key` in; what is not published is removed. As long as it lives, gc()
        leaves what this object opened before."""
        return self._place.attempt(key, sorted(self._opened))

    def publish(
        self,
        out: Path,
        identity: Identity,
        *,
        metrics: Mapping[str, Any],
        seconds: float,
        peak_memory_bytes: int,
        input_digests: Mapping[str, str] | None = None,
        replace: bool = False,
    ) -> Manifest:
        """Put an attempt's folder in its place, whole. The first writer wins: where a good artifact stands already it is kept
        and returned, ours is dropped; unless `replace`, and theirs has another digest or was made from other inputs."""
        with guarded(out, needed=size_of(out)):
            files = _contents(out, identity.step)
        manifest = Manifest(
            identity=identity,
            input_digests=dict(input_digests or {}),
            files=files,
            metrics=clean_metrics(metrics),
            seconds=round(float(seconds), 3),
            peak_memory_bytes=int(peak_memory_bytes),
            code=code_fingerprint(identity.step),
            libraries=library_versions(),
            created=now(),
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        return self._place.put(out, manifest, replace)

    def collect(self, hours: float | None = None) -> None:
        """Remove dead attempts. Those of other machines count as dead once `hours` old: 7 days in a folder, 24 hours on S3."""
        if hours is None:
            self._place.collect()
        else:
            self._place.collect(hours)

    def leftovers(self, hours: float | None = None) -> Sequence[tuple[str, int]]:
        """What collect() would remove: name, bytes."""
        return self._place.leftovers() if hours is None else self._place.leftovers(hours)

    def in_use(self, hours: float | None = None) -> set[str]:
        """step/key of what living attempts opened, here and on other machines."""
        return self._place.in_use() if hours is None else self._place.in_use(hours)

    def remove(self, manifest: Manifest, hours: float | None = None) -> bool:
        """Remove an artifact, whole: a reader finds it or does not. It stays where a living attempt uses it, or it was replaced."""
        step, key = manifest.step, manifest.key
        now = self.manifest(step, key)
        if now is None or now.digest != manifest.digest:
            return False
        return self._place.remove(step, key, lambda: f"{step}/{key}" in self.in_use(hours))

    # -- pointers

    def pointers(self) -> Sequence[str]:
        """Their names."""
        return self._place.pointers()

    def pointer(self, name: str) -> Pointer | None:
        """Where a pointer stands: its newest file."""
        return next(self.pointer_history(name), None)

    def pointer_history(self, name: str) -> Iterator[Pointer]:
        """The newest first. A damaged file is passed over with a warning; its number stays taken."""
        for number in sorted(self._place.pointer_numbers(name), reverse=True):
            for last in (False, True):  # what is read wrong may have been hurt on its way: once more
                try:
                    yield self._read_pointer(name, number)
                    break
                except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                    if last:
                        where = self._place.pointer_address(name, number)
                        logger.warning("damaged pointer %s: %s; the one before it counts", where, one_line(error))

    def _read_pointer(self, name: str, number: int) -> Pointer:
        content = json.loads(self._place.pointer_text(name, number))
        seal = content.pop("seal")
        pointer = Pointer.model_validate(content)
        if seal != pointer.digest or pointer.number != number:
            raise ValueError("its seal does not fit its content")
        return pointer

    def pointer_number(self, name: str) -> int:
        """The highest number taken; 0 before the first move."""
        return max(self._place.pointer_numbers(name), default=0)

    def move_pointer(self, name: str, to: dict[str, Any], expected_number: int) -> bool:
        """Compare and swap: move the pointer if `expected_number` is still the newest; False if another was faster."""
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
            raise ValueError(f"pointer name {name!r}: lower-case letters, digits, . _ - only")
        if self.pointer_number(name) != expected_number:
            return False
        pointer = Pointer(number=expected_number + 1, to=json.loads(canonical(to)), moved=now())
        text = json.dumps({**pointer.model_dump(), "seal": pointer.digest}, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
        return self._place.add_pointer(name, pointer.number, text)


def _contents(out: Path, step: str) -> dict[str, FileEntry]:
    """Size and sha256 of every file that a step wrote. StoreError names a file that has no place in an artifact."""
    files = {}
    for path in walk(out):
        name = path.relative_to(out).as_posix()
        if not stat.S_ISREG(path.lstat().st_mode):
            raise StoreError(f"{step} wrote {name}, which is not a plain file")
        if name == MANIFEST or (why_not := refusal(name)):
            raise StoreError(f"{step} wrote {name}, which {'is the store’s' if name == MANIFEST else why_not}")
        files[name] = FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))
    return files
