"""The pipeline's side of jobs on work pools: a real server, and a thread that does what workers do, in this process.

tests/flows/test_pool.py and test_pool_kills.py have real workers.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import pytest

pytestmark = pytest.mark.usefixtures("prefect_server")

SMALL = {"ingest.simulate.questions": 60, "base.scratch.steps": 1}
KILLED = "Process exited with status code: 137. Process was killed, likely due to an out-of-memory (OOM) condition."


def client() -> Any:
    from prefect.client.orchestration import get_client

    return get_client(sync_client=True)


@pytest.fixture(scope="module")
def deployed(prefect_server) -> dict[UUID, Any]:
    """The first two steps' deployments on pools without workers; their flows by the deployments' ids."""
    from prefect.client.schemas.actions import WorkPoolCreate

    from flows import steps

    made = {}
    with client() as api:
        for pool, flow in (("cpu", steps.ingest), ("gpu", steps.base)):
            api.create_work_pool(WorkPoolCreate(name=pool, type="process"))
            made[api.create_deployment(api.create_flow(flow), name=pool, work_pool_name=pool)] = flow
    return made


@contextmanager
def worker(deployed: dict[UUID, Any], *deeds: str) -> Iterator[None]:
    """Takes the jobs as they come: it does the first deed with the first of them, and so on; does nothing once these are done."""
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.flow_engine import run_flow
    from prefect.states import Crashed, Running

    scheduled = FlowRunFilter.model_validate({"state": {"type": {"any_": ["SCHEDULED"]}}, "deployment_id": {"any_": [*deployed]}})
    stop = threading.Event()

    def work() -> None:
        left = list(deeds)
        while left and not stop.wait(0.2):
            with client() as api:
                for run in api.read_flow_runs(flow_run_filter=scheduled):
                    deed = left.pop(0)
                    if deed == "run":
                        run_flow(deployed[run.deployment_id], flow_run=run, return_type="state")
                    else:
                        api.set_flow_run_state(run.id, Running(), force=True)
                        api.set_flow_run_state(run.id, Crashed(message=KILLED), force=True)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield
    stop.set()
    thread.join(60)


def pipeline(store: Any, **more: Any) -> Any:
    from flows.presets import resolve
    from flows.rlhf import rlhf
    from tasks.compute import Compute

    compute = Compute(executor="pool", threads=1, workers=1)
    return rlhf(config=resolve("ci", SMALL), store=str(store), compute=compute, return_state=True, **more)


def again(state: Any) -> Any:
    """`prefect flow-run retry`, and the worker's side of it."""
    from prefect.flow_engine import run_flow
    from prefect.states import AwaitingRetry

    from flows.rlhf import rlhf

    run_id = state.state_details.flow_run_id
    with client() as api:
        api.set_flow_run_state(run_id, AwaitingRetry(), force=True)
        return run_flow(rlhf, flow_run=api.read_flow_run(run_id), return_type="state")


def jobs(state: Any) -> list[Any]:
    from prefect.client.schemas.filters import FlowRunFilter

    with client() as api:
        mine = FlowRunFilter.model_validate({"parent_flow_run_id": {"any_": [state.state_details.flow_run_id]}})
        return sorted(api.read_flow_runs(flow_run_filter=mine), key=lambda run: run.created)


def states_of(run_id: UUID, name: str) -> list[str]:
    from prefect.client.schemas.filters import FlowRunFilter

    with client() as api:
        mine = FlowRunFilter.model_validate({"id": {"any_": [run_id]}})
        return sorted(run.state.name for run in api.read_task_runs(flow_run_filter=mine) if run.name == name)


def task_runs(state: Any, name: str) -> list[str]:
    from prefect.client.schemas.filters import FlowRunFilter

    until = time.monotonic() + 20
    while True:
        with client() as api:
            mine = FlowRunFilter.model_validate({"id": {"any_": [state.state_details.flow_run_id]}})
            states = [run.state for run in api.read_task_runs(flow_run_filter=mine) if run.name == name]
        if (states and all(one.is_final() for one in states)) or time.monotonic() > until:
            return sorted(one.name for one in states)
        time.sleep(0.2)


def test_a_dead_job_fails_the_pipeline_and_its_retry_runs_the_same_job_again(deployed, tmp_path):
    from prefect import Task
    from prefect.states import Running

    with worker(deployed, "be killed", "run"):
        failed = pipeline(tmp_path / "store", until="ingest")
        assert failed.is_failed()
        assert "ingest failed: its job was killed (exit status 137" in failed.message
        (job,) = jobs(failed)
        with client() as api:  # what a killed pipeline leaves behind
            run_id = failed.state_details.flow_run_id
            api.create_task_run(Task(fn=lambda: None, name="left"), run_id, "left", name="left", state=Running())
        done = again(failed)
    assert done.is_completed(), done
    (same,) = jobs(done)
    assert same.id == job.id
    assert same.state.is_completed()
    assert task_runs(done, "left") == ["Crashed"]
    assert task_runs(done, "ingest") == ["Completed", "Failed"]
    assert task_runs(done, "ingest/cpu") == ["Completed"]
    stored = pipeline(tmp_path / "store", until="ingest")
    assert jobs(stored) == []
    assert task_runs(stored, "ingest") == ["Cached"]


def test_a_refresh_counts_for_the_first_attempt_only(deployed, tmp_path):
    with worker(deployed, "run", "run", "be killed"):
        assert pipeline(tmp_path / "store", until="ingest").is_completed()
        failed = pipeline(tmp_path / "store", until="base", refresh=["ingest"])
    assert failed.is_failed()
    ingest, base = jobs(failed)
    assert ingest.parameters["refresh"]
    assert ingest.state.name == "Completed"  # not Cached: it was made anew
    with worker(deployed, "run"):
        done = again(failed)
    assert done.is_completed(), done
    assert [(run.id, run.run_count) for run in jobs(done)] == [(ingest.id, ingest.run_count), (base.id, base.run_count + 1)]


def test_the_hook_of_a_cancelled_pipeline_cancels_the_jobs_that_live_and_no_others(deployed, tmp_path):
    from prefect.states import Scheduled

    from flows.pool import cancel_jobs
    from flows.rlhf import rlhf

    with worker(deployed, "run", "be killed"):
        failed = pipeline(tmp_path / "store", until="base")
    ingest, base = jobs(failed)
    with client() as api:
        api.set_flow_run_state(base.id, Scheduled(), force=True)
        cancel_jobs(rlhf, api.read_flow_run(failed.state_details.flow_run_id), failed)
    assert [run.state.name for run in jobs(failed)] == [ingest.state.name, "Cancelled"]


def test_a_job_that_no_worker_takes_is_warned_of_with_the_command_that_starts_one(deployed, tmp_path, monkeypatch, caplog):
    from flows import pool

    monkeypatch.setattr(pool, "LATE_SECONDS", 1.0)

    def late() -> None:
        wanted = time.monotonic() + 30
        while "ingest waits since" not in caplog.text and time.monotonic() < wanted:
            time.sleep(0.2)
        with worker(deployed, "run"):
            done.wait(60)

    done = threading.Event()
    thread = threading.Thread(target=late, daemon=True)
    thread.start()
    assert pipeline(tmp_path / "store", until="ingest").is_completed()
    done.set()
    thread.join()
    (told,) = (record.getMessage() for record in caplog.records if "ingest waits since" in record.getMessage())
    assert "no worker of pool cpu is online; start one: PREFECT_API_URL=http://" in told
    assert told.endswith("prefect worker start --pool cpu")


def test_a_completed_job_whose_artifact_is_elsewhere_is_told(deployed, tmp_path, monkeypatch):
    from flows import pool

    monkeypatch.setattr(pool.Pools, "_child", other_store(pool.Pools._child, str(tmp_path / "other")))
    with worker(deployed, "run"):
        failed = pipeline(tmp_path / "store", until="ingest")
    assert failed.is_failed()
    assert "does the worker see this store?" in failed.message


def test_a_step_without_a_deployment_is_told_before_anything_runs(deployed, tmp_path):
    state = pipeline(tmp_path / "store", until="sft")
    assert "there is no deployment sft/gpu on http://" in state.message
    assert state.message.endswith("make it with python deployments/install.py")
    assert jobs(state) == []


def test_without_a_server_the_run_is_refused_in_a_line(tmp_path):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.pool import Pools
    from flows.presets import resolve
    from tasks.artifacts import Store
    from tasks.compute import Compute

    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(ValueError, match="PREFECT_API_URL is not set: start one"),
    ):
        Pools(resolve("ci"), Store(tmp_path), Compute(executor="pool"))


def other_store(child: Any, store: str) -> Any:
    """A worker that sees another folder under the same name."""
    return lambda self, step, identity, parameters: child(self, step, identity, parameters | {"store": store})


def test_a_flow_inside_another_does_not_close_what_ran_in_the_same_attempt(prefect_server):
    from prefect import Task, flow, runtime
    from prefect.flow_engine import run_flow
    from prefect.states import AwaitingRetry, Completed, Running

    from flows.attempts import begin_attempt

    first = []

    @flow(persist_result=False)
    def outer():
        first.append(begin_attempt())
        run_id, number = UUID(runtime.flow_run.id), str(len(first))
        with client() as api:
            api.create_task_run(Task(fn=lambda: None, name="at work"), run_id, number, name="at work", state=Running())
        first.append(begin_attempt())
        return Completed()

    run_id = outer(return_state=True).state_details.flow_run_id
    with client() as api:
        api.set_flow_run_state(run_id, AwaitingRetry(), force=True)
        run_flow(outer, flow_run=api.read_flow_run(run_id), return_type="state")
    assert first == [True, True, False, False]
    assert states_of(run_id, "at work") == ["Crashed", "Running"]
