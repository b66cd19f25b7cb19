"""`compute.executor=pool`: each step that is not stored is a flow run of its own deployment, a job on a work pool.

The store is what counts: a step is done when its artifact is there, whatever became of its job. A job is submitted once per parent
flow run and key. A parent that is run again finds it: a live one is waited for, a dead one runs again in place, and goes on from
its checkpoint. An API that is away is waited for.
"""

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect import Flow, Task, runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State, StateType, TaskRun, TaskRunResult
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError, TerminationSignal
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelling, Completed, Pending, Scheduled

from flows.attempts import is_cancelling, root_run
from flows.presets import STEPS, RLHFConfig, Step
from tasks.artifacts import Artifact, Identity, Manifest, Pointer, Store
from tasks.champion import inputs as champion_inputs
from tasks.compute import Compute
from tasks.promote.task import unmoved
from tasks.step import Event, Outcome, StepFailed, made_by_others, tell
from tasks.task import step_task

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
AWAY_SECONDS = 1800.0
"""How long an API may be away."""
SHORT_SECONDS = 5.0
"""Not worth a word: a busy server with its database in sqlite answers 503 now and then."""
LATE_SECONDS = 15.0
"""A job that no worker has taken after so long is worth a warning."""
REMIND_SECONDS = 300.0
LOOK_SECONDS = 30.0
"""Between two looks into the store for the artifact of a running job."""
SILENT_SECONDS = 120.0
"""A job that has published its artifact, and does not say so for so long, has lost the API: its artifact is taken."""
SETTLED_SECONDS = 8.0
"""Old enough for a crash to be over: a worker reports one twice, some seconds apart, and the second report would end a job that
runs again by then."""
DEPLOY = "python deployments/install.py"

Answer = TypeVar("Answer")
Inputs = Mapping[str, Artifact | Pointer | None]


class JobFailed(StepFailed):
    """The job of a step ended without its artifact."""

    def __init__(self, step: str, why: str):
        RuntimeError.__init__(self, f"{step} failed: {why}")
        self.step = step


def pool_of(step: Step, config: RLHFConfig) -> str:
    """The work pool that a step needs: a model from scratch is trained, any other is only fetched."""
    if step == "base":
        return "gpu" if config.base.source == "scratch" else "cpu"
    return "cpu" if step in {"ingest", "promote"} else "gpu"


class Pools:
    """Runs the steps of one parent flow run as jobs. ValueError where a deployment is missing, before anything has run."""

    def __init__(
        self,
        config: RLHFConfig,
        store: Store,
        compute: Compute,
        refresh: Sequence[Step] = (),
        until: Step | None = None,
        first: bool = True,
    ):
        """`first`: this is the parent's first attempt."""
        if not PREFECT_API_URL.value():
            raise ValueError(
                "compute.executor=pool needs a Prefect server with workers, and PREFECT_API_URL is not set: start one "
                "(prefect server start), set PREFECT_API_URL=http://127.0.0.1:4200/api, or use compute.executor=inline"
            )
        self.config, self.store, self.refresh, self.first = config, store, refresh, first
        self.compute = compute.model_copy(update={"executor": "inline"})
        for step in STEPS[: STEPS.index(until) + 1] if until else STEPS:
            name = f"{step}/{pool_of(step, config)}"
            if not _deployed(name):
                raise ValueError(f"there is no deployment {name} on {PREFECT_API_URL.value()}: make it with {DEPLOY}")

    def task(self, step: Step) -> Task[..., Any]:
        """The task of the parent flow that stands for the step."""

        def job(identity: Identity, **inputs: Artifact | Pointer | None) -> State[Artifact]:
            try:
                outcome = self._outcome(step, identity, inputs)
            except Exception:
                tell(Event(step, "failed"))
                raise
            tell(Event(step, "stored" if outcome.cached else "ran", outcome))
            where = f"stored as {outcome.artifact.uri}"
            if outcome.cached:
                return Completed(name="Cached", message="; ".join([where, *outcome.warnings]), data=outcome.artifact)
            return Completed(message=f"{outcome.manifest.seconds:.0f} s, {where}", data=outcome.artifact)

        return step_task(step)(job)

    def _outcome(self, step: Step, identity: Identity, inputs: Inputs) -> Outcome:
        started = time.monotonic()
        given = {name: artifact for name, artifact in inputs.items() if isinstance(artifact, Artifact)}
        digests = {name: given[name].digest for name in identity.inputs if name in given}
        if step == "evaluate":
            champion: Any = inputs["champion"]
            digests |= {name: one.digest for name, one in champion_inputs(self.store, champion).items()}
        refresh = step in self.refresh
        if not refresh and (manifest := self._stored(step, identity, digests, inputs)) is not None:
            warnings = made_by_others(manifest)
            for warning in warnings:
                logger.warning(warning)
            return Outcome(self.store.artifact(manifest), manifest, True, time.monotonic() - started, warnings)
        tell(Event(step, "running"))
        parameters = {
            "config": getattr(self.config, step).model_dump(mode="json"),
            **{name: value.model_dump(mode="json") for name, value in inputs.items() if value is not None},
            "store": self.store.uri,
            "compute": self.compute.model_dump(mode="json"),
            "refresh": refresh,
        }
        child = self._child(step, identity, parameters)
        try:
            if _state(child).is_cancelling():
                child = self._end(step, child, identity, digests, refresh)
            if _state(child).is_final() and not (_state(child).is_completed() and self._stored(step, identity, digests, inputs)):
                logger.info("%s: its job had ended %s; it runs again in place", step, _state(child).name)
                child = _revive(child, parameters)
            elif child.run_count:
                logger.info("%s: its job is %s; waiting for it", step, _state(child).name)
            child = self._end(step, child, identity, digests, refresh)
        except (TerminationSignal, KeyboardInterrupt):
            with suppress(Exception):
                if is_cancelling():  # the hook below comes to it too, but first a process has to start for it
                    _cancel(child.id, f"{runtime.flow_run.name} was cancelled")
                else:
                    logger.warning("the job of %s goes on; to end it: prefect flow-run cancel %s", step, child.id)
            raise
        manifest = self.store.find(identity, digests)
        if _state(child).is_final() and not _state(child).is_completed():
            why = _why(step, _state(child))
            if refresh or self._stored(step, identity, digests, inputs) is None:
                raise JobFailed(step, f"{why}; {self._remedy()}")
            logger.warning("%s: %s, after it had stored its artifact; going on", step, why)
        if manifest is None:
            raise JobFailed(
                step, f"its job is Completed, but {self.store.uri} has no such artifact: does the worker see this store?"
            )
        return Outcome(self.store.artifact(manifest), manifest, False, time.monotonic() - started)

    def _stored(self, step: Step, identity: Identity, digests: dict[str, str], inputs: Inputs) -> Manifest | None:
        """A local store is read whole. One on S3 would have to be fetched for that: only when a run is repeated, perhaps because
        a job found something damaged."""
        whole = "://" not in self.store.uri or not self.first
        manifest = (self.store.load if whole else self.store.find)(identity, digests)
        if manifest is None or step != "promote":
            return manifest
        evaluate = inputs["evaluate"]
        assert isinstance(evaluate, Artifact)
        return None if unmoved(self.store, self.config.promote, evaluate.key, manifest) else manifest

    def _child(self, step: Step, identity: Identity, parameters: dict[str, Any]) -> FlowRun:
        """Submitted, or found again: what run_deployment(as_subflow=True) does, in a way that may be asked for twice."""
        name, parent = f"{step}/{pool_of(step, self.config)}", runtime.flow_run
        here: dict[str, Any] = {"__parents__": [TaskRunResult(id=runtime.task_run.id)]}

        def submit(client: SyncPrefectClient) -> FlowRun:
            deployment = client.read_deployment_by_name(name)
            link: TaskRun = client.create_task_run(
                Task(fn=lambda: None, name=name), parent.id, identity.key, name=name, state=Pending(), task_inputs=here
            )
            return client.create_flow_run_from_deployment(
                deployment.id,
                parameters=parameters,
                state=Scheduled(),
                name=f"{step} of {parent.name}",
                tags=["stackrlhf", step, self.config.name],
                idempotency_key=f"{parent.id}:{identity.key}",
                parent_task_run_id=link.id,
            )

        return patiently(submit)

    def _end(self, step: Step, child: FlowRun, identity: Identity, digests: dict[str, str], refresh: bool) -> FlowRun:
        """The child once it is final; or still running, where its artifact has been in the store for a while."""
        pool = pool_of(step, self.config)
        since = warned = looked = time.monotonic()
        began, published = datetime.now(UTC).isoformat(timespec="microseconds"), None
        late = LATE_SECONDS
        while not _state(child).is_final():
            time.sleep(POLL_SECONDS)
            child = _read(child.id)
            now = time.monotonic()
            if _state(child).is_scheduled() or _state(child).is_pending():
                if now - warned > late:
                    warned, late = now, REMIND_SECONDS
                    logger.warning("%s waits since %.0f s: %s", step, now - since, _waits_for(child, pool))
            elif now - looked > LOOK_SECONDS:
                looked = now
                manifest = self.store.find(identity, digests)
                if manifest is not None and not (refresh and manifest.created < began):
                    published = published or now
                    if now - published > SILENT_SECONDS:
                        logger.warning("%s: its artifact is stored, but its job does not say that it ended; going on", step)
                        break
        return child

    def _remedy(self) -> str:
        if runtime.deployment.id:
            return f"to go on: prefect flow-run retry {root_run()}"
        return "run the same command to go on"


def patiently(ask: Callable[[SyncPrefectClient], Answer]) -> Answer:
    """What the API answers; asked again, for half an hour, while it is away."""
    since, pause, told = time.monotonic(), 0.2, False
    while True:
        try:
            # The client's own way of waiting doubles its pauses: it would come back long after the API did.
            with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(sync_client=True) as client:
                answer = ask(client)
            if told:
                logger.warning("the API of Prefect is back after %.0f s", time.monotonic() - since)
            return answer
        except (httpx.TransportError, PrefectHTTPStatusError) as error:
            status = error.response.status_code if isinstance(error, PrefectHTTPStatusError) else 503
            away = time.monotonic() - since
            if (status not in {408, 429} and status < 500) or away > AWAY_SECONDS:
                raise
            if away > SHORT_SECONDS and not told:
                said = " ".join(str(error).split())[:200]
                logger.warning("the API of Prefect is away (%s: %s): waiting for it", type(error).__name__, said)
                told = True
            time.sleep(pause)
            pause = min(2 * pause, 2 * POLL_SECONDS)


def cancel_jobs(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    """The on_cancellation hook of a pipeline, and of what runs one: the live jobs below it are cancelled too."""
    children = FlowRunFilter.model_validate({"parent_flow_run_id": {"any_": [flow_run.id]}})
    for child in patiently(lambda client: client.read_flow_runs(flow_run_filter=children)):
        if child.deployment_id is None:  # no job but a flow within this one
            cancel_jobs(flow, child, state)
        elif not _state(child).is_final() and not _state(child).is_cancelling():
            _cancel(child.id, f"{flow_run.name} was cancelled")


def _cancel(run_id: UUID, why: str) -> None:
    state: State = Cancelling(message=why)
    patiently(lambda client: client.set_flow_run_state(run_id, state))


def _deployed(name: str) -> bool:
    try:
        return bool(patiently(lambda client: client.read_deployment_by_name(name)))
    except ObjectNotFound:
        return False


def _read(run_id: UUID) -> FlowRun:
    return patiently(lambda client: client.read_flow_run(run_id))


def _state(run: FlowRun) -> State:
    assert run.state is not None, f"{run.id} has no state"
    return run.state


def _revive(child: FlowRun, parameters: dict[str, Any]) -> FlowRun:
    """The same flow run once more: what it had kept is found again, and its history stays in one place."""

    ended = _state(child)
    if ended.is_crashed():
        time.sleep(max(0.0, SETTLED_SECONDS - abs((datetime.now(UTC) - ended.timestamp).total_seconds())))

    def revive(client: SyncPrefectClient) -> FlowRun:
        client.update_flow_run(child.id, parameters=parameters)
        client.set_flow_run_state(child.id, Scheduled(message="run again by its pipeline"), force=True)
        return client.read_flow_run(child.id)

    return patiently(revive)


def _why(step: str, state: State) -> str:
    """One line on why a job ended, from its state."""
    said = " ".join((state.message or "").split())
    for prefix in ("Flow run encountered an exception:", "StepFailed:", f"{step} failed:"):
        said = said.removeprefix(prefix).strip()
    if state.type == StateType.CANCELLED:
        return "its job was cancelled"
    if re.search(r"status code:? (-9|137)\.", said):
        return "its job was killed (exit status 137, SIGKILL): most likely the machine, or its container, had no memory left"
    return f"its job crashed: {said}" if state.type == StateType.CRASHED else said or f"its job ended {state.name}"


def _waits_for(child: FlowRun, pool: str) -> str:
    """Why a job has not begun, and what helps."""
    if _state(child).is_pending():
        return (
            "a worker has taken it, and it has not begun (an image to fetch, a node to start?); where that worker died, "
            f"end it with prefect flow-run cancel {child.id} and retry the pipeline"
        )
    try:
        workers = patiently(lambda client: client.read_workers_for_work_pool(pool))
    except Exception as error:
        return f"the workers of pool {pool} could not be asked for ({error})"
    if online := [worker.name for worker in workers if worker.status == "ONLINE"]:
        return f"pool {pool} has {', '.join(online)}, busy with other jobs up to its --limit"
    start = "prefect worker start --pool cpu"
    if pool == "gpu":
        start = "CUDA_VISIBLE_DEVICES=0 prefect worker start --pool gpu --name $(hostname)-gpu0 --limit 1"
    return f"no worker of pool {pool} is online; start one: PREFECT_API_URL={PREFECT_API_URL.value()} {start}"
