"""The Prefect side that all steps share: a stored step shows as Cached, a running one tells the dashboard how far it is.

Only the small references go through Prefect: results are never persisted by it, because its records name their own
serializer and a planted one is executed.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import Task, task
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import BaseModel, ConfigDict

from tasks.artifacts import Artifact, Identity, Store, code_fingerprint, library_versions
from tasks.checkpoint import Checkpoints
from tasks.compute import Compute
from tasks.dashboard import Dashboard
from tasks.progress import Progress, listening
from tasks.step import follow_step, run_step

logging.getLogger("tasks").setLevel(logging.INFO)  # notes and progress lines reach the run's log (see flows/__init__.py)

TRACKERS = "trackers"
"""Folder beside the store, where experiment trackers put their files."""


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
    dashboard = Dashboard(identity)
    made_by = {"code": code_fingerprint(identity.step), **library_versions()}

    def working(folders: dict[str, Path], out: Path, kept: Path | None) -> Mapping[str, Any]:
        dashboard.start()
        final = trackers.enter_context(telling_trackers(identity, store.root.parent / TRACKERS, compute))
        checkpoints = Checkpoints(kept if resumable else None, compute.checkpoint_seconds, made_by)
        with listening(dashboard.listen):
            metrics = produce(Work(folders, out, Progress(identity.step), checkpoints))
        final(metrics)
        return metrics

    with ExitStack() as trackers:  # they are waited for when the artifact is published: their time is not the step's
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
                dashboard.finish(manifest, store.open(artifact))
        finally:
            dashboard.close()
    if outcome.cached:
        return Completed(name="Cached", message="; ".join([f"stored as {artifact.uri}", *outcome.warnings]), data=artifact)
    return Completed(message=f"{manifest.seconds:.0f} s, stored as {artifact.uri}", data=artifact)


@contextmanager
def telling_trackers(identity: Identity, folder: Path, compute: Compute) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Experiment trackers, where the user asked for some; their modules are not loaded otherwise."""
    if not compute.report_to or compute.machine_rank > 0:
        yield lambda metrics: None
        return
    from tasks.trackers import reporting

    with reporting(compute.report_to, identity, folder) as final:
        yield final
