"""Runs that start by themselves: a schedule fires, and its retraining records a decision. Queues that cannot block one another."""

import shutil
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from flows.decision import records
from tasks.artifacts import Store
from tests.flows.test_retrain import BEER, SMALL, beer, crown
from tests.orchestra import artifacts, jobs_of, prefect, submit, task_states, wait

CI = {"config": "ci", "compute": {"executor": "inline", "threads": 1, "workers": 1}}


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


def fired(server, deployment: str, before: set[str], seconds: float = 120) -> Any:
    """A schedule of 20 seconds is made, fires, and is taken away again; the run that it began, once that is over."""
    soon = (datetime.now(UTC) + timedelta(seconds=8)).isoformat()
    every = ("--interval", "20", "--anchor-date", soon)
    made = prefect(server, "deployment", "schedule", "create", deployment, *every, check=True)
    assert "Created deployment schedule" in made.stdout
    try:
        begun = first_scheduled_run(server, deployment, before, seconds)
    finally:
        prefect(server, "deployment", "schedule", "clear", "-y", deployment, check=True)
    return wait(server, UUID(begun), 240)


def first_scheduled_run(server, deployment: str, before: set[str], seconds: float) -> str:
    """The first run that began without anybody asking for it, besides those of `before`."""
    until = time.monotonic() + seconds
    with server.client() as client:
        wanted = {"deployments": {"id": {"any_": [str(client.read_deployment_by_name(deployment).id)]}}}
        while time.monotonic() < until:
            runs = client.request("POST", "/flow_runs/filter", json=wanted).json()
            if begun := [run["id"] for run in runs if run["auto_scheduled"] and run["start_time"] and run["id"] not in before]:
                return begun[0]
            time.sleep(0.3)
    raise AssertionError(f"{deployment}: no run began within {seconds} s")


def test_a_schedule_fires_by_itself_and_what_the_retraining_decides_on_a_newer_dump_is_recorded(orchestra, tmp_path):
    """retrain/weekly with a shorter interval, on the beer site: 2016-12 stands there, then 2020-06 comes."""
    server, store = orchestra.server, Store(tmp_path / "store")
    dumps = [beer(day) for day in ("2016-12", "2020-06")]
    source = tmp_path / "incoming"
    source.mkdir()
    deployed_like_weekly(server, "often", source=[str(source)], store=store.uri, overrides=SMALL, **CI)
    ended: dict[str, Any] = {}
    for dump in dumps:
        shutil.copy(dump, source)
        run = fired(server, "retrain/often", set(ended))
        assert run.state.is_completed(), run.state
        ended[str(run.id)] = run
        if store.pointer("champion") is None:
            crown(store, str(next(records(store, "champion")).decision.challenger), 0)
    newer, first = (record.decision for record in records(store, "champion"))
    assert (first.data.dates, newer.data.dates) == ({BEER: "2016-12-10"}, {BEER: "2020-05-31"})
    assert (newer.champion, newer.changes["questions"]["new"]) == (first.challenger, 411)
    assert store.pointer("champion").to["key"] == (newer.challenger if newer.word == "promoted" else first.challenger)
    assert {run: ended[run].state.name for run in ended} == {one.flow_run: one.title for one in (first, newer)}
    for decision in (first, newer):
        page = artifacts(server, UUID(decision.flow_run))["retrain-decision"]
        assert page.startswith(f"# {decision.title}\n")
        assert decision.reason in page
        assert f"| {BEER} | {source}/{BEER}.7z |" in page


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
