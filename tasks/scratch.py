"""Folders that a killed run leaves to the next one of the same plan, and that no two runs share."""

import errno
import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tasks.disk import fsync, make_folder, write_durably

logger = logging.getLogger(__name__)

PLAN = "plan.json"
LOCK = "lock"


@contextmanager
def scratch(kept: Path | None, private: Path, plan: dict[str, Any], *, durable: bool = False) -> Iterator[Path]:
    """`kept`, with what a killed run of the same plan left in it; a new folder in `private` where another run is using it.

    It is removed at the end. Scratch files are not synced to disk, so what a run left before the machine was started anew is not
    believed; they stay for the next run after a failure, but not if what the user gave is wrong or the disk is full. `durable`:
    whoever writes here syncs and checks it, and it was long in the making; it is believed, and stays after every failure.
    """
    lock = None if kept is None else _lock(kept)
    if kept is None or lock is None:
        if kept is not None:
            logger.warning("%s is used by another run, or cannot be locked: this one does without it", kept)
        with tempfile.TemporaryDirectory(prefix="scratch-", dir=private) as name:
            yield Path(name)
        return
    try:
        plan = json.loads(json.dumps(plan if durable else plan | {"booted": round(psutil.boot_time())}))
        if (left := _read(kept / PLAN)) != plan:
            if isinstance(left, dict):
                differing = sorted(name for name in {*left, *plan} if left.get(name) != plan.get(name))
                logger.warning("what an earlier run left in %s is not used: it had another %s", kept, ", ".join(differing))
            _clear(kept)
            write_durably(kept / PLAN, json.dumps(plan))
            fsync(kept)
        for unfinished in kept.rglob("*.tmp"):
            shutil.rmtree(unfinished, ignore_errors=True)
        try:
            yield kept
        except BaseException as error:
            hopeless = isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno == errno.ENOSPC)
            if (hopeless and not durable) or {path.name for path in kept.glob("*")} <= {LOCK, PLAN}:
                shutil.rmtree(kept, ignore_errors=True)
            raise
        shutil.rmtree(kept, ignore_errors=True)
    finally:
        os.close(lock)


def _lock(kept: Path) -> int | None:
    """The descriptor that holds the folder's lock; None where another process holds it. The kernel frees it when that one dies."""
    while True:
        make_folder(kept)
        try:
            lock = os.open(kept / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the run that used it removed it just now
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return None
        with suppress(FileNotFoundError):
            if os.fstat(lock).st_ino == (kept / LOCK).stat().st_ino:
                return lock
        os.close(lock)


def try_lock(kept: Path) -> int | None:
    """The lock of a folder that is there, without making one; None where another process holds it, or it is gone."""
    try:
        lock = os.open(kept / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        return None
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    os.close(lock)
    return None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name != LOCK:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
