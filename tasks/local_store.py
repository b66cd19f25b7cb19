"""The store in a local folder: an attempt is fsynced, then one rename puts it in place.

<root>/<step>/<key>/             one artifact
<root>/pointers/<name>/          numbered files
<root>/tmp/<key>.<pid>.<uuid>/   attempts; tmp/damaged.*: what failed its check; tmp/replaced.*: what a refresh replaced
<root>/tmp/<key>.kept/           checkpoints of a step that was stopped; <key>.scratch/: what ingest left
"""

import errno
import hashlib
import logging
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from tasks.disk import (
    Damaged,
    StoreError,
    attempt,
    collect_attempts,
    dead_attempts,
    folders,
    fsync,
    guarded,
    inode,
    make_folder,
    refusal,
    size_of,
    used_by_attempts,
    walk,
    write_durably,
)
from tasks.manifest import MANIFEST, Manifest, one_line, same_inputs

logger = logging.getLogger(__name__)

ATTEMPT_HOURS = 7 * 24
"""Attempts of other machines are taken for dead after this."""


class LocalStore:
    """Artifacts and pointers in a local folder."""

    def __init__(self, text: str):
        self.root = Path(text.removeprefix("file://")).expanduser().absolute()
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"store {self.root} is not a folder")
        self.uri = str(self.root)

    def address(self, step: str, key: str) -> str:
        return str(self.root / step / key)

    # -- reading

    def look(self, step: str, key: str) -> Manifest | None:
        return self._read(step, key, digests=False)

    def _read(self, step: str, key: str, digests: bool) -> Manifest | None:
        """read_folder, once more where the folder was moved away meanwhile: removed, or replaced, is not damaged."""
        folder = self.root / step / key
        while True:
            before = _state(folder)
            try:
                return read_folder(folder, step, key, digests)
            except Damaged:
                now = _state(folder)
                if now is None:
                    return None
                if now == before:
                    raise

    def fetch(self, step: str, key: str) -> tuple[Manifest, Path] | None:
        folder = self.root / step / key
        before = inode(folder)
        try:
            manifest = self._read(step, key, digests=True)
        except Damaged as damage:
            moved = self._set_aside("damaged", step, key, before)
            raise Damaged(f"{damage} (moved to {moved or 'nowhere'})") from damage
        return None if manifest is None else (manifest, folder)

    def check(self, step: str, key: str) -> None:
        self._read(step, key, digests=True)

    def steps(self) -> Sequence[str]:
        return [name for name in _names(self.root) if name not in {"tmp", "pointers"} and (self.root / name).is_dir()]

    def keys(self, step: str) -> Sequence[str]:
        return _names(self.root / step)

    # -- writing

    def attempt(self, key: str, uses: Sequence[str] = ()) -> AbstractContextManager[Path]:
        self.collect()
        return attempt(self.root, key, uses)

    def put(self, out: Path, manifest: Manifest, replace: bool) -> Manifest:
        final = self.root / manifest.step / manifest.key
        with guarded(out, needed=size_of(out)):
            for path in walk(out):
                fsync(path)
            write_durably(out / MANIFEST, manifest.text())
            for folder in folders(out):
                fsync(folder)
            make_folder(final.parent)
        with guarded(final, needed=manifest.bytes):
            for _ in range(10):
                if put_in_place(out, final):
                    fsync(final.parent)
                    return manifest
                if theirs := self._make_way(manifest, replace):
                    return theirs
        raise StoreError(f"{final}: cannot be put in place; is another program writing there?")

    def _make_way(self, ours: Manifest, replace: bool) -> Manifest | None:
        """The artifact that stands where ours should go; or None, after moving away what must not stay there."""
        step, key = ours.step, ours.key
        folder = self.root / step / key
        before = inode(folder)
        try:
            theirs = self._read(step, key, digests=True)
        except Damaged as damage:
            logger.warning("damaged: %s; replaced", damage)
            if not self._set_aside("damaged", step, key, before) and os.path.lexists(folder):
                raise StoreError(f"{folder} is damaged and cannot be moved away: remove it") from damage
            return None
        if theirs is None:
            return None
        if must_go(theirs, ours, replace):
            self._set_aside("replaced", step, key, before)
            return None
        return theirs

    def _set_aside(self, word: str, step: str, key: str, before: tuple[int, int] | None) -> Path | None:
        """Move a folder into tmp/, under a name that says why; None where that is impossible, or another's doing."""
        folder, aside = self.root / step / key, self.root / "tmp" / f"{word}.{step}.{key}.{uuid.uuid4().hex}"
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

    def collect(self, hours: float = ATTEMPT_HOURS) -> None:
        collect_attempts(self.root, hours)

    def leftovers(self, hours: float = ATTEMPT_HOURS) -> Sequence[tuple[str, int]]:
        return [(f"tmp/{path.name}", size_of(path)) for path in dead_attempts(self.root, hours)]

    def in_use(self, hours: float = ATTEMPT_HOURS) -> set[str]:
        return used_by_attempts(self.root, hours)

    def remove(self, step: str, key: str, keep: Callable[[], bool]) -> bool:
        folder = self.root / step / key
        aside = self._set_aside("removed", step, key, inode(folder))
        if aside is None:
            return False
        if keep():  # an attempt that began meanwhile
            with suppress(OSError):
                os.rename(aside, folder)
            return False
        shutil.rmtree(aside, ignore_errors=True)
        return True

    # -- pointers

    def pointers(self) -> Sequence[str]:
        return _names(self.root / "pointers")

    def pointer_numbers(self, name: str) -> Sequence[int]:
        return [int(path.stem) for path in (self.root / "pointers" / name).glob("*.json") if path.stem.isdigit()]

    def pointer_address(self, name: str, number: int) -> str:
        return str(self.root / "pointers" / name / f"{number:08d}.json")

    def pointer_text(self, name: str, number: int) -> str:
        return Path(self.pointer_address(name, number)).read_text(encoding="utf-8")

    def add_pointer(self, name: str, number: int, text: str) -> bool:
        path = Path(self.pointer_address(name, number))
        with guarded(path, needed=len(text)):
            make_folder(path.parent)
            make_folder(self.root / "tmp")
            temporary = self.root / "tmp" / f"pointer.{os.getpid()}.{uuid.uuid4().hex}"
            try:
                write_durably(temporary, text)
                os.link(temporary, path)  # fails where it exists: no lock is needed
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
            fsync(path.parent)
        return True


def put_in_place(folder: Path, final: Path) -> bool:
    """Rename a whole folder to where it belongs; False where something stands there already."""
    try:
        os.rename(folder, final)
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
            raise
        return False
    return True


def must_go(theirs: Manifest, ours: Manifest, replace: bool) -> bool:
    """Has an artifact that stands there to make way for ours? The first writer wins, unless `replace`, and theirs has
    another digest; or unless theirs was made from other inputs."""
    if not same_inputs(theirs, ours.input_digests) or (replace and theirs.digest != ours.digest):
        return True
    if theirs.digest != ours.digest:
        logger.warning("%s %s was published meanwhile with another content; that one is used", ours.step, ours.key[:12])
    return False


def check_names(manifest: Manifest, step: str, key: str) -> None:
    """ValueError where a manifest belongs elsewhere, or lists a name that could leave the artifact's folder."""
    if (manifest.step, manifest.key) != (step, key):
        raise ValueError(f"it belongs to {manifest.step}/{manifest.key}")
    for name in manifest.files:
        if (why_not := refusal(name)) or name == MANIFEST:
            raise ValueError(f"it lists {name!r}, which {why_not or 'is the manifest'}")


def read_folder(folder: Path, step: str, key: str, digests: bool) -> Manifest | None:
    """The manifest of a whole artifact; None where there is nothing; Damaged, naming the file, where something is odd."""
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
        check_names(manifest, step, key)
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
            if digests and sha256_of(path) != entry.sha256:
                raise ValueError("its sha256 is not the manifest's")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else one_line(error)
        raise Damaged(f"{path}: {why}") from error
    return manifest


def sha256_of(path: Path) -> str:
    """Of the bytes that are there now: unlike file_digest() it remembers nothing."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(folder: Path) -> tuple[int, int] | None:
    """Another one where the folder was moved, or had an entry added or removed; a new folder may get an old one's number."""
    with suppress(OSError):
        about = folder.lstat()
        return about.st_ino, about.st_ctime_ns
    return None


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
