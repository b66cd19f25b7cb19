"""Running one step: key -> stored already? -> produce -> publish. Plain Python, whoever conducts."""

import logging
import re
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from tasks.artifacts import (
    Artifact,
    Identity,
    Manifest,
    Store,
    StoreError,
    code_fingerprint,
    disk_error,
    is_disk_trouble,
    library_versions,
)
from tasks.interrupt import deferring
from tasks.scratch import scratch

logger = logging.getLogger(__name__)

Produce = Callable[[dict[str, Path], Path, Path | None], Mapping[str, Any]]
"""(folders of the inputs by name, empty folder to fill, folder of checkpoints or None) -> headline metrics."""

WAIT_SECONDS = 1.0


class StepFailed(RuntimeError):
    """A step raised; the cause is chained."""

    def __init__(self, step: str, cause: BaseException):
        super().__init__(f"{step} failed: {describe(cause)}")
        self.step = step


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    artifact: Artifact
    manifest: Manifest
    cached: bool
    seconds: float
    """Taken now; the manifest keeps what producing the artifact took."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Event:
    """A moment in the life of a step, for whoever shows it."""

    step: str
    state: Literal["running", "stored", "ran", "failed"]
    outcome: Outcome | None = None


_watchers: list[Callable[[Event], None]] = []


@contextmanager
def watching(watcher: Callable[[Event], None]) -> Iterator[None]:
    """Every step that this process runs inside the `with` is told to `watcher`."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def tell(event: Event) -> None:
    """To everyone who watches."""
    for watcher in tuple(_watchers):
        try:
            watcher(event)
        except Exception:  # a broken display must not cost a training run
            logger.warning("a watcher failed", exc_info=True)


def run_step(
    store: Store,
    identity: Identity,
    inputs: Mapping[str, Artifact],
    produce: Produce,
    *,
    refresh: bool = False,
    resumable: bool = False,
    external: Callable[[], dict[str, str]] | None = None,
) -> Outcome:
    """The artifact of `identity`: from the store, or produced and published.

    `refresh` produces it even if it is stored. `external` is asked again at the end, because a dump that changed while it
    was read would stand under the wrong key. A `resumable` step gets a folder that stays when it ends without an artifact, for
    whoever makes the same next, and ends on SIGTERM at its next boundary.
    """
    step = identity.step
    started = time.monotonic()
    digests = {name: artifact.digest for name, artifact in inputs.items()}
    try:
        if not refresh and (manifest := store.load(identity, digests)) is not None:
            warnings = made_by_others(manifest)
            for warning in warnings:
                logger.warning(warning)
            outcome = Outcome(store.artifact(manifest), manifest, True, time.monotonic() - started, warnings)
            tell(Event(step, "stored", outcome))
            return outcome
        tell(Event(step, "running"))
        folders = {name: store.open(artifact) for name, artifact in inputs.items()}
        with deferring() if resumable else nullcontext():
            with store.attempt(identity.key) as out, _checkpoints(out, identity.key, digests, refresh, resumable) as kept:
                before = time.monotonic()
                with measured_memory() as memory:
                    try:
                        metrics = produce(folders, out, kept)
                    except Exception as error:
                        if is_disk_trouble(error):
                            raise disk_error(error, out) from error
                        raise
                seconds = time.monotonic() - before
                if changed := [name for name, artifact in inputs.items() if not store.unchanged(artifact)]:
                    raise StoreError(f"{', '.join(changed)} was replaced by another run while {step} read it; run again")
                if external is not None and (now := external()) != identity.external:
                    differing = sorted(name for name in {*now, *identity.external} if now.get(name) != identity.external.get(name))
                    raise StoreError(f"{', '.join(differing)} changed while {step} read it; run again")
                manifest = store.publish(
                    out,
                    identity,
                    metrics=metrics,
                    seconds=seconds,
                    peak_memory_bytes=memory.peak,
                    input_digests=digests,
                    replace=refresh,
                )
            outcome = Outcome(store.artifact(manifest), manifest, False, time.monotonic() - started)
            tell(Event(step, "ran", outcome))
        return outcome
    except Exception as error:
        tell(Event(step, "failed"))
        raise StepFailed(step, error) from error


def _checkpoints(
    out: Path, key: str, digests: Mapping[str, str], refresh: bool, resumable: bool
) -> AbstractContextManager[Path | None]:
    """The folder that a killed run leaves to the next one: beside the attempts, found by the step's key.

    A refresh goes on from what a refresh left, and from nothing else.
    """
    if not resumable:
        return nullcontext()
    plan = {"inputs": dict(digests), "refresh": refresh}
    return scratch(kept_folder(out, key), out.parent, plan, durable=True)


def kept_folder(out: Path, key: str) -> Path:
    """Where checkpoints of the step `key` stay while an attempt at it fills `out`."""
    return out.parents[1] / f"{key}.kept"


def follow_step(
    store: Store, identity: Identity, inputs: Mapping[str, Artifact], share: Produce | None, say: Callable[[str], None]
) -> Outcome:
    """The artifact of `identity` on a machine that publishes none: it does its share of the work and waits for who does."""
    step = identity.step
    started = time.monotonic()
    digests = {name: artifact.digest for name, artifact in inputs.items()}
    try:
        manifest = store.load(identity, digests)
        cached = manifest is not None
        if manifest is None:
            tell(Event(step, "running"))
            if share is not None:
                folders = {name: store.open(artifact) for name, artifact in inputs.items()}
                with deferring(), store.attempt(identity.key) as out:
                    share(folders, out, kept_folder(out, identity.key))
            say("waiting for machine 0, which publishes it")
            while (manifest := store.find(identity, digests)) is None:
                time.sleep(WAIT_SECONDS)
        outcome = Outcome(store.artifact(manifest), manifest, cached, time.monotonic() - started)
        tell(Event(step, "stored" if cached else "ran", outcome))
        return outcome
    except Exception as error:
        tell(Event(step, "failed"))
        raise StepFailed(step, error) from error


def describe(error: BaseException) -> str:
    """An exception in one line; what a user can mend (ValueError, StoreError) without the class's name."""
    text = " ".join(str(error).split())
    return (
        text if isinstance(error, ValueError | StoreError | StepFailed) and text else f"{type(error).__name__}: {text}".rstrip(": ")
    )


# ---- what is known before it runs


@dataclass(frozen=True)
class StepPlan:
    """Is the step stored, or why would it run? `last`: the stored artifact, or the one most like it."""

    identity: Identity
    stored: bool
    why: str
    last: Manifest | None
    warnings: tuple[str, ...] = ()
    differences: tuple[str, ...] = field(default=())


def plan_step(store: Store, identity: Identity, input_digests: Mapping[str, str], refresh: bool = False) -> StepPlan:
    """`input_digests` of the inputs that are stored; those that are not are taken to come out as before."""
    found = store.find(identity, input_digests)
    if found is not None and not refresh:
        return StepPlan(identity, True, "stored", found, made_by_others(found))
    if found is not None:
        return StepPlan(identity, False, "refresh was asked for", found)
    candidates = store.manifests(identity.step)
    if any(m.key == identity.key for m in candidates):
        last = next(m for m in candidates if m.key == identity.key)
        changed = [name for name, digest in input_digests.items() if last.input_digests.get(name) != digest]
        return StepPlan(identity, False, f"{', '.join(changed)} was recomputed with another content", last)
    if not candidates:
        return StepPlan(identity, False, f"no {identity.step} is stored yet", None)
    last = min(reversed(candidates), key=lambda m: len(differences(m.identity, identity)))
    differing = differences(last.identity, identity)
    own = [line for line in differing if not line.startswith("input ")]
    others = [name for name, key in identity.inputs.items() if last.identity.inputs.get(name) != key]
    why = "; ".join([*own, *([f"new {', '.join(others)}"] if others else [])])
    return StepPlan(identity, False, why, last, differences=tuple(differing))


def differences(old: Identity, new: Identity) -> list[str]:
    """The fields in which two identities differ, a line each."""
    before, after = flat(old.config), flat(new.config)
    changes: list[tuple[str, Any, Any]] = [("version", old.version, new.version)]
    changes += [(f"{new.step}.{name}", before.get(name, "-"), after.get(name, "-")) for name in {**after, **before}]
    for kind, was, now in (("input", old.inputs, new.inputs), ("content of", old.external, new.external)):
        changes += [(f"{kind} {name}", was.get(name, "-")[:12], now.get(name, "-")[:12]) for name in sorted({*was, *now})]
    return [f"{name}: {was} -> {now}" for name, was, now in changes if was != now]


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    if isinstance(value, dict) and value:
        return {k: v for key, part in value.items() for k, v in flat(part, f"{name}.{key}" if name else str(key)).items()}
    return {name: value}


def made_by_others(manifest: Manifest) -> tuple[str, ...]:
    """Warnings: the artifact was made by other code or other libraries than these."""
    found = []
    if manifest.code != code_fingerprint(manifest.step):
        found.append(
            f"the stored {manifest.step} was made by other code (no VERSION was raised); --refresh {manifest.step} makes it anew"
        )
    mine = library_versions()
    others = [f"{name} {was} (now {mine[name]})" for name, was in manifest.libraries.items() if mine.get(name, was) != was]
    if others:
        found.append(f"the stored {manifest.step} was made with {', '.join(others)}")
    return tuple(found)


# ---- memory


BESIDE = re.compile(r"prefect|tasks\.tracker")
"""Command lines of children that are not the step's work."""


@dataclass
class Memory:
    peak: int = 0


@contextmanager
def measured_memory(every: float = 1.0) -> Iterator[Memory]:
    """Peak resident bytes inside the `with`: the kernel's own high-water mark, and samples of this process with its children."""
    memory, stop = Memory(), threading.Event()
    reset = False
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        reset = True

    def sample() -> None:
        while not stop.wait(every):
            with suppress(psutil.Error, OSError):
                memory.peak = max(memory.peak, resident_bytes())

    thread = threading.Thread(target=sample, daemon=True, name="memory")
    thread.start()
    try:
        yield memory
    finally:
        stop.set()
        thread.join(timeout=every + 1)
        memory.peak = max(memory.peak, high_water_mark() if reset else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def resident_bytes() -> int:
    """Memory that this process and the children that work for it hold now: not Prefect's own server, not trackers."""
    own = psutil.Process()
    total = own.memory_info().rss
    for child in own.children():
        with suppress(psutil.Error):
            if not BESIDE.search(" ".join(child.cmdline())):
                total += sum(process.memory_info().rss for process in (child, *child.children(recursive=True)))
    return int(total)


def high_water_mark() -> int:
    """VmHWM in bytes; where there is no /proc, the process's maximum."""
    with suppress(OSError, StopIteration):
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
