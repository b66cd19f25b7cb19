"""kill -9 of everything that runs a pipeline on work pools: jobs, workers, the pipeline itself, the server."""

import os
import random
import time
from pathlib import Path
from typing import Any

import psutil

from tasks.artifacts import Store
from tests.flows.test_pool import SMALL, STEPS, digests, running_job, start, steps_of, with_ingest
from tests.orchestra import jobs_of, prefect, task_states, wait

BASE = SMALL | {"base.scratch.steps": 400}
"""A base that takes some seconds to train."""


def retry(orchestra: Any, run_id: Any) -> None:
    assert prefect(orchestra.server, "flow-run", "retry", str(run_id)).returncode == 0


def until_true(what: Any, seconds: float = 60, every: float = 0.1) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(every)


def state_of(orchestra: Any, run_id: Any) -> Any:
    with orchestra.server.client() as client:
        return client.read_flow_run(run_id).state


def ended_all_right(orchestra: Any, run_id: Any, seconds: float = 120) -> None:
    run = wait(orchestra.server, run_id, seconds)
    assert run.state.is_completed(), run.state
    steps = steps_of(orchestra, run_id)
    assert {*steps.values()} <= {"Completed", "Cached"}, steps


def kept(store: Path) -> list[Path]:
    return sorted((store / "tmp").glob("*.kept/**/step-????????"))  # reward has two below one folder


def log_of(orchestra: Any, run_id: Any) -> str:
    from prefect.client.schemas.filters import LogFilter

    with orchestra.server.client() as client:
        logs = client.read_logs(log_filter=LogFilter.model_validate({"flow_run_id": {"any_": [run_id]}}), limit=200)
    return "\n".join(line.message for line in logs)


def every_state(orchestra: Any, run_id: Any) -> dict[str, list[str]]:
    """States of all task runs, those of dead attempts too."""
    from prefect.client.schemas.filters import FlowRunFilter

    task_states(orchestra.server, run_id)  # waits for them
    found: dict[str, list[str]] = {}
    with orchestra.server.client() as client:
        for run in client.read_task_runs(flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [run_id]}})):
            found.setdefault(run.name, []).append(run.state.name)
    return found


def kill_at_random(process: psutil.Process, running: Any, usual: float, store: Path, learns: bool, moment: float) -> str:
    """kill -9 of a job, and when it was. `moment`, 0 to 1: as early as Python's start, or while it works; a step that learns is
    let come to a checkpoint then."""
    try:
        if moment < 0.25:
            time.sleep(4 * moment)
            when = "as it started"
        elif learns:
            until_true(lambda: kept(store) or not process.is_running(), 120, every=0.01)
            when = "with a checkpoint"
        else:
            until_true(lambda: running() or not process.is_running(), 60)
            time.sleep(0.8 * usual * moment)
            when = f"after {0.8 * usual * moment:.1f} of {usual:.1f} s"
        process.suspend()  # so that what is looked at is what it leaves
        if learns and kept(store):
            when = "with a checkpoint"
        process.kill()
        return when
    except psutil.NoSuchProcess:
        return "too late"


def test_the_job_of_each_step_is_killed_and_the_retry_goes_on_from_there(orchestra, first, tmp_path):
    seed = int(os.environ.get("STACKRLHF_SEED", random.randrange(10**6)))
    print(f"STACKRLHF_SEED={seed}")
    moments, store = random.Random(seed), tmp_path / "store"
    usual = {step: runs[0].total_run_time.total_seconds() for step, runs in jobs_of(orchestra.server, first.id).items()}
    stored = lambda: {manifest.step for manifest in Store(store).list()}
    run_id, killed = start(orchestra, store), []
    for step in STEPS:
        until_true(lambda step=step: step in jobs_of(orchestra.server, run_id), 120)
        (job,) = jobs_of(orchestra.server, run_id)[step]
        worker = orchestra.cpu if step in {"ingest", "promote"} else orchestra.gpu
        running = lambda job=job: state_of(orchestra, job.id).is_running()
        learns = step in {"base", "sft", "reward", "ppo"}
        when = kill_at_random(worker.job(job.id), running, usual[step], store, learns, moments.random())
        until_true(lambda step=step: step in stored() or state_of(orchestra, run_id).is_final(), 60)
        print(f"{step}: killed {when}{', and it was done' if step in stored() else ''}")
        if step in stored():
            continue
        killed.append(step)
        failed = wait(orchestra.server, run_id, 10).state
        assert failed.name == "Failed", (step, failed)
        assert f"{step} failed: its job was killed (exit status 137" in failed.message
        assert f"prefect flow-run retry {run_id}" in failed.message
        retry(orchestra, run_id)
        # the very same flow run once more, and nothing that came before it
        until_true(lambda job=job, step=step: jobs_of(orchestra.server, run_id)[step][0].run_count > job.run_count, 120)
        wait(orchestra.server, job.id, 120, states={"Completed"})
        if when == "with a checkpoint":
            until_true(lambda job=job: "resumed from step " in log_of(orchestra, job.id), 30)
    ended_all_right(orchestra, run_id)
    assert len(killed) >= 5, "too many were done before they could be killed"
    assert {step: len(runs) for step, runs in jobs_of(orchestra.server, run_id).items()} == dict.fromkeys(STEPS, 1)
    states = every_state(orchestra, run_id)
    for step in STEPS:  # once Completed, and Cached in every attempt after that
        assert states[step].count("Completed") == 1, states
        assert states[step].count("Failed") == (step in killed), states
    undisturbed = digests(first.store)
    assert stored() == {*STEPS}
    assert digests(store) == {key: undisturbed.get(key) for key in digests(store)}
    assert not kept(store)


def test_a_killed_worker_leaves_its_job_at_work_which_a_killed_pipeline_finds_when_it_is_run_again(orchestra, first, tmp_path):
    from flows.pool import SETTLED_SECONDS

    store = with_ingest(first, tmp_path)
    run_id = start(orchestra, store, BASE, until="base")
    job = running_job(orchestra, run_id, "base")
    process = orchestra.gpu.job(job.id)
    orchestra.gpu.kill()
    orchestra.cpu.job(run_id).kill()
    orchestra.gpu.start()
    assert wait(orchestra.server, run_id, 30).state.name == "Crashed"
    time.sleep(SETTLED_SECONDS)  # a worker reports a crash twice, and its second report would end a run that is on its way again
    retry(orchestra, run_id)
    ended_all_right(orchestra, run_id)
    ended = wait(orchestra.server, job.id, 60)
    assert (ended.state.name, ended.run_count) == ("Completed", 1)  # it outlived its worker, and told the server itself
    _, alive = psutil.wait_procs([process], 20)
    assert not alive
    assert [run.id for run in jobs_of(orchestra.server, run_id)["base"]] == [job.id]
    states = every_state(orchestra, run_id)
    # the first attempt's task run is closed; where the job ended before the second attempt, that one finds its artifact
    assert sorted(states["base"]) in (["Completed", "Crashed"], ["Cached", "Crashed"])
    assert sorted(states["ingest"]) == ["Cached", "Cached"]


def test_an_orphan_and_its_step_run_again_both_end_and_make_one_artifact(orchestra, first, tmp_path):
    """RELIABILITY R13: the worker is killed, the job is alive, and its flow run is run again."""
    from prefect.states import Scheduled

    store = with_ingest(first, tmp_path)
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


def test_a_job_that_ends_while_the_server_is_dead_is_completed_when_it_comes_back(orchestra, first, tmp_path):
    store = with_ingest(first, tmp_path)
    run_id = start(orchestra, store, BASE, until="base")
    job = running_job(orchestra, run_id, "base")
    until_true(lambda: kept(store), 120)
    orchestra.server.kill()
    try:
        until_true(lambda: "base" in {manifest.step for manifest in Store(store).list()}, 120)
        time.sleep(3)
    finally:
        orchestra.server.start()
    ended_all_right(orchestra, run_id)
    (ended,) = jobs_of(orchestra.server, run_id)["base"]
    assert (ended.id, ended.state.name, ended.run_count) == (job.id, "Completed", 1)
