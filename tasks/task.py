"""The Prefect side that all steps share: a stored step shows as Cached, a running one tells the dashboard how far it is.

Only the small references go through Prefect: results are never persisted by it, because its records name their own
serializer and a planted one is executed. Calls of the dashboard are best effort, from a daemon thread: an API that is away
or hangs must not cost a training run.
"""

import contextvars
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import Task, task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext
from prefect.states import Completed
from pydantic import BaseModel, ConfigDict

from tasks.artifacts import Artifact, Identity, Manifest, Store, code_fingerprint, library_versions
from tasks.checkpoint import Checkpoints
from tasks.compute import Compute
from tasks.progress import Progress, Update, listening
from tasks.step import follow_step, run_step

logger = logging.getLogger(__name__)
logging.getLogger("tasks").setLevel(logging.INFO)  # notes and progress lines reach the run's log (see flows/__init__.py)

UPDATE_SECONDS = 2.0
LOG_SECONDS = 15.0
LAST_WORDS_SECONDS = 1.5
"""How long a finished step waits for the dashboard at most."""
LARGEST_REPORT = 900_000
"""Bytes of Markdown; the API refuses much larger ones."""


def step_task(name: str) -> Callable[[Callable[..., Any]], Task[..., Any]]:
    """Prefect's @task for a step: named as everywhere, and its result kept by our store, not by Prefect."""
    return task(name=name, task_run_name=name, persist_result=False)


class Execution(BaseModel):
    """How a step is run; no part of its identity."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    store: str = "./store"
    """The artifact store: a folder, or s3://bucket/prefix."""
    compute: Compute = Compute()
    refresh: bool = False
    """Make the artifact anew, even if it is stored."""


@dataclass(frozen=True)
class Work:
    """What a step is given when it runs."""

    inputs: dict[str, Path]
    """Folders of its inputs, by their step."""
    out: Path
    """An empty folder to fill."""
    progress: Progress
    checkpoints: Checkpoints
    """Of a step that is resumable; none are kept of others."""


def conduct(
    identity: Identity,
    inputs: Mapping[str, Artifact],
    produce: Callable[[Work], Mapping[str, Any]],
    execution: Execution,
    external: Callable[[], dict[str, str]] | None = None,
    *,
    shared: bool = False,
    resumable: bool = False,
) -> State[Artifact]:
    """Run a step inside its task run; the state is Cached for a stored artifact, else Completed. The data is the reference.

    `shared`: with several machines each does its share of the work; other steps are machine 0's alone. `resumable`: it keeps
    checkpoints, and goes on from them.
    """
    store, compute = Store(execution.store), execution.compute
    if execution.refresh and compute.machines > 1:
        raise ValueError(f"--refresh {identity.step} with several machines: make it anew with one, then run with all")
    dashboard = Dashboard(identity.step)
    made_by = {"code": code_fingerprint(identity.step), **library_versions()}

    def working(folders: dict[str, Path], out: Path, kept: Path | None) -> Mapping[str, Any]:
        dashboard.start()
        checkpoints = Checkpoints(kept if resumable else None, compute.checkpoint_seconds, made_by)
        with listening(dashboard.listen):
            return produce(Work(folders, out, Progress(identity.step), checkpoints))

    try:
        if compute.machine_rank > 0:
            say = Progress(identity.step).note
            outcome = follow_step(store, identity, inputs, working if shared else None, say)
        else:
            outcome = run_step(
                store, identity, inputs, working, refresh=execution.refresh, resumable=resumable, external=external
            )  # fmt: skip
        manifest, artifact = outcome.manifest, outcome.artifact
        if not outcome.cached:
            dashboard.report = report_of(manifest, store.open(artifact))
    finally:
        dashboard.close()
    if outcome.cached:
        return Completed(name="Cached", message="; ".join([f"stored as {artifact.uri}", *outcome.warnings]), data=artifact)
    return Completed(message=f"{manifest.seconds:.0f} s, stored as {artifact.uri}", data=artifact)


class Dashboard:
    """A progress artifact and, at the end, a report for one step. Nothing here raises, and nothing waits for the API for long."""

    def __init__(self, step: str):
        self.step = step
        self.report: str | None = None
        self._percent = 0.0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._logged = time.monotonic()

    def start(self) -> None:
        if TaskRunContext.get() is None:
            return
        context = contextvars.copy_context()  # the artifacts belong to this task run
        self._thread = threading.Thread(target=lambda: context.run(self._work), daemon=True, name=f"dashboard-{self.step}")
        self._thread.start()

    def listen(self, update: Update) -> None:
        if update.step != self.step or update.note or update.total <= 0:
            return
        self._percent = min(100.0, 100.0 * update.done / update.total)
        if time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            numbers = " ".join(f"{name} {value:.4g}" for name, value in update.metrics.items())
            logger.info("%s: %s %d/%d %s", self.step, update.phase, update.done, update.total, numbers)

    def close(self) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join(LAST_WORDS_SECONDS)

    def _work(self) -> None:
        shown, artifact_id = 0.0, None
        while True:
            done = self._done.wait(UPDATE_SECONDS if artifact_id else 0)
            percent = 100.0 if done and self.report else self._percent
            try:
                if artifact_id is None:
                    created = create_progress_artifact(percent, key=f"{self.step}-progress", description=f"Progress of {self.step}")
                    artifact_id, shown = created if isinstance(created, UUID) else None, percent
                elif percent != shown:
                    update_progress_artifact(artifact_id, percent)
                    shown = percent
                if done and self.report:
                    create_markdown_artifact(self.report, key=f"{self.step}-report", description=f"Report of {self.step}")
            except Exception as error:
                logger.debug("the dashboard of %s was not reached: %s", self.step, error)
                if artifact_id is None:
                    self._done.wait(UPDATE_SECONDS)
            if done:
                return


def report_of(manifest: Manifest, folder: Path) -> str:
    """The step's own REPORT.md, else tables of what its manifest says."""
    own = folder / "REPORT.md"
    if own.is_file() and own.stat().st_size <= LARGEST_REPORT:
        return own.read_text(encoding="utf-8")
    identity = manifest.identity
    files = {name: f"{entry.bytes:,} bytes" for name, entry in manifest.files.items()}
    about = {
        "key": manifest.key,
        "seconds": round(manifest.seconds, 1),
        "peak memory": f"{manifest.peak_memory_bytes / 2**20:,.0f} MiB",
    }
    return "\n\n".join(
        [
            f"# {identity.step}",
            _table("metric", manifest.metrics),
            _table("", about),
            _table("setting", identity.config),
            _table("input", identity.inputs),
            _table("file", files),
        ]
    )


def _table(head: str, rows: Mapping[str, Any]) -> str:
    if not rows:
        return ""
    shown = (f"| {_cell(name)} | {_cell(f'{value:.6g}' if isinstance(value, float) else value)} |" for name, value in rows.items())
    return "\n".join([f"| {head} | |", "|---|---|", *shown])


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
