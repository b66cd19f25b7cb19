"""One unit of work of a worker: a folder of scratch files that is there once it is whole."""

import gc
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DONE = "done.json"


@contextmanager
def unit(folder: Path) -> Iterator[Path]:
    """A folder to work in, which becomes `folder` at the end of the `with`; garbage is not collected meanwhile."""
    collecting = gc.isenabled()
    gc.disable()  # a million short-lived objects, and no cycles among them
    work = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
    work.mkdir(parents=True)
    try:
        yield work
        try:
            work.rename(folder)
        except OSError:  # another process of the same run was first, with the same
            if not (folder / DONE).exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if collecting:
            gc.enable()


def leave(work: Path, result: Mapping[str, Any]) -> None:
    """Write what became of the unit beside its files."""
    (work / DONE).write_text(json.dumps(result))


def left(folder: Path) -> dict[str, Any] | None:
    """What an earlier run left of a unit; None where it did not come to its end."""
    try:
        found: dict[str, Any] = json.loads((folder / DONE).read_text())
    except (OSError, ValueError):
        return None
    return found
