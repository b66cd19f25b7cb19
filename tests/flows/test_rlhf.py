"""The flow on a real Prefect: what is stored shows as Cached, a failure is told by its step, a silent API costs nothing."""

import json
import sys
import time
from threading import Event
from typing import get_args

import pytest

pytestmark = pytest.mark.usefixtures("prefect_server")

SMALL = {"ingest.simulate.questions": 60}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("run") / "store")


def task_states(run_id) -> dict[str, str]:
    """Names of the final states of a flow run's tasks; they arrive by events, so wait for them."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    until = time.monotonic() + 30
    while time.monotonic() < until:
        with get_client(sync_client=True) as client:
            runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [run_id]}))
        if runs and all(run.state and run.state.is_final() for run in runs):
            return {run.name: run.state.name for run in runs}
        time.sleep(0.2)
    raise AssertionError("the task runs did not end")


def flow_run(**more):
    from flows.rlhf import rlhf
    from tasks.compute import Compute

    overrides = SMALL | more.pop("overrides", {})
    return rlhf(config="ci", overrides=overrides, compute=Compute(threads=1, workers=1), return_state=True, **more)


def artifacts_of(run_id) -> dict[str, str]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    with get_client(sync_client=True) as client:
        return {a.key: a.data for a in client.read_artifacts(flow_run_filter=FlowRunFilter(id={"any_": [run_id]}))}


def test_the_second_run_is_cached_and_a_refresh_is_not(store):
    first = flow_run(store=store, until="ingest")
    made = first.result()
    assert task_states(first.state_details.flow_run_id) == {"ingest": "Completed"}
    second = flow_run(store=store, until="ingest")
    assert task_states(second.state_details.flow_run_id) == {"ingest": "Cached"}
    assert second.result() == made
    third = flow_run(store=store, until="ingest", refresh=["ingest"])
    assert task_states(third.state_details.flow_run_id) == {"ingest": "Completed"}
    assert third.result() == made  # the simulated site is the same to the byte


def test_a_run_has_a_name_and_leaves_progress_and_a_report(tmp_path):
    from prefect.client.orchestration import get_client

    state = flow_run(store=str(tmp_path / "store"), until="ingest")
    run_id = state.state_details.flow_run_id
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(run_id).name == "ci on a simulated site with ingest.simulate.questions=60 up to ingest"
    found = artifacts_of(run_id)
    assert found["ingest-progress"] == 100
    assert "#" in found["ingest-report"]


def test_a_failed_step_is_named_and_what_came_before_it_is_kept(store):
    from tasks.step import StepFailed

    overrides = {"base.source": "path", "base.path": store, "base.scratch": None}
    state = flow_run(store=store, until="ingest")
    assert state.is_completed()
    with pytest.raises(ValueError, match=r"config\.json"):  # known before anything runs
        flow_run(store=store, until="base", overrides=overrides).result()
    state = flow_run(store=store, until="sft", overrides={"sft.seq_length": 4096, "base.scratch.steps": 1})
    assert state.is_failed()
    with pytest.raises(StepFailed, match=r"sft failed: .*seq_length"):
        state.result()
    assert task_states(state.state_details.flow_run_id) == {"ingest": "Cached", "base": "Completed", "sft": "Failed"}


def test_a_dashboard_that_hangs_does_not_hold_up_the_step(tmp_path, monkeypatch):
    import tasks.dashboard as adapter

    released, asked = Event(), []

    def hang(*_, **__):
        asked.append(1)
        released.wait(60)

    monkeypatch.setattr(adapter, "get_client", hang)
    started = time.monotonic()
    try:
        assert flow_run(store=str(tmp_path / "store"), until="ingest").is_completed()
        assert time.monotonic() - started < 20
        assert asked
    finally:
        released.set()


def test_a_dashboard_that_raises_does_not_fail_the_step(tmp_path, monkeypatch):
    import tasks.dashboard as adapter

    def fail(*_, **__):
        raise ConnectionError("no API")

    monkeypatch.setattr(adapter, "get_client", fail)
    assert flow_run(store=str(tmp_path / "store"), until="ingest").is_completed()


def test_the_command_prints_one_object_and_serves_the_stored_step_without_torch(store, capsys):
    from flows.cli import main

    loaded = "torch" in sys.modules
    arguments = ["run", "--preset", "ci", "--set", "ingest.simulate.questions=60", "--until", "ingest", "--store", store, "--json"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    run = json.loads(said.out)
    assert run["steps"]["ingest"]["state"] == "stored"
    assert run["steps"]["ingest"]["metrics"]["questions"] == 60
    assert run["steps"]["ingest"]["uri"].startswith(store)
    assert (run["verdict"], run["report"], run["store"]) == (None, None, store)
    assert "ingest: stored" in said.err
    assert loaded or "torch" not in sys.modules


def test_the_command_says_which_step_failed_and_where_the_traceback_is(store, capsys, monkeypatch):
    from flows.cli import main

    sizes = ["--set", "ingest.simulate.questions=60", "--set", "base.scratch.steps=1", "--set", "sft.seq_length=4096"]
    assert main(["run", "--preset", "ci", *sizes, "--until", "sft", "--threads", "1", "--store", store, "--json"]) == 2
    said = capsys.readouterr()
    run = json.loads(said.out)
    assert [run["steps"][step]["state"] for step in ("ingest", "base", "sft")] == ["stored", "stored", "failed"]
    assert "seq_length" in run["error"]
    last = said.err.strip().splitlines()[-1]
    assert last.startswith("stackrlhf: sft failed: ")
    log = last.rsplit("traceback: ", 1)[1].rstrip(")")
    with open(log) as file:
        assert "Traceback" in file.read()
    assert "Traceback" not in said.err


def test_a_step_can_be_run_by_its_own_flow(store):
    from flows.presets import resolve
    from flows.steps import ingest

    state = ingest(config=resolve("ci", SMALL).ingest, store=store, return_state=True)
    assert state.is_completed()
    assert state.name == "Cached"
    assert state.result().step == "ingest"


def test_the_dashboards_form_refuses_what_the_config_refuses():
    from prefect.exceptions import ParameterTypeError
    from prefect.flows import load_flow_from_entrypoint

    from flows.presets import PRESETS, PresetName

    flow = load_flow_from_entrypoint("flows.rlhf:rlhf")
    properties = flow.parameters.model_dump()["properties"]
    assert set(properties) == {"config", "overrides", "refresh", "until", "store", "compute"}
    assert "PPO iterations" in json.dumps(flow.parameters.model_dump()["definitions"])
    with pytest.raises(ParameterTypeError):
        flow.validate_parameters({"until": "training"})
    assert get_args(PresetName) == tuple(PRESETS)
    assert flow.validate_parameters({"config": "smollm2"})["config"] == "smollm2"
    assert flow.validate_parameters({"config": PRESETS["ci"].model_dump()})["config"] == PRESETS["ci"]
    with pytest.raises(ParameterTypeError):
        flow.validate_parameters({"config": "giant"})


def test_the_form_of_a_steps_job_is_that_of_its_task():
    from prefect.flows import load_flow_from_entrypoint

    flow = load_flow_from_entrypoint("flows.steps:ppo")
    form = flow.parameters.model_dump()
    assert set(form["properties"]) == {"config", "sft", "reward", "ingest", "store", "compute", "refresh"}
    assert set(form["required"]) == {"config", "sft", "reward", "ingest"}
    assert {"PPOConfig", "Artifact", "Compute"} <= set(form["definitions"])
    assert flow.description == "Proximal policy optimization against the reward model."


def test_a_tracker_that_is_not_there_is_refused_before_the_first_step(tmp_path, monkeypatch):
    from flows.presets import resolve
    from flows.rlhf import rlhf
    from tasks import trackers
    from tasks.compute import Compute

    monkeypatch.setitem(trackers.MODULES, "wandb", "a_module_that_is_not_there")
    state = rlhf(config=resolve("ci", SMALL), store=str(tmp_path), compute=Compute(report_to=("wandb",)), return_state=True)
    assert "compute.report_to=wandb, but a_module_that_is_not_there is not installed" in state.message
    assert not (tmp_path / "ingest").exists()


def test_a_disk_that_is_too_small_for_a_later_step_is_told_before_the_first(tmp_path, monkeypatch):
    from flows import disk

    monkeypatch.setattr(disk, "free_at", lambda place: 3_000_000)
    state = flow_run(store=str(tmp_path / "store"))
    assert "base does not fit: needs " in state.message
    assert not (tmp_path / "store" / "ingest").exists()
