"""kill -9 of everything that runs a pipeline on work pools: jobs, workers, the pipeline itself, the server."""

import os
import random
import time
from pathlib import Path
from typing import Any

import psutil

from tasks.artifacts import Store
from tests.flows.test_pool import STEPS, digests, first, running_job, start, steps_of
from tests.orchestra import jobs_of, prefect, task_states, wait

__all__ = ["first"]

BASE = {"ingest.simulate.questions": 60, "base.scratch.steps": 400}
"""A base that takes some seconds to train."""


def retry(orchestra: Any, run_id: Any) -> None:
    assert prefect(orchestra.server, "flow-run", "retry", str(run_id)).returncode == 0


def until_true(what: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def ended_all_right(orchestra: Any, run_id: Any, seconds: float = 120) -> None:
    run = wait(orchestra.server, run_id, seconds)
    assert run.state.is_completed(), run.state
    steps = steps_of(orchestra, run_id)
    assert {*steps.values()} <= {"Completed", "Cached"}, steps


def kept(store: Path) -> list[Path]:
    return sorted((store / "tmp").glob("*.kept/step-????????"))


def log_of(orchestra: Any, run_id: Any) -> str:
    from prefect.client.schemas.filters import LogFilter

    with orchestra.server.client() as client:
        logs = client.read_logs(log_filter=LogFilter.model_validate({"flow_run_id": {"any_": [run_id]}}), limit=200)
    return "\n".join(line.message for line in logs)


SPAN = {"ingest": 2.0, "promote": 1.2, "evaluate": 5.0}
"""Seconds within which a job is certainly not done, the start of Python included."""


def kill_at_random(orchestra: Any, run_id: Any, step: str, store: Path, moment: float) -> bool:
    """kill -9 of the job of a step; True where it had kept a checkpoint. `moment`, 0 to 1, is when: as early as Python's start, or
    while it works, where a step that learns is let come to a checkpoint."""
    worker = orchestra.cpu if step in {"ingest", "promote"} else orchestra.gpu
    process = worker.job(jobs_of(orchestra.server, run_id)[step][0].id)
    if step in SPAN:
        time.sleep(SPAN[step] * moment)
    elif moment < 0.25:
        time.sleep(4 * moment)
    else:
        until_true(lambda: kept(store) or not process.is_running())
    saved = bool(kept(store))
    process.kill()
    print(f"{step}: killed at {moment:.2f}, {'with' if saved else 'without'} a checkpoint")
    return saved


def test_the_job_of_each_step_is_killed_and_the_retry_goes_on_from_there(orchestra, first, tmp_path):
    seed = int(os.environ.get("STACKRLHF_SEED", random.randrange(10**6)))
    print(f"STACKRLHF_SEED={seed}")
    moments, store = random.Random(seed), tmp_path / "store"
    run_id = start(orchestra, store)
    for step in STEPS:
        until_true(lambda step=step: step in jobs_of(orchestra.server, run_id), 120)
        saved = kill_at_random(orchestra, run_id, step, store, moments.random())
        run = wait(orchestra.server, run_id, 60)
        assert run.state.name == "Failed", (step, run.state)
        assert f"{step} failed: its job was killed (exit status 137" in run.state.message
        assert f"prefect flow-run retry {run_id}" in run.state.message
        (job,) = jobs_of(orchestra.server, run_id)[step]
        retry(orchestra, run_id)
        # the very same flow run once more, and nothing that came before it
        until_true(lambda job=job, step=step: jobs_of(orchestra.server, run_id)[step][0].run_count > job.run_count, 120)
        wait(orchestra.server, job.id, 120, states={"Completed"})
        if saved:
            until_true(lambda job=job: "resumed from step " in log_of(orchestra, job.id), 30)
    ended_all_right(orchestra, run_id)
    assert {step: len(runs) for step, runs in jobs_of(orchestra.server, run_id).items()} == dict.fromkeys(STEPS, 1)
    undisturbed = digests(first.store)
    assert {manifest.step for manifest in Store(store).list()} == {*STEPS}
    assert digests(store) == {key: undisturbed.get(key) for key in digests(store)}
    assert not kept(store)


def test_a_killed_worker_leaves_its_job_at_work_and_the_run_ends_with_a_new_worker(orchestra, tmp_path):
    run_id = start(orchestra, tmp_path / "store", BASE, until="sft")
    job = running_job(orchestra, run_id, "base")
    process = orchestra.gpu.job(job.id)
    orchestra.gpu.kill()
    try:
        assert wait(orchestra.server, job.id, 120).state.is_completed()  # it outlived its worker, and told the server itself
        psutil.wait_procs([process], 20)
    finally:
        orchestra.gpu.start()
    ended_all_right(orchestra, run_id)
    assert {step: len(runs) for step, runs in jobs_of(orchestra.server, run_id).items()} == {"ingest": 1, "base": 1, "sft": 1}


def test_an_orphan_and_its_step_run_again_both_end_and_make_one_artifact(orchestra, tmp_path):
    """RELIABILITY R13: the worker is killed, the job is alive, and its flow run is run again."""
    from prefect.states import Scheduled

    store = tmp_path / "store"
    run_id = start(orchestra, store, BASE, until="base")
    job = running_job(orchestra, run_id, "base")
    orphan = orchestra.gpu.job(job.id)
    orchestra.gpu.kill()
    orchestra.gpu.start()
    assert orphan.is_running()
    with orchestra.server.client() as client:
        client.set_flow_run_state(job.id, Scheduled(), force=True)
    until_true(lambda: jobs_of(orchestra.server, run_id)["base"][0].run_count == 2, 60)
    ended_all_right(orchestra, run_id)
    _, alive = psutil.wait_procs([orphan], 60)
    assert not alive
    assert sorted(manifest.step for manifest in Store(store).list()) == ["base", "ingest"]
    assert all(check.problem is None for check in Store(store).verify())


def test_a_killed_pipeline_is_run_again_and_finds_its_job_at_work(orchestra, tmp_path):
    run_id = start(orchestra, tmp_path / "store", BASE, until="base")
    job = running_job(orchestra, run_id, "base")
    orchestra.cpu.job(run_id).kill()
    assert wait(orchestra.server, run_id, 30).state.name == "Crashed"
    with orchestra.server.client() as client:
        assert client.read_flow_run(job.id).state.is_running()
    retry(orchestra, run_id)
    ended_all_right(orchestra, run_id)
    (again,) = jobs_of(orchestra.server, run_id)["base"]
    assert (again.id, again.run_count) == (job.id, 1)
    states = every_state(orchestra, run_id)
    assert sorted(states["base"]) == ["Completed", "Crashed"]  # the first attempt's task run is closed
    assert sorted(states["ingest"]) == ["Cached", "Completed"]


def every_state(orchestra: Any, run_id: Any) -> dict[str, list[str]]:
    """States of all task runs, those of dead attempts too."""
    from prefect.client.schemas.filters import FlowRunFilter

    task_states(orchestra.server, run_id)  # waits for them
    found: dict[str, list[str]] = {}
    with orchestra.server.client() as client:
        for run in client.read_task_runs(flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [run_id]}})):
            found.setdefault(run.name, []).append(run.state.name)
    return found


def test_a_killed_server_that_comes_back_costs_a_run_nothing(orchestra, tmp_path):
    run_id = start(orchestra, tmp_path / "store", BASE, until="base")
    job = running_job(orchestra, run_id, "base")
    orchestra.server.kill()
    time.sleep(5)
    orchestra.server.start()
    ended_all_right(orchestra, run_id)
    assert [run.run_count for run in jobs_of(orchestra.server, run_id)["base"]] == [1]
    assert jobs_of(orchestra.server, run_id)["base"][0].id == job.id
