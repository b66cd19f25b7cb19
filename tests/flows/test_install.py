"""deployments/install.py against real servers: twice changes nothing, mistakes end in one line, its automations work."""

import json
import signal
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.orchestra import BIN, Server, Worker, deploy, free_port, prefect, submit, wait

AUTH = "admin:CANARY0password"


@pytest.fixture(scope="module")
def told():
    """The address of a webhook on loopback, and what it was told."""
    heard: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_address[1]}/CANARY0hook", heard
    http.shutdown()
    http.server_close()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, told):
    """A server that wants a password, installed with everything that the session's own is not given."""
    server = Server(tmp_path_factory.mktemp("guarded") / "prefect", auth=AUTH)
    server.server_env["PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY"] = "PT1S"  # five by default
    with server:
        server.said = deploy(server, "--source", "/dumps/*.7z", "--notify", told[0]).stdout
        yield server


def on_server(server):
    """All that install.py makes, without the moments at which it made it."""
    with server.client() as client:
        deployments = client.read_deployments(limit=200)
        flows = {found.id: found.name for found in client.read_flows(limit=200)}
        return {
            "pools": {pool.name: pool.base_job_template for pool in client.read_work_pools()},
            "queues": sorted((queue.work_pool_name, queue.name, queue.priority) for queue in client.read_work_queues()),
            "deployments": sorted(
                (
                    str(d.id),
                    flows[d.flow_id],
                    d.name,
                    d.entrypoint,
                    d.version,
                    d.work_queue_name,
                    str(d.pull_steps),
                    str(d.parameters),
                )
                for d in deployments
            ),
            "schedules": sorted(str((s.id, s.slug, s.active, s.schedule)) for d in deployments for s in d.schedules),
            "automations": sorted((str(a.id), a.name, str(a.trigger)) for a in client.read_automations()),
        }


def weekly(server):
    with server.client() as client:
        deployment = client.read_deployment_by_name("retrain/weekly")
    (schedule,) = deployment.schedules
    return deployment.parameters["source"], schedule


def test_what_is_installed_is_what_the_files_say(guarded):
    found = on_server(guarded)
    names = {f"{flow}/{name}" for _, flow, name, *_ in found["deployments"]}
    assert len(names) == 13
    assert {"rlhf/tiny", "sft/gpu", "retrain/weekly"} <= names
    assert sorted(name for _, name, _ in found["automations"]) == [
        "stackrlhf crashed when silent",
        "stackrlhf failure notification",
    ]
    assert {("cpu", "steps", 1), ("cpu", "pipelines", 2)} <= set(found["queues"])
    source, schedule = weekly(guarded)
    assert (source, schedule.active) == (["/dumps/*.7z"], True), "a source switches the weekly retraining on"
    assert "13 created, 0 updated" in guarded.said
    assert "cron 0 3 * * 0, active" in guarded.said


def test_installing_again_changes_nothing_of_what_was_given_or_switched_by_hand(guarded):
    schedule = weekly(guarded)[1]
    prefect(guarded, "deployment", "schedule", "pause", "retrain/weekly", str(schedule.id), check=True)
    before = on_server(guarded)
    said = deploy(guarded).stdout
    assert on_server(guarded) == before
    assert not weekly(guarded)[1].active
    assert "0 created, 13 updated" in said
    assert said.count("unchanged") == 2
    assert "stackrlhf failure notification: as it was" in said


def test_without_a_source_or_a_webhook_it_is_said_what_is_left_out(orchestra):
    assert "inactive: give --source" in orchestra.said
    assert "stackrlhf failure notification: left out, for no --notify URL is given" in orchestra.said
    assert not weekly(orchestra.server)[1].active


def test_a_parameter_that_does_not_exist_or_does_not_fit_is_refused_when_the_run_is_submitted(guarded):
    for given, why in (
        ("overides={}", "not found on the deployment: 'overides'"),
        ("refresh=['ppo', 'pro']", "'refresh[1]'. Failure reason: 'pro' is not one of ['ingest', "),
        ('compute={"executor": "pol"}', "'compute.executor'. Failure reason: 'pol' is not one of ['inline', 'pool']"),
    ):
        done = prefect(guarded, "deployment", "run", "rlhf/tiny", "-p", given.replace("'", '"'))
        assert done.returncode == 1
        assert why in done.stdout + done.stderr


def test_what_is_wrong_ends_in_one_line(guarded):
    def ended(*args, **env):
        before, guarded.env = guarded.env, {name: value for name, value in (guarded.env | env).items() if value}
        try:
            done = deploy(guarded, *args, check=False)
        finally:
            guarded.env = before
        assert "Traceback" not in done.stderr
        (line,) = done.stderr.strip().splitlines()
        return done.returncode, line

    code, line = ended(PREFECT_API_AUTH_STRING="")
    assert (code, "wants a password: set PREFECT_API_AUTH_STRING" in line) == (2, True)
    code, line = ended(PREFECT_API_AUTH_STRING="admin:wrong")
    assert (code, "refuses the PREFECT_API_AUTH_STRING" in line) == (2, True)
    code, line = ended(PREFECT_API_URL="")
    assert (code, "set PREFECT_API_URL" in line) == (2, True)
    nobody = f"http://127.0.0.1:{free_port()}/api"
    code, line = ended(PREFECT_API_URL=nobody)
    assert (code, f"no Prefect server answers at {nobody}" in line) == (1, True)


def test_a_pool_of_another_type_is_not_overwritten(guarded):
    done = deploy(guarded, "--type", "docker", "--image", "stackrlhf", check=False)
    assert done.returncode == 2
    assert "the pool cpu is of type process, and a pool's type cannot be changed" in done.stderr


def test_a_containers_command_works_in_its_folder_and_copies_nothing(guarded, tmp_path):
    """Docker and Kubernetes jobs run `prefect flow-run execute` in /data, where the whole store may lie."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "large").write_text("not to be copied")
    run = submit(guarded, "ingest/cpu", config={"simulate": {"questions": 30}}, store="./store")  # no worker is there to take it
    env = guarded.env | {"PREFECT__FLOW_RUN_ID": str(run), "TMPDIR": str(tmp_path)}
    command = [BIN / "prefect", "flow-run", "execute"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=True)
    assert "Downloading flow code" not in done.stdout + done.stderr
    assert wait(guarded, run, 10).state.name == "Completed"
    assert sorted(path.name for path in folder.iterdir()) == ["large", "store"]


def test_a_run_whose_machine_died_is_crashed_by_the_automation_and_told_to_the_webhook(guarded, told, tmp_path):
    heard = told[1]
    with guarded.client() as client:
        silent, failed = sorted(client.read_automations(), key=lambda automation: automation.name)
        assert (silent.name, failed.name) == ("stackrlhf crashed when silent", "stackrlhf failure notification")
        shortened = silent.model_dump(mode="json", exclude={"id", "owner_resource"})
        shortened["trigger"]["within"] = 15  # 600 as installed; the small run has to end within it
        client.request("PUT", "/automations/{id}", path_params={"id": silent.id}, json=shortened)
    large = {"ingest.simulate.questions": 200_000}
    here = {"until": "ingest", "compute": {"executor": "inline"}}
    with Worker(guarded, "cpu", str(tmp_path / "store")) as worker:
        done = submit(guarded, "ingest/cpu", config={"simulate": {"questions": 40}})
        doomed = submit(guarded, "rlhf/ci", overrides=large, **here)
        wait(guarded, doomed, 60, states={"Running"})
        job = worker.job(doomed)
        assert wait(guarded, done, 60).state.name == "Completed"
        time.sleep(1)  # the first heartbeat is on its way
        worker.kill()
        job.send_signal(signal.SIGKILL)
        crashed = wait(guarded, doomed, 60)
    assert crashed.state.name == "Crashed"
    assert "No heartbeat" in crashed.state.message
    until = time.monotonic() + 10
    while not heard and time.monotonic() < until:
        time.sleep(0.1)
    assert [("is Crashed: No heartbeat" in message["text"], str(doomed) in message["text"]) for message in heard] == [(True, True)]
    assert wait(guarded, done, 5).state.name == "Completed", "a run that ended is not silent"


def test_neither_logs_nor_what_is_printed_hold_a_password_or_the_webhooks_address(guarded):
    logs = sorted(guarded.home.glob("*.log"))
    assert len(logs) >= 2
    assert [path for path in logs if "CANARY0" in path.read_text(errors="replace")] == []
    assert "CANARY0" not in guarded.said
