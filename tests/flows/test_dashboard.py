"""The dashboard on a real Prefect: what it is told of a step and of a run, and that a training run never waits for it."""

import json
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from threading import Event
from uuid import UUID

import pytest

from tests.orchestra import ROOT, Server


def run_step(store, *, pause=0.0, updates=3, report_to=(), **config):
    """A flow with one small step that does what steps do; -> the flow run's state."""
    from prefect import flow

    from tasks.artifacts import Identity
    from tasks.compute import Compute
    from tasks.task import Execution, conduct, step_task

    def produce(work):
        work.progress.note("key of the API: 0123456789abcdef")
        for number in range(1, updates + 1):
            time.sleep(pause)
            work.progress(number, updates, "train", loss=1 / number)
        (work.out / "REPORT.md").write_text("# sft\n\nAll is well.\n")
        return {"loss": 1 / updates}

    @step_task("sft")
    def sft():
        identity = Identity(step="sft", version=1, config=config, inputs={"base": "ab" * 32})
        return conduct(identity, {}, produce, Execution(store=str(store), compute=Compute(report_to=report_to)))

    @flow(name="small", persist_result=False)
    def small():
        return sft(return_state=True).result()

    return small(return_state=True)


def artifacts_of(run_id: UUID) -> dict:
    """Of a flow run, by key; no key twice."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    with get_client(sync_client=True) as client:
        found = client.read_artifacts(flow_run_filter=FlowRunFilter(id={"any_": [run_id]}))
    assert len({artifact.key for artifact in found}) == len(found)
    return {artifact.key: artifact for artifact in found}


@pytest.mark.usefixtures("prefect_server")
def test_a_step_leaves_its_progress_its_last_live_page_and_a_report(tmp_path, monkeypatch):
    from tasks import dashboard

    monkeypatch.setenv("SOME_API_KEY", "0123456789abcdef")
    monkeypatch.setattr(dashboard, "PROGRESS_SECONDS", 0.1)
    monkeypatch.setattr(dashboard, "LIVE_SECONDS", 0.2)
    state = run_step(tmp_path / "store", updates=20, pause=0.1, settings="https://me:hunter2@host/x")
    found = artifacts_of(state.state_details.flow_run_id)
    assert set(found) == {"sft-progress", "sft-live", "sft-report"}  # the live page is updated in place, so it is there once
    assert found["sft-progress"].data == 100
    assert found["sft-live"].data.startswith("# sft: done in ")
    assert "data:image/png" in found["sft-live"].data
    assert "0123456789abcdef" not in found["sft-live"].data
    report = found["sft-report"]
    assert report.data.startswith("# sft\n\nAll is well.")
    assert "hunter2" not in report.data
    assert "../../artifacts/key/base-report" in report.data
    assert report.metadata_["key"] == state.result().key
    assert report.task_run_id == found["sft-live"].task_run_id


@pytest.mark.usefixtures("prefect_server")
def test_a_link_leads_to_the_very_report_that_was_made_with_the_key(tmp_path):
    from tasks.dashboard import report_link

    first = run_step(tmp_path / "store", name="a").result().key
    second = run_step(tmp_path / "store", name="b").result().key
    links = [report_link("sft", key) for key in (first, second, "ef" * 32)]
    assert links[0] != links[1]
    assert all(link.startswith("../../artifacts/artifact/") for link in links[:2])
    assert links[2] == "../../artifacts/key/sft-report"


@pytest.mark.usefixtures("prefect_server")
def test_a_page_that_was_deleted_meanwhile_is_made_again():
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    from tasks.dashboard import Shown

    @flow(name="small", persist_result=False)
    def small():
        shown = Shown("some-page", "markdown")
        shown.show("one", "first")
        with get_client(sync_client=True) as client:
            client.delete_artifact(shown.id)
        with pytest.raises(PrefectHTTPStatusError, match="404"):
            shown.show("two", "second")
        shown.show("three", "third")

    state = small(return_state=True)
    assert artifacts_of(state.state_details.flow_run_id)["some-page"].data == "three"


@pytest.mark.usefixtures("prefect_server")
def test_trackers_are_waited_for_when_the_artifact_is_stored_and_its_report_shown(tmp_path, monkeypatch):
    from tasks import trackers
    from tasks.dashboard import Dashboard

    happened = []

    @contextmanager
    def reporting(*_):
        yield lambda metrics: happened.append(dict(metrics))
        happened.append(len(list((tmp_path / "store").glob("sft/*/manifest.json"))))

    monkeypatch.setattr(trackers, "reporting", reporting)
    monkeypatch.setattr(Dashboard, "close", lambda self, close=Dashboard.close: (happened.append("shown"), close(self)))
    assert run_step(tmp_path / "store", report_to=("tensorboard",)).is_completed()
    assert happened == [{"loss": 1 / 3}, "shown", 1]


@pytest.mark.usefixtures("prefect_server")
def test_a_dashboard_that_hangs_does_not_hold_up_the_step(tmp_path, monkeypatch):
    from tasks import dashboard

    released, asked = Event(), []

    def hang(**_):
        asked.append(1)
        released.wait(60)
        raise ConnectionError

    monkeypatch.setattr(dashboard, "get_client", hang)
    started = time.monotonic()
    try:
        assert run_step(tmp_path / "store").is_completed()
        assert time.monotonic() - started < 20
        assert asked
    finally:
        released.set()


@pytest.mark.usefixtures("prefect_server")
def test_a_dashboard_that_raises_does_not_fail_the_step(tmp_path, monkeypatch):
    from tasks import dashboard

    def fail(**_):
        raise ConnectionError("no API")

    monkeypatch.setattr(dashboard, "get_client", fail)
    assert run_step(tmp_path / "store").is_completed()


def test_a_server_that_is_killed_while_a_step_runs_does_not_cost_the_step(tmp_path):
    """The run waits for the server with its own last word only: by then the artifact is stored."""
    script = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import flows
        from tests.flows.test_dashboard import run_step
        state = run_step({str(tmp_path / "store")!r}, pause=0.25, updates=24)
        print(state.name, state.result().key)
        """
    )
    with Server(tmp_path / "prefect") as server:
        run = subprocess.Popen(
            [sys.executable, "-c", script], env=server.env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            wait_for(lambda: any(a["key"] == "sft-progress" for a in ask(server, "/artifacts/filter", {})))
            server.kill()
            wait_for(lambda: list((tmp_path / "store").glob("sft/*/manifest.json")))
            assert run.poll() is None  # the flow has not said that it is done: nobody hears it
            server.start()
            said, errors = run.communicate(timeout=120)
        finally:
            run.kill()
    assert run.returncode == 0, errors
    assert said.startswith("Completed ")


def ask(server: Server, path: str, body: dict) -> list:
    import httpx

    return httpx.post(server.url + path, json=body, timeout=30).raise_for_status().json()


def wait_for(condition, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds} s")


# ---- the overview of a run


class Run:
    """A run of three steps that are stored, as flows/rlhf.py tells it."""

    def __init__(self, folder):
        from flows.presets import resolve
        from tasks.artifacts import Identity, Store

        self.config, self.store = resolve("ci"), Store(str(folder))
        self.plan = {}
        made: dict[str, str] = {}
        for step in ("ingest", "base", "sft", "reward", "ppo", "evaluate", "promote"):
            self.plan[step] = Identity(step=step, version=1, config={}, inputs=dict(made))
            made[step] = self.plan[step].key

    def make(self, step, **files):
        with self.store.attempt(self.plan[step].key) as out:
            for name, content in {"x_txt": "x", **files}.items():
                (out / name.replace("_", ".")).write_text(content)
            manifest = self.store.publish(out, self.plan[step], metrics={"score_after": 0.5}, seconds=65.0, peak_memory_bytes=10**9)
        return self.store.artifact(manifest)


VERDICT = {
    "word": "better", "gain": 0.221, "interval": [0.184, 0.259], "by": "true", "sentence": "PPO's answers are better.",
    "remark": "", "champion": {"word": "no-evidence", "sentence": "There is no evidence that PPO's answers are better or worse."},
}  # fmt: skip


def overview_of(run, steps):
    from prefect import flow

    from flows.overview import Overview

    @flow(name="rlhf", flow_run_name="ci on a *simulated* site", persist_result=False)
    def whole():
        overview = Overview(run.config, run.store, run.plan)
        for step in steps:
            overview.begin(step)
            files = {"evaluate": {"verdict_json": json.dumps(VERDICT), "report_html": "<p>"}}
            files["promote"] = {"decision_json": json.dumps({"reason": "It becomes champion in place of none."})}
            overview.end(step, run.make(step, **files.get(step, {})), "ran")
        if steps[-1] != "promote":
            overview.begin("reward")
            overview.end("reward", None, "failed")
        overview.close()

    return whole(return_state=True)


@pytest.mark.usefixtures("prefect_server")
def test_the_overview_tells_every_step_the_verdict_the_decision_and_where_the_report_lies(tmp_path):
    run = Run(tmp_path)
    state = overview_of(run, list(run.plan))
    page = artifacts_of(state.state_details.flow_run_id)["rlhf-overview"]
    assert page.task_run_id is None
    for words in (
        r"# ci on a \*simulated\* site",
        "**Verdict: Better (gain +0.221, interval +0.184 to +0.259, by true)**",
        "PPO's answers are better.",
        "**Beside the champion: no evidence.** There is no evidence that PPO's answers are better or worse.",
        "It becomes champion in place of none.",
        f"stackrlhf report {run.plan['evaluate'].key[:12]}",
        r"| **ppo** | ran | [report](../../artifacts/key/ppo-report) | 1 min 05 s | 1.0 GB | score\_after 0.5 |",
        f"| **base** | `{run.plan['base'].key[:12]}` | ingest |",
    ):
        assert words in page.data
    assert "Verdict: Better" in page.description


@pytest.mark.usefixtures("prefect_server")
def test_the_overview_of_a_run_that_failed_says_where_and_links_the_steps_last_live_page(tmp_path):
    state = overview_of(Run(tmp_path), ["ingest", "base"])
    page = artifacts_of(state.state_details.flow_run_id)["rlhf-overview"].data
    assert "**reward failed**" in page
    assert "| **reward** | failed | [live](../../artifacts/key/reward-live) |  |  |  |" in page
    assert "| **ppo** | waiting |  |  |  |  |" in page


@pytest.mark.usefixtures("prefect_server")
def test_a_step_that_is_a_flow_run_of_its_own_is_linked_with_its_job(tmp_path):
    from prefect import flow

    from flows.overview import Overview

    run = Run(tmp_path)

    @flow(name="ppo", flow_run_name="ppo of ci on a site", persist_result=False)
    def job():
        return 1

    @flow(name="rlhf", persist_result=False)
    def whole():
        overview = Overview(run.config, run.store, run.plan)
        overview.begin("ppo")
        child = job(return_state=True)
        overview.end("ppo", run.make("ppo"), "ran")
        overview.close()
        return str(child.state_details.flow_run_id)

    state = whole(return_state=True)
    page = artifacts_of(state.state_details.flow_run_id)["rlhf-overview"].data
    assert f"[job](../../runs/flow-run/{state.result()})" in page


@pytest.mark.usefixtures("prefect_server")
def test_an_overview_that_cannot_be_written_costs_a_run_two_seconds_at_most(tmp_path, monkeypatch):
    import flows.overview as module
    from tasks import dashboard

    released = Event()

    def hang(**_):
        released.wait(60)
        raise ConnectionError

    for one in (module, dashboard):
        monkeypatch.setattr(one, "get_client", hang)
    run = Run(tmp_path)
    started = time.monotonic()
    try:
        assert overview_of(run, list(run.plan)).is_completed()
        assert time.monotonic() - started < 10
    finally:
        released.set()


def test_outside_a_flow_run_there_is_no_overview_and_no_error(tmp_path):
    from flows.overview import Overview

    run = Run(tmp_path)
    overview = Overview(run.config, run.store, run.plan)
    overview.begin("ingest")
    overview.end("ingest", None, "failed")
    overview.close()
    assert "ingest failed" in overview.page()
