"""What may go from a store: what dead runs left, and artifacts that no newest run, no pointer and no living run needs."""

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from tasks import scratch
from tasks.artifacts import Manifest, Store
from tasks.disk import make_folder, size_of

POINTED = 5
"""Of each pointer's newest moves, what they name stays, so that a champion can be taken back."""
FRESH_HOURS = 1.0
"""What was made just now belongs to a run that goes on, even if no step of it is running at this very moment."""


@dataclass(frozen=True)
class Garbage:
    """Something that may go. `name` is where it stands in the store."""

    kind: Literal["leftover", "checkpoints", "artifact"]
    name: str
    bytes: int


def find(store: Store, hours: float | None = None, keep: int | None = None) -> list[Garbage]:
    """What clean() would remove, the same in the same order."""
    found = [Garbage("leftover", name, size) for name, size in store.leftovers(hours)]
    left = {one.name for one in found}
    checkpoints = (Garbage("checkpoints", f"tmp/{path.name}", size_of(path)) for path in _checkpoints(store))
    found += [one for one in checkpoints if one.name not in left and f"cache: {one.name}" not in left]
    if keep is not None:
        found += [Garbage("artifact", f"{m.step}/{m.key}", m.bytes) for m in superfluous(store, keep, hours)]
    return found


def clean(store: Store, hours: float | None = None, keep: int | None = None) -> list[Garbage]:
    """Remove it; what was removed. What another process takes into use meanwhile stays."""
    gone = [Garbage("leftover", name, size) for name, size in store.leftovers(hours)]
    store.collect(hours)
    sized = ((path, size_of(path)) for path in _checkpoints(store))
    gone += [Garbage("checkpoints", f"tmp/{path.name}", size) for path, size in sized if _remove_checkpoints(path)]
    going = () if keep is None else superfluous(store, keep, hours)
    gone += [Garbage("artifact", f"{m.step}/{m.key}", m.bytes) for m in going if store.remove(m, hours)]
    return gone


# ---- artifacts


def superfluous(store: Store, keep: int, hours: float | None = None) -> Sequence[Manifest]:
    """Artifacts that only older runs need than the `keep` newest of their lineage, in an order in which nothing is left
    without its inputs: what was made from an artifact goes before it."""
    stored = {(m.step, m.key): m for m in store.list()}
    needed = _closure(stored, [*_heads_to_keep(stored, keep), *_pointed(store), *_living(store, stored, hours)])
    going = [manifest for where, manifest in stored.items() if where not in needed]
    depth = {(m.step, m.key): len(_closure(stored, [(m.step, m.key)])) for m in going}
    return sorted(going, key=lambda m: -depth[m.step, m.key])


Where = tuple[str, str]


def _closure(stored: dict[Where, Manifest], heads: Iterable[Where]) -> set[Where]:
    """These and all that they were made from."""
    found: set[Where] = set()
    waiting = list(heads)
    while waiting:
        where = waiting.pop()
        if where in stored and where not in found:
            found.add(where)
            waiting += _inputs(stored[where])
    return found


def _inputs(manifest: Manifest) -> Iterator[Where]:
    """evaluate reads the champion's artifacts too, under names such as champion_ppo."""
    for name, key in manifest.identity.inputs.items():
        yield name.removeprefix("champion_"), key


def _heads_to_keep(stored: dict[Where, Manifest], keep: int) -> Iterator[Where]:
    """The newest runs of each lineage. A run is what nothing else was made from, with all that went into it; several decisions
    on one evaluation are one run."""
    used = {where for manifest in stored.values() for where in _inputs(manifest)}
    runs: dict[Where, list[Where]] = {}
    for where, manifest in stored.items():
        if where not in used:
            evaluated = manifest.identity.inputs.get("evaluate") if manifest.step == "promote" else None
            runs.setdefault(("evaluate", evaluated) if evaluated else where, []).append(where)
    lineages: dict[tuple[str, ...], list[list[Where]]] = {}
    for heads in runs.values():
        lineages.setdefault(_lineage(stored, heads[0]), []).append(heads)
    for several in lineages.values():
        several.sort(key=lambda heads: max(stored[head].created for head in heads), reverse=True)
        for heads in several[:keep]:
            yield from heads


def _lineage(stored: dict[Where, Manifest], head: Where) -> tuple[str, ...]:
    """Runs on dumps of the same names and the same kind of base follow one another; others stand beside them."""
    found = []
    for step, key in sorted(_closure(stored, [head])):
        identity = stored[step, key].identity
        if step == "ingest":
            found += sorted(identity.external) or ["simulated"]
        elif step == "base":
            found += [str(identity.config.get("source")), str(identity.config.get("hub_id"))]
    return tuple(found)


def _pointed(store: Store) -> Iterator[Where]:
    for name in store.pointers():
        for number, pointer in enumerate(store.pointer_history(name)):
            if number == POINTED:
                break
            for step, artifact in (pointer.to.get("artifacts") or {}).items():
                yield step, str(artifact.get("key"))
            yield "ppo", str(pointer.to.get("key"))
            yield "evaluate", str(pointer.to.get("evaluate"))


def _living(store: Store, stored: dict[Where, Manifest], hours: float | None) -> Iterator[Where]:
    for name in store.in_use(hours):
        step, _, key = name.partition("/")
        yield step, key
    fresh = (datetime.now(UTC) - timedelta(hours=FRESH_HOURS)).isoformat(timespec="microseconds")
    yield from (where for where, manifest in stored.items() if manifest.created > fresh)


# ---- checkpoints


def _checkpoints(store: Store) -> Iterator[Path]:
    """Folders that a stopped step left for the next attempt, of steps that are stored by now, and that nobody holds."""
    keys: set[str] | None = None
    for path in sorted((store.root / "tmp").glob("*")):
        if path.suffix in {".kept", ".scratch"} and path.is_dir():
            keys = {m.key for m in store.list()} if keys is None else keys
            if path.stem in keys:
                with _held(path) as ours:
                    if ours:
                        yield path


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    lock = scratch.try_lock(folder)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            os.close(lock)


def _remove_checkpoints(folder: Path) -> bool:
    aside = folder.with_name(f"removed.{folder.name}.{uuid.uuid4().hex}")
    with suppress(OSError):
        make_folder(aside.parent)
        os.rename(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)
        return True
    return False
