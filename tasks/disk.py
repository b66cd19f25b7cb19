"""The disk as the store uses it: every write survives a power loss or is not there, every error is one line."""

import errno
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

SUFFIXES = frozenset(
    {".json", ".jsonl", ".safetensors", ".parquet", ".md", ".png", ".svg", ".html", ".txt", ".jinja", ".model", ".csv"}
)
"""What an artifact may hold. Nothing that runs code when it is loaded."""


class StoreError(RuntimeError):
    """The store cannot do what was asked; the message says where, and what is needed."""


class Damaged(Exception):
    """A stored artifact is not what its manifest says."""


def fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, text: str) -> None:
    """Create and fsync; the folder's entry is the caller's to fsync."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        data = memoryview(text.encode())
        while data:
            data = data[os.write(fd, data) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """mkdir -p that survives a power loss."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with suppress(FileExistsError):
        os.mkdir(path)
    fsync(path.parent)


def walk(folder: Path) -> Iterator[Path]:
    """Every file below, in a fixed order; folders that are links are yielded, not entered."""
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.is_dir(follow_symlinks=False):
            yield from walk(Path(entry.path))
        else:
            yield Path(entry.path)


def cache_folder() -> Path:
    """Where what is fetched from elsewhere is kept: $STACKRLHF_CACHE, else stackrlhf in the user's cache."""
    if named := os.environ.get("STACKRLHF_CACHE"):
        return Path(named).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and os.path.isabs(base) else Path("~/.cache").expanduser()) / "stackrlhf"


def folders(folder: Path) -> Iterator[Path]:
    """Every folder, the deepest first, `folder` itself last."""
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.is_dir(follow_symlinks=False):
            yield from folders(Path(entry.path))
    yield folder


def refusal(name: str) -> str | None:
    """Why a file of this name has no place in an artifact."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or str(path) != name or "\0" in name:
        return "leaves the artifact's folder"
    if path.suffix not in SUFFIXES and path.name not in {"LICENSE", "NOTICE"}:
        return f"is not one of {' '.join(sorted(SUFFIXES))} (pickles such as .pkl, .bin and .pt run code when they are loaded)"
    return None


def process_start(pid: int) -> str:
    """Tells a process from a later one with the same pid."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def machine() -> str:
    """This host, since this boot, in this pid namespace: where a pid means something."""
    boot, space = "", ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot} {space}"


def alive(pid: int, started: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return process_start(pid) == started


def is_disk_trouble(error: BaseException) -> bool:
    """Is the disk full, read-only or broken? safetensors and pyarrow say so in words only."""
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}:
        return True
    return "No space left on device" in str(error)


def disk_error(error: BaseException, path: Path, needed: int | None = None) -> StoreError:
    """One line: where, why, how many bytes are needed, and what to do."""
    why = (error.strerror if isinstance(error, OSError) else None) or str(error)
    free = "an unknown number"
    with suppress(OSError):
        free = f"{shutil.disk_usage(next(p for p in [path, *path.parents] if p.exists())).free:,}"
    size = (
        f"{needed:,} bytes are needed" if needed is not None else f"more than the {size_of(path):,} bytes written so far are needed"
    )
    return StoreError(f"{path}: {why}; {size} there, {free} are free: make room, or name another place (--store; STACKRLHF_CACHE)")


@contextmanager
def guarded(path: Path, needed: int | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(error, path, needed) from error


def size_of(folder: Path) -> int:
    """Bytes below; 0 where nothing is."""
    total = 0
    with suppress(OSError):
        for path in walk(folder):
            with suppress(OSError):
                total += path.lstat().st_size
    return total


def inode(path: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        about = path.lstat()
        return about.st_dev, about.st_ino
    return None


# ---- attempts: folders in <root>/tmp that belong to a living process


@contextmanager
def attempt(root: Path, name: str, uses: Sequence[str] = ()) -> Iterator[Path]:
    """An empty folder to build in; it is removed at the end, unless it was renamed away. `uses`: what has to stay meanwhile."""
    folder = root / "tmp" / f"{name}.{os.getpid()}.{uuid.uuid4().hex}"
    with guarded(folder):
        make_folder(folder.parent)
        os.mkdir(folder)
        owner = {"machine": machine(), "pid": os.getpid(), "started": process_start(os.getpid()), "uses": list(uses)}
        (folder / "owner.json").write_text(json.dumps(owner))
        os.mkdir(folder / "files")
    try:
        yield folder / "files"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def collect_attempts(root: Path, hours: float) -> None:
    """Remove attempts whose process is gone, and what else stood in tmp/ for `hours`. Never what is damaged."""
    for folder in dead_attempts(root, hours):
        with suppress(OSError):
            shutil.rmtree(folder, ignore_errors=True) if folder.is_dir() else folder.unlink()


def dead_attempts(root: Path, hours: float) -> Iterator[Path]:
    for folder in (root / "tmp").glob("*"):
        with suppress(OSError):
            if not folder.name.startswith("damaged.") and not _lives(folder, _owner(folder), hours):
                yield folder


def used_by_attempts(root: Path, hours: float) -> set[str]:
    """What the attempts that live said that they use."""
    found: set[str] = set()
    for folder in (root / "tmp").glob("*"):
        with suppress(OSError):
            owner = _owner(folder)
            if owner.get("uses") and _lives(folder, owner, hours):
                found |= {str(one) for one in owner["uses"]}
    return found


def _owner(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        owner = json.loads((folder / "owner.json").read_text())
        return owner if isinstance(owner, dict) else {}
    return {}


def _lives(folder: Path, owner: dict[str, Any], hours: float) -> bool:
    if owner.get("machine") == machine():
        return alive(owner["pid"], owner["started"])
    newest = max((p.lstat().st_mtime for p in [folder, *folder.rglob("*")]), default=0.0)
    return time.time() - newest <= hours * 3600
