"""Checks of the artifact store: does the place keep what the store promises? Probes are written, and removed again."""

import errno
import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from flows.commands.doctor import Check
from tasks.artifacts import Store, StoreError
from tasks.disk import fsync

SKEW_WARN, SKEW_FAIL = 60, 900
"""Seconds between two clocks; S3 refuses requests from 15 minutes on."""


def store(store: Store) -> Iterator[Check]:
    if store.uri.startswith("s3://"):
        yield from _bucket(store.uri)
        yield from _folder(store.root, "cache")
    else:
        yield from _folder(store.root, "store")


def _folder(root: Path, what: str) -> Iterator[Check]:
    place = next(folder for folder in (root, *root.parents) if folder.is_dir())
    try:
        probe = Path(tempfile.mkdtemp(prefix=".stackrlhf-doctor-", dir=place))
    except OSError as error:
        yield Check(what, "fail", f"{place} cannot be written ({error.strerror})", "mend its permissions, or name another --store")
        return
    try:
        lacking = list(_lacking(probe))
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    kind = _file_system(place)
    name = f"{root}{'' if place == root else ' (not made yet)'}, {kind or 'file system not known'}"
    if lacking:
        yield Check(what, "fail", f"{name}: {', '.join(lacking)}", "name another --store: a local disk, or s3://bucket/prefix")
    elif kind in {"tmpfs", "ramfs"}:
        yield Check(what, "warn", f"{name}: in memory, gone when the machine is started anew", "name another --store")
    else:
        yield Check(what, "ok", f"{name}: writes, rename, fsync, links and locks work")


def _lacking(probe: Path) -> Iterator[str]:
    """What publishing and checkpoints rely on."""
    one, two = probe / "one", probe / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "file").write_text("x")
    try:
        fsync(one / "file")
        fsync(one)
    except OSError:
        yield "no fsync"
    try:
        os.rename(one, two)
        yield "rename puts a folder over one that is not empty"
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            yield "no rename of folders"
    try:
        os.rename(one, probe / "three")
    except OSError:
        yield "no rename of folders"
    try:
        os.link(two / "file", probe / "link")
        os.link(two / "file", probe / "link")
        yield "a link replaces a file"
    except FileExistsError:
        pass
    except OSError:
        yield "no hard links"
    try:
        with (two / "file").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        yield "no file locks"


def _file_system(place: Path) -> str:
    """Its kind, by the longest mount point above."""
    best, kind = "", ""
    try:
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, mount, found, *_ = line.split()
            if place.resolve().is_relative_to(mount) and len(mount) >= len(best):
                best, kind = mount, found
    except (OSError, ValueError):
        return ""
    return kind


def _bucket(uri: str) -> Iterator[Check]:
    """Reachable, writable, conditional writes, and the clock. The texts of tasks.s3 hold no secret."""
    from tasks.s3 import Bucket, Taken

    bucket = Bucket(uri)
    name = f"leases/doctor-{uuid.uuid4().hex}.json"
    try:
        skew = abs((bucket.time() - datetime.now(UTC)).total_seconds())
        bucket.put(name, b"{}", replaces=None)
        try:
            bucket.put(name, b"{}", replaces=None)
            conditional = False
        except Taken:
            conditional = True
        finally:
            bucket.delete([name])
    except (ValueError, StoreError) as error:
        told, _, remedy = str(error).removeprefix(f"store {uri}: ").partition(": ")
        yield Check("store", "fail", f"{uri}: {told}", remedy)
        return
    if conditional:
        yield Check("store", "ok", f"{uri}: can be listed, written and cleaned, and writes can be conditional")
    else:
        text = f"{uri}: writes with If-None-Match are not refused where there is an object already"
        yield Check("store", "fail", text, "two runs could write one artifact: use a server that has conditional writes")
    text = f"{skew:.0f} s from the bucket's"
    if skew > SKEW_WARN:
        yield Check(
            "clock", "fail" if skew > SKEW_FAIL else "warn", text, "set this machine's clock: systemctl start systemd-timesyncd"
        )
    else:
        yield Check("clock", "ok", text)
