"""The beginning of a flow run: its log, its tags, and what an attempt before this one left behind."""

import logging
import os
import select
import stat
import threading
from contextlib import suppress
from uuid import UUID

from prefect import runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging.handlers import APILogHandler
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Crashed

logger = logging.getLogger(__name__)

_answers: dict[tuple[str, int], bool] = {}
"""Of begin_attempt, by the flow run and its count of attempts."""
LIVE = ("PENDING", "RUNNING", "SCHEDULED", "PAUSED", "CANCELLING")


def begin_attempt(*tags: str) -> bool:
    """Is this the first attempt at the flow run, and at what it is a part of? If not, the task runs that the one before left open
    are closed: those of a killed process would stay Running for ever. `tags` are added to the run's. Best effort; called before
    the first task. A flow inside this one asks again, and is told the same: it must not close what ran meanwhile."""
    _send_logs()
    _outlive_the_worker()
    run_id = runtime.flow_run.id
    try:
        with get_client(sync_client=True) as client:
            # The engine's own count was read before this attempt began.
            run = client.read_flow_run(UUID(run_id))
            attempt = (str(run_id), run.run_count)
            if not {*tags} <= {*run.tags}:
                client.update_flow_run(run_id, tags=[*run.tags, *(tag for tag in tags if tag not in run.tags)])
            if attempt in _answers:
                return _answers[attempt]
            first = all(one.run_count <= 1 for one in (run, client.read_flow_run(UUID(root_run()))))
            if not first:
                _close(client, run_id)
            _answers[attempt] = first
            return first
    except Exception as error:
        logger.debug("dead attempts were not closed: %s", error)
        return int(runtime.flow_run.run_count or 0) <= 1


class _RunLog(APILogHandler):
    """Sends a line to the run that it belongs to; one of a thread that belongs to none stays here."""

    def emit(self, record: logging.LogRecord) -> None:
        if FlowRunContext.get() or TaskRunContext.get():
            super().emit(record)


def _send_logs() -> None:
    """What this package logs belongs into the run's log. A job's logging is set up before the job imports this package, so that
    PREFECT_LOGGING_EXTRA_LOGGERS (flows/__init__.py) comes too late there."""
    for name in ("flows", "tasks"):
        package = logging.getLogger(name)
        package.setLevel(logging.INFO)
        if not any(isinstance(handler, APILogHandler) for handler in package.handlers):
            package.addHandler(_RunLog())


_watched = threading.Event()


def _outlive_the_worker() -> None:
    """A process worker that is killed takes the other end of its jobs' output with it, and rich, which prints Prefect's log, ends
    the process that prints to nobody (SystemExit). From then on a job's output goes nowhere; the API has its log."""
    pipes = [number for number in (1, 2) if "PREFECT__FLOW_RUN_ID" in os.environ and stat.S_ISFIFO(os.fstat(number).st_mode)]
    if not pipes or _watched.is_set():
        return
    _watched.set()
    broken = select.poll()
    for number in pipes:
        broken.register(number, 0)  # only that nobody reads any more

    def watch() -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        left = set(pipes)
        while left:
            for number, _ in broken.poll():
                os.dup2(nowhere, number)
                broken.unregister(number)
                left.discard(number)

    threading.Thread(target=watch, daemon=True, name="output").start()


def is_cancelling() -> bool:
    """Is it because somebody cancelled this flow run, or the one around it, that its process was told to end?"""
    # an API that is away is not waited for: the process has little time left
    with suppress(Exception), temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 1}), get_client(sync_client=True) as client:
        states = [client.read_flow_run(UUID(run_id)).state for run_id in {runtime.flow_run.id, root_run()}]
        return any(state is not None and state.is_cancelling() for state in states)
    return False


def root_run() -> str:
    """The flow run that this process was started for: this one, or the one that this one is a part of."""
    return str(os.environ.get("PREFECT__FLOW_RUN_ID") or runtime.flow_run.id)


def _close(client: SyncPrefectClient, run_id: str) -> None:
    mine = FlowRunFilter.model_validate({"id": {"any_": [run_id]}})
    live = TaskRunFilter.model_validate({"state": {"type": {"any_": list(LIVE)}}})
    left = client.read_task_runs(flow_run_filter=mine, task_run_filter=live)
    children = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate({"parent_flow_run_id": {"any_": [run_id]}}))
    jobs = {child.parent_task_run_id for child in children}  # these follow their own flow run
    for task_run in left:
        if task_run.id not in jobs:
            state: State = Crashed(message="its process was killed; the flow run was run again")
            client.set_task_run_state(task_run.id, state, force=True)
