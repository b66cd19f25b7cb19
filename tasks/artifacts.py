"""The artifact store: what a step made, found again by what it was made from.

    <store>/<step>/<key>/            one immutable folder an artifact, whole when its manifest.json is there
    <store>/pointers/<name>/         numbered files, the newest is the pointer (such as the champion)
    <store>/tmp/<key>.<pid>.<uuid>/  attempts; tmp/damaged.*: what failed its check; tmp/replaced.*: what a refresh replaced

Publishing is all or nothing: an attempt is built aside, its manifest (size and sha256 of every file) is written last,
everything is fsynced, and one rename puts it in place. The first writer wins. Loading believes nothing: a folder that is
not exactly what its manifest says is a miss, is named in a warning and is moved aside, so that the step runs again.

*Refresh.* A key says what went in, not what came out, and a step need not give the same bits twice. So a manifest also keeps
the digests of its inputs, and is a hit only for the very inputs that it was made from. A refreshed step that reproduces its
digest changes nothing; one that does not replaces its artifact, and every step made from the old one runs again when asked for.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tasks.disk import (
    StoreError,
    alive,
    disk_error,
    folders,
    fsync,
    guarded,
    inode,
    is_disk_trouble,
    machine,
    make_folder,
    process_start,
    refusal,
    size_of,
    walk,
    write_durably,
)
from tasks.manifest import (
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

MANIFEST = "manifest.json"
ATTEMPT_DAYS = 7
"""Attempts of other machines are taken for dead after this."""


class Damaged(Exception):
    """A stored artifact is not what its manifest says."""


@dataclass(frozen=True)
class Check:
    """One artifact as `verify` found it; `problem` is None where all is well."""

    step: str
    key: str
    problem: str | None


class Store:
    """Artifacts and pointers in a local folder."""

    def __init__(self, uri: str | os.PathLike[str]):
        text = os.fspath(uri)
        scheme = re.match(r"([a-z][a-z0-9+.-]*)://", text)
        if scheme and scheme[1] != "file":
            raise ValueError(f"store {text}: {scheme[1]}:// stores are not supported yet; give a local folder, such as ./store")
        self.root = Path(text.removeprefix("file://")).expanduser().absolute()
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"store {self.root} is not a folder")
        self.uri = str(self.root)

    def folder(self, step: str, key: str) -> Path:
        return self.root / step / key

    def artifact(self, manifest: Manifest) -> Artifact:
        return Artifact(
            step=manifest.step, key=manifest.key, uri=str(self.folder(manifest.step, manifest.key)), digest=manifest.digest
        )

    # -- reading

    def _read(self, step: str, key: str, digests: bool) -> Manifest | None:
        """The manifest of a whole artifact; None where there is nothing; Damaged, naming the file, where something is odd."""
        folder = self.folder(step, key)
        if not os.path.lexists(folder):
            return None
        path = folder
        try:
            if not stat.S_ISDIR(folder.lstat().st_mode):
                raise ValueError("not a folder")
            if not any(folder.iterdir()):
                return None
            path = folder / MANIFEST
            if not stat.S_ISREG(path.lstat().st_mode):
                raise ValueError("not a plain file")
            manifest = Manifest.parse(path.read_bytes().decode())
            if (manifest.step, manifest.key) != (step, key):
                raise ValueError(f"it belongs to {manifest.step}/{manifest.key}")
            for name in manifest.files:
                path = folder / MANIFEST
                if (why_not := refusal(name)) or name == MANIFEST:
                    raise ValueError(f"it lists {name!r}, which {why_not or 'is the manifest'}")
            path = folder
            for path in walk(folder):
                name = path.relative_to(folder).as_posix()
                if name not in manifest.files and name != MANIFEST:
                    raise ValueError("not in the manifest")
            for name, entry in manifest.files.items():
                path = folder / name
                about = path.lstat()
                if not stat.S_ISREG(about.st_mode):
                    raise ValueError("not a plain file")
                if about.st_size != entry.bytes:
                    raise ValueError(f"{about.st_size} bytes, not {entry.bytes}")
                if digests:
                    with path.open("rb") as file:
                        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                            raise ValueError("its sha256 is not the manifest's")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = "is missing" if isinstance(error, FileNotFoundError) else _one_line(error)
            raise Damaged(f"{path}: {why}") from error
        return manifest

    def find(self, identity: Identity, input_digests: Mapping[str, str] | None = None) -> Manifest | None:
        """A look without hashing or moving anything, for the planner."""
        try:
            manifest = self._read(identity.step, identity.key, digests=False)
        except Damaged as damage:
            logger.warning("damaged: %s; %s will run again", damage, identity.step)
            return None
        return manifest if manifest and _same_inputs(manifest, input_digests or {}) else None

    def load(self, identity: Identity, input_digests: Mapping[str, str] | None = None) -> Manifest | None:
        """The artifact, every byte of it checked; None when it has to be made (again)."""
        folder = self.folder(identity.step, identity.key)
        before = inode(folder)
        try:
            manifest = self._read(identity.step, identity.key, digests=True)
        except Damaged as damage:
            moved = self._set_aside("damaged", identity.step, identity.key, before)
            logger.warning("damaged: %s; %s runs again (moved to %s)", damage, identity.step, moved or "nowhere")
            return None
        if manifest is None:
            return None
        if not _same_inputs(manifest, input_digests or {}):
            logger.warning("%s was made from inputs that were since recomputed with another content; it runs again", identity.step)
            return None
        return manifest

    def open(self, artifact: Artifact) -> Path:
        """The folder of an artifact, every byte of it checked."""
        before = inode(self.folder(artifact.step, artifact.key))
        try:
            manifest = self._read(artifact.step, artifact.key, digests=True)
        except Damaged as damage:
            self._set_aside("damaged", artifact.step, artifact.key, before)
            raise StoreError(f"damaged: {damage}; run again, and {artifact.step} is made anew") from damage
        if manifest is None:
            raise StoreError(f"{artifact.uri} is not in {self.uri}; run again, and {artifact.step} is made anew")
        if manifest.digest != artifact.digest:
            raise StoreError(f"{artifact.step} {artifact.key[:12]} was recomputed by another run with another content; run again")
        return self.folder(artifact.step, artifact.key)

    def unchanged(self, artifact: Artifact) -> bool:
        """Is it still the one that was opened? Reads the manifest only."""
        with suppress(Damaged):
            manifest = self._read(artifact.step, artifact.key, digests=False)
            return manifest is not None and manifest.digest == artifact.digest
        return False

    def manifests(self, step: str) -> Sequence[Manifest]:
        """The whole artifacts of a step, the oldest first; odd ones are left out."""
        found = []
        for key in self._keys(step):
            with suppress(Damaged):
                if manifest := self._read(step, key, digests=False):
                    found.append(manifest)
        return sorted(found, key=lambda m: m.created)

    def list(self) -> Sequence[Manifest]:
        """Every whole artifact."""
        return [manifest for step in self._steps() for manifest in self.manifests(step)]

    def verify(self) -> Iterator[Check]:
        """Every artifact, every byte."""
        for step in self._steps():
            for key in self._keys(step):
                try:
                    self._read(step, key, digests=True)
                    yield Check(step, key, None)
                except Damaged as damage:
                    yield Check(step, key, str(damage))

    def _steps(self) -> Sequence[str]:
        return [name for name in _names(self.root) if name not in {"tmp", "pointers"} and (self.root / name).is_dir()]

    def _keys(self, step: str) -> Sequence[str]:
        return _names(self.root / step)

    # -- writing

    @contextmanager
    def attempt(self, key: str) -> Iterator[Path]:
        """An empty folder to build the artifact `key` in; what is not published is removed."""
        folder = self.root / "tmp" / f"{key}.{os.getpid()}.{uuid.uuid4().hex}"
        with guarded(folder):
            make_folder(folder.parent)
            self.collect()
            os.mkdir(folder)
            owner = {"machine": machine(), "pid": os.getpid(), "started": process_start(os.getpid())}
            (folder / "owner.json").write_text(json.dumps(owner))
            os.mkdir(folder / "files")
        try:
            yield folder / "files"
        finally:
            shutil.rmtree(folder, ignore_errors=True)

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
        final = self.folder(identity.step, identity.key)
        with guarded(out, needed=size_of(out)):
            files = {}
            for path in walk(out):
                name = path.relative_to(out).as_posix()
                if not stat.S_ISREG(path.lstat().st_mode):
                    raise StoreError(f"{identity.step} wrote {name}, which is not a plain file")
                if name == MANIFEST or (why_not := refusal(name)):
                    raise StoreError(f"{identity.step} wrote {name}, which {'is the store’s' if name == MANIFEST else why_not}")
                with path.open("rb") as file:
                    files[name] = FileEntry(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())
                fsync(path)
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
            write_durably(out / MANIFEST, manifest.text())
            for folder in folders(out):
                fsync(folder)
            make_folder(final.parent)
        with guarded(final, needed=manifest.bytes):
            for _ in range(10):
                try:
                    os.rename(out, final)
                except OSError as error:
                    if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                        raise
                else:
                    fsync(final.parent)
                    return manifest
                if theirs := self._make_way(manifest, replace):
                    return theirs
        raise StoreError(f"{final}: cannot be put in place; is another program writing there?")

    def _make_way(self, ours: Manifest, replace: bool) -> Manifest | None:
        """The artifact that stands where ours should go; or None, after moving away what must not stay there."""
        step, key = ours.step, ours.key
        before = inode(self.folder(step, key))
        try:
            theirs = self._read(step, key, digests=True)
        except Damaged as damage:
            logger.warning("damaged: %s; replaced", damage)
            if not self._set_aside("damaged", step, key, before) and os.path.lexists(self.folder(step, key)):
                raise StoreError(f"{self.folder(step, key)} is damaged and cannot be moved away: remove it") from damage
            return None
        if theirs is None:
            return None
        if not _same_inputs(theirs, ours.input_digests) or (replace and theirs.digest != ours.digest):
            self._set_aside("replaced", step, key, before)
            return None
        if theirs.digest != ours.digest:
            logger.warning("%s %s was published meanwhile with another content; that one is used", step, key[:12])
        return theirs

    def _set_aside(self, word: str, step: str, key: str, before: tuple[int, int] | None) -> Path | None:
        """Move a folder into tmp/, under a name that says why; None where that is impossible, or another's doing."""
        folder, aside = self.folder(step, key), self.root / "tmp" / f"{word}.{step}.{key}.{uuid.uuid4().hex}"
        try:
            make_folder(aside.parent)
            os.rename(folder, aside)
            if before is not None and inode(aside) != before:  # meanwhile another process put a good one there: give it back
                with suppress(OSError):
                    os.rename(aside, folder)
                return None
            os.utime(aside)
            fsync(folder.parent)
        except OSError:
            return None
        return aside

    def collect(self) -> None:
        """Remove attempts whose process is gone, and what a refresh replaced a week ago. Never what is damaged."""
        for folder in (self.root / "tmp").glob("*"):
            with suppress(OSError):
                if folder.name.startswith("damaged."):
                    continue
                owner: dict[str, Any] = {}
                with suppress(OSError, ValueError):
                    owner = json.loads((folder / "owner.json").read_text())
                if owner.get("machine") == machine():
                    dead = not alive(owner["pid"], owner["started"])
                else:
                    newest = max((p.lstat().st_mtime for p in [folder, *folder.rglob("*")]), default=0.0)
                    dead = time.time() - newest > ATTEMPT_DAYS * 86_400
                if dead:
                    shutil.rmtree(folder, ignore_errors=True) if folder.is_dir() else folder.unlink()

    # -- pointers

    def pointer(self, name: str) -> Pointer | None:
        """Where a pointer stands: its newest file."""
        return next(self.pointer_history(name), None)

    def pointer_history(self, name: str) -> Iterator[Pointer]:
        """The newest first. A damaged file is passed over with a warning; its number stays taken."""
        for path in sorted(self._pointer_files(name), reverse=True):
            try:
                content = json.loads(path.read_text())
                seal = content.pop("seal")
                pointer = Pointer.model_validate(content)
                if seal != pointer.digest or pointer.number != int(path.stem):
                    raise ValueError("its seal does not fit its content")
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                logger.warning("damaged pointer %s: %s; the one before it counts", path, _one_line(error))
                continue
            yield pointer

    def pointer_number(self, name: str) -> int:
        """The highest number taken; 0 before the first move."""
        return max((int(p.stem) for p in self._pointer_files(name)), default=0)

    def move_pointer(self, name: str, to: dict[str, Any], expected_number: int) -> bool:
        """Compare and swap: move the pointer if `expected_number` is still the newest; False if another was faster."""
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
            raise ValueError(f"pointer name {name!r}: lower-case letters, digits, . _ - only")
        folder = self.root / "pointers" / name
        with guarded(folder, needed=len(canonical(to)) + 200):
            make_folder(folder)
            make_folder(self.root / "tmp")
            if self.pointer_number(name) != expected_number:
                return False
            pointer = Pointer(number=expected_number + 1, to=json.loads(canonical(to)), moved=now())
            text = json.dumps({**pointer.model_dump(), "seal": pointer.digest}, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
            temporary = self.root / "tmp" / f"pointer.{os.getpid()}.{uuid.uuid4().hex}"
            try:
                write_durably(temporary, text)
                os.link(temporary, folder / f"{pointer.number:08d}.json")  # fails where it exists: no lock is needed
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
            fsync(folder)
        return True

    def _pointer_files(self, name: str) -> Sequence[Path]:
        return [p for p in (self.root / "pointers" / name).glob("*.json") if p.stem.isdigit()]


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def _same_inputs(manifest: Manifest, digests: Mapping[str, str]) -> bool:
    """Was it made from inputs of these digests? Inputs that are not known yet do not count."""
    return all(manifest.input_digests.get(name) == digest for name, digest in digests.items())


def _one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return (str(error) or type(error).__name__).splitlines()[0]
