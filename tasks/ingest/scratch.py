"""Scratch space of a run that a killed run leaves to the next one of the same plan, and that no two runs share."""

import errno
import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

PLAN = "plan.json"
LOCK = "lock"


@contextmanager
def scratch(kept: Path | None, private: Path, plan: dict[str, Any]) -> Iterator[Path]:
    """`kept`, with what a killed run of the same plan left in it; a new folder in `private` where another run is using it.

    Nothing in it is synced to disk, so what a run left before the machine was started anew is not believed. It is removed at the
    end, and when what the user gave is wrong or the disk is full; other failures leave it for the next run.
    """
    if kept is None:
        with tempfile.TemporaryDirectory(prefix="scratch-", dir=private) as name:
            yield Path(name)
        return
    kept.mkdir(parents=True, exist_ok=True)
    with (kept / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            with scratch(None, private, plan) as folder:
                yield folder
            return
        plan = json.loads(json.dumps(plan | {"booted": round(psutil.boot_time())}))
        if _read(kept / PLAN) != plan:
            _clear(kept)
            (kept / PLAN).write_text(json.dumps(plan))
        for unfinished in kept.rglob("*.tmp"):
            shutil.rmtree(unfinished, ignore_errors=True)
        try:
            yield kept
        except (ValueError, OSError) as error:
            if isinstance(error, ValueError) or error.errno == errno.ENOSPC:
                shutil.rmtree(kept, ignore_errors=True)
            raise
        shutil.rmtree(kept, ignore_errors=True)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name != LOCK:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
