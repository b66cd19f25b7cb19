"""Pipelines on work pools: a real server, two workers, one job a step, as `prefect deployment run` starts them."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tasks.artifacts import Store
from tests.orchestra import ROOT, jobs_of, prefect, submit, task_states, wait
from tests.s3_server import S3Server, use

STEPS = ["ingest", "base", "sft", "reward", "ppo", "evaluate", "promote"]
SMALL = {
    "ingest.simulate.questions": 60,
    "base.scratch.steps": 20,
    "sft.steps": 12,
    "reward.max_questions": 32,
    "reward.max_eval_questions": 16,
    "ppo.steps": 4,
    "evaluate.bootstrap_samples": 100,
}
COMPUTE = {"executor": "pool", "threads": 1, "workers": 1, "checkpoint_seconds": 0}
LONG = SMALL | {"base.scratch.steps": 100_000}
"""A base that is not done before the test is."""


def start(orchestra: Any, store: Path, overrides: dict[str, Any] = SMALL, **more: Any) -> Any:
    return submit(orchestra.server, "rlhf/ci", overrides=overrides, compute=COMPUTE, store=str(store), **more)


def steps_of(orchestra: Any, run_id: Any) -> dict[str, str]:
    return {name: state for name, state in task_states(orchestra.server, run_id).items() if name in STEPS}


def digests(store: Path) -> dict[str, str]:
    """Of every artifact by its key."""
    return {manifest.key: manifest.digest for manifest in Store(store).list()}


def with_ingest(first: Any, folder: Path) -> Path:
    """A store of its own that has the data already."""
    (manifest,) = (one for one in Store(first.store).list() if one.step == "ingest")
    shutil.copytree(first.store / "ingest" / manifest.key, folder / "store" / "ingest" / manifest.key)
    return folder / "store"


def running_job(orchestra: Any, run_id: Any, step: str, seconds: float = 120) -> Any:
    """The flow run of a step's job, once it runs."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = jobs_of(orchestra.server, run_id).get(step, [])
        if found and found[0].state.is_running():
            return found[0]
        time.sleep(0.2)
    raise AssertionError(f"{step} does not run: {found}")


def test_a_deployment_runs_every_step_as_a_job_of_its_own_on_its_pool(orchestra, first):
    assert first.run.state.is_completed(), first.run.state
    assert {"stackrlhf", "ci"} <= {*first.run.tags}
    assert first.run.name.startswith("ci on a simulated site")
    assert steps_of(orchestra, first.id) == dict.fromkeys(STEPS, "Completed")
    jobs = jobs_of(orchestra.server, first.id)
    assert {step: len(runs) for step, runs in jobs.items()} == dict.fromkeys(STEPS, 1)
    pools = {step: runs[0].work_pool_name for step, runs in jobs.items()}
    assert pools == {step: "cpu" if step in {"ingest", "promote"} else "gpu" for step in STEPS}
    assert jobs["sft"][0].name == f"sft of {first.run.name}"
    assert {manifest.step for manifest in Store(first.store).list()} == {*STEPS}


def test_the_same_again_is_cached_and_starts_no_job(orchestra, first):
    started = time.monotonic()
    again = wait(orchestra.server, start(orchestra, first.store), 60)
    assert again.state.is_completed()
    assert steps_of(orchestra, again.id) == dict.fromkeys(STEPS, "Cached")
    assert jobs_of(orchestra.server, again.id) == {}
    print(f"all cached: {time.monotonic() - started:.1f} s from submission to Completed")


def test_one_override_runs_only_what_depends_on_it(orchestra, first):
    changed = wait(orchestra.server, start(orchestra, first.store, SMALL | {"evaluate.bootstrap_samples": 101}), 200)
    assert changed.state.is_completed(), changed.state
    states = steps_of(orchestra, changed.id)
    assert states == {step: "Completed" if step in {"evaluate", "promote"} else "Cached" for step in STEPS}
    assert sorted(jobs_of(orchestra.server, changed.id)) == ["evaluate", "promote"]


def test_the_command_shows_the_steps_of_a_run_on_pools(orchestra, first):
    settings = [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "flows.rlhf", "--preset", "ci", *settings, "--executor", "pool", "--store", str(first.store)]
    done = subprocess.run([*command, "--json"], cwd=ROOT, env=orchestra.server.env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {step: about["state"] for step, about in json.loads(done.stdout)["steps"].items()} == dict.fromkeys(STEPS, "stored")


def test_a_damaged_artifact_is_made_anew(orchestra, first, tmp_path):
    store = with_ingest(first, tmp_path)
    before = digests(store)
    (manifest,) = Store(store).list()
    path = Store(store).folder("ingest", manifest.key) / "card.json"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    again = wait(orchestra.server, start(orchestra, store, until="ingest"), 60)
    assert steps_of(orchestra, again.id) == {"ingest": "Completed"}
    assert digests(store) == before


def test_on_s3_a_look_is_enough_until_a_run_is_repeated(monkeypatch, tmp_path):
    """What a job found damaged is made anew by the retry, without fetching every artifact in every run."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows import pool
    from flows.plan import identities
    from flows.presets import resolve
    from tasks.compute import Compute

    server = S3Server()
    use(monkeypatch, server.url, tmp_path / "cache")
    server.send("PUT", "bucket")
    store = Store("s3://bucket/store")
    identity = identities(resolve("ci", SMALL), store)[0]["ingest"]
    with store.attempt(identity.key) as out:
        (out / "card.json").write_text('{"simulated": true}')
        store.publish(out, identity, metrics={}, seconds=1, peak_memory_bytes=1)
    (card,) = (name for name in server.objects("bucket") if name.endswith("card.json"))
    server.send("PUT", f"bucket/{card}", b'{"simulated": TRUE}')
    monkeypatch.setenv("STACKRLHF_CACHE", str(tmp_path / "of another machine"))
    monkeypatch.setattr(pool, "_deployed", lambda name: True)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
        for first in (True, False):
            pools = pool.Pools(resolve("ci", SMALL), Store(store.uri), Compute(executor="pool"), first=first)
            assert (pools._stored("ingest", identity, {}, {}) is not None) == first
    server.stop()


def test_jobs_of_two_pipelines_never_meet_on_a_gpu_with_one_worker(orchestra, first, tmp_path):
    store = with_ingest(first, tmp_path)
    runs = [start(orchestra, store, SMALL | {"base.seed": seed}, until="base") for seed in (1, 2)]
    most = 0
    until = time.monotonic() + 200
    while time.monotonic() < until:
        most = max(most, len(orchestra.gpu.jobs()))
        with orchestra.server.client() as client:
            if all(client.read_flow_run(run).state.is_final() for run in runs):
                break
        time.sleep(0.1)
    assert [wait(orchestra.server, run, 10).state.name for run in runs] == ["Completed", "Completed"]
    jobs = sorted((jobs_of(orchestra.server, run)["base"][0] for run in runs), key=lambda job: job.start_time)
    assert jobs[0].end_time <= jobs[1].start_time
    assert most == 1


def test_why_a_job_ended_is_told_in_a_line():
    from prefect.states import Cancelled, Crashed, Failed

    from flows.pool import _why

    said = "Flow run encountered an exception: StepFailed: sft failed: sft.seq_length=4096 is\nlonger than the model's context"
    assert _why("sft", Failed(message=said)) == "sft.seq_length=4096 is longer than the model's context"
    for code in ("status code: 137", "status code: -9", "non-zero status code -9"):
        state = Crashed(message=f"Process exited with {code}. Process was killed, likely.")
        assert _why("sft", state).endswith("most likely the machine, or its container, had no memory left")
    assert _why("sft", Crashed(message="Process exited with status code: 1. An error.")).startswith(
        "its job crashed: Process exited"
    )
    assert _why("sft", Cancelled()) == "its job was cancelled"


def test_cancelling_a_pipeline_cancels_its_job(orchestra, first, tmp_path):
    run_id = start(orchestra, with_ingest(first, tmp_path), LONG, until="base")
    job = running_job(orchestra, run_id, "base")
    process = orchestra.gpu.job(job.id)
    kept = lambda: list((tmp_path / "store" / "tmp").glob("*.kept/step-*"))
    until = time.monotonic() + 60
    while not kept() and time.monotonic() < until:
        time.sleep(0.1)
    started = time.monotonic()
    assert prefect(orchestra.server, "flow-run", "cancel", str(run_id)).returncode == 0
    assert wait(orchestra.server, job.id, 60).state.name == "Cancelled"
    print(f"the job was Cancelled after {time.monotonic() - started:.1f} s")
    assert wait(orchestra.server, run_id, 60).state.name == "Cancelled"
    process.wait(20)
    assert kept(), "what it had trained is kept"
