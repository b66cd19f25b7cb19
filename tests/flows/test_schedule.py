"""Runs that start by themselves: a schedule fires, and its retraining records a decision. Queues that cannot block one another."""

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tests.orchestra import jobs_of, prefect, submit, task_states, wait

CI_OF_A_SMALL_DUMP = {"config": "ci", "compute": {"executor": "inline", "threads": 1, "workers": 1}}


def simulated(folder: Path, questions: int) -> str:
    from tasks.ingest.config import SimulatedSiteConfig
    from tasks.ingest.simulated.generate import write_site

    write_site(SimulatedSiteConfig(questions=questions), folder)
    return str(folder)


def deployed_like_weekly(server, name: str, **parameters) -> None:
    """retrain/<name>: what retrain/weekly is, with other parameters and no schedule yet."""
    with server.client() as client:
        weekly = client.read_deployment_by_name("retrain/weekly")
        client.create_deployment(
            flow_id=weekly.flow_id,
            name=name,
            entrypoint=weekly.entrypoint,
            parameters=parameters,
            parameter_openapi_schema=weekly.parameter_openapi_schema,
            enforce_parameter_schema=True,
            work_pool_name=weekly.work_pool_name,
            work_queue_name=weekly.work_queue_name,
            pull_steps=weekly.pull_steps,
            tags=weekly.tags,
        )


def first_scheduled_run(server, deployment: str, seconds: float = 90):
    """The first run that began without anybody asking for it."""
    until = time.monotonic() + seconds
    with server.client() as client:
        wanted = {"deployments": {"id": {"any_": [str(client.read_deployment_by_name(deployment).id)]}}}
        while time.monotonic() < until:
            runs = client.request("POST", "/flow_runs/filter", json=wanted).json()
            if begun := [run["id"] for run in runs if run["auto_scheduled"] and run["start_time"]]:
                return begun[0]
            time.sleep(0.3)
    raise AssertionError(f"{deployment}: no run began within {seconds} s")


def test_a_schedule_fires_by_itself_and_the_retraining_records_its_decision(orchestra, tmp_path):
    from flows.decision import records
    from tasks.artifacts import Store

    server, store = orchestra.server, str(tmp_path / "store")
    source = simulated(tmp_path / "dump", 120)
    deployed_like_weekly(server, "often", source=[source], store=store, **CI_OF_A_SMALL_DUMP)
    soon = (datetime.now(UTC) + timedelta(seconds=10)).isoformat()  # and once a minute, should this machine be too slow for it
    every = ("--interval", "60", "--anchor-date", soon)
    made = prefect(server, "deployment", "schedule", "create", "retrain/often", *every, check=True)
    assert "Created deployment schedule" in made.stdout
    try:
        begun = first_scheduled_run(server, "retrain/often")
    finally:
        prefect(server, "deployment", "schedule", "clear", "-y", "retrain/often", check=True)
    run = wait(server, begun, 240)
    (record,) = records(Store(store), "champion")
    assert run.state.is_completed(), run.state
    assert (record.decision.flow_run, record.decision.title) == (str(run.id), run.state.name)
    assert record.decision.word in {"promoted", "kept"}

    again = wait(server, submit(server, "retrain/often"), 60)
    assert again.state.name == "Nothing new"
    assert next(records(Store(store), "champion")).decision.word == "nothing-new"


def test_a_limit_of_cpu_jobs_does_not_let_a_pipeline_wait_for_its_own_steps_for_ever(orchestra):
    """A worker that may run one job at a time could not run the pipeline and its step; a limited queue of steps can."""
    server = orchestra.server
    prefect(server, "work-queue", "set-concurrency-limit", "steps", "1", "--pool", "cpu", check=True)
    try:
        given = {"overrides": {"ingest.simulate.questions": 70}, "until": "ingest"}
        first, second = (submit(server, "rlhf/ci", **given, refresh=["ingest"]) for _ in range(2))
        assert [wait(server, run, 120).state.name for run in (first, second)] == ["Completed", "Completed"]
    finally:
        prefect(server, "work-queue", "clear-concurrency-limit", "steps", "--pool", "cpu", check=True)
    assert set(task_states(server, first).values()) <= {"Completed", "Cached"}
    jobs = sorted((job for run in (first, second) for (job,) in jobs_of(server, run).values()), key=lambda job: job.start_time)
    assert [job.work_queue_name for job in jobs] == ["steps", "steps"]
    assert jobs[0].end_time <= jobs[1].start_time, "one after the other"
