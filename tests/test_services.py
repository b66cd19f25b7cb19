"""The installation of docker/compose.yaml, by hand: PostgreSQL, an S3 store, Prefect's server with a password, and two workers that
share nothing but these.

STACKRLHF_TEST_PRESET=tiny runs the preset `tiny` (five minutes) instead of `ci`. STACKRLHF_TEST_IMAGE=cpu (or cuda) first runs the
install steps of docker/Dockerfile (minutes, 2 GB), with STACKRLHF_TEST_PYTHON, and everything from there.
"""

import base64
import hashlib
import json
import os
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from tasks.manifest import Manifest
from tests.docker.image import build
from tests.docker.services import Services, database_dump, postgres_folder
from tests.orchestra import jobs_of, submit, task_states, wait

PRESET = os.environ.get("STACKRLHF_TEST_PRESET", "ci")
STEPS = ["ingest", "base", "sft", "reward", "ppo", "evaluate", "promote"]
POOLS = dict.fromkeys(STEPS, "gpu") | {"ingest": "cpu", "promote": "cpu"}
SECRETS = {
    "POSTGRES_PASSWORD": "CANARY0database0password",
    "PREFECT_AUTH": "someone:CANARY0server0password",
    "S3_ACCESS_KEY": "AKIACANARY",
    "S3_SECRET_KEY": "CANARY0secret0of0the0store",
}

pytestmark = pytest.mark.skipif(not postgres_folder(), reason="PostgreSQL is not installed (Debian: apt-get install postgresql)")


@pytest.fixture(scope="module")
def services(tmp_path_factory):
    image = {}
    if torch := os.environ.get("STACKRLHF_TEST_IMAGE"):
        made = build(tmp_path_factory.mktemp("image"), torch, os.environ.get("STACKRLHF_TEST_PYTHON", "python3"))
        image = dict(zip(("programs", "folder"), made))
    with Services(tmp_path_factory.mktemp("services"), SECRETS, "no-gpu", **image) as running:
        yield running


@pytest.fixture(scope="module")
def first(services):
    """The whole pipeline, on two machines whose caches are empty."""
    assert not list(services.data["cpu-worker"].rglob("manifest.json"))
    return finished(services)


def finished(services: Services, **parameters: Any) -> Any:
    run = wait(services.server, submit(services.server, f"rlhf/{PRESET}", **parameters), 900)
    logs = "".join(
        service.log.read_text(errors="replace")[-5000:] for name, service in services.running.items() if "worker" in name
    )
    assert run.state.is_completed(), f"{run.state}\n{logs}"
    print(f"{PRESET} {parameters or ''}: {(run.end_time - run.start_time).total_seconds():.0f} s")
    return run


def answer(services: Services, path: str, auth: str | None, body: dict | None = None) -> int:
    headers = {"Content-Type": "application/json"}
    if auth is not None:
        headers["Authorization"] = "Basic " + base64.b64encode(auth.encode()).decode()
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(f"{services.server.url}{path}", data=data, headers=headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def manifests(folder: Path) -> dict[tuple[str, str], tuple[Manifest, Path]]:
    found = [(Manifest.parse(path.read_text()), path.parent) for path in folder.rglob("manifest.json")]
    return {(manifest.step, manifest.key): (manifest, path) for manifest, path in found}


def steps_of(services: Services, run: Any) -> dict[str, str]:
    """The states of the parent's own tasks. Prefect adds one named after the deployment for every job that it started."""
    return {name: state for name, state in task_states(services.server, run.id).items() if "/" not in name}


def test_requests_without_the_password_are_refused(services):
    right = SECRETS["PREFECT_AUTH"]
    for path, body in [("/flow_runs/filter", {}), ("/admin/settings", None), ("/block_documents/filter", {}), ("/logs/filter", {})]:
        assert [answer(services, path, auth, body) for auth in (None, "someone:else", right)] == [401, 401, 200], path
    assert answer(services, "/health", None) == 200  # what health checks ask
    assert [listens(services, auth) for auth in (None, "someone:else", right)] == [False, False, True]


def listens(services: Services, auth: str | None) -> bool:
    """Does the server's websocket of events accept this password?"""
    address = services.server.url.replace("http", "ws") + "/events/out"
    with connect(address, subprotocols=[Subprotocol("prefect")], proxy=None, open_timeout=10) as socket:
        try:
            socket.send(json.dumps({"type": "auth", "token": auth}))
            return json.loads(socket.recv(10))["type"] == "auth_success"
        except ConnectionClosed:
            return False


def test_the_pipeline_runs_from_empty_caches_on_two_machines_that_share_only_the_bucket(services, first):
    assert steps_of(services, first) == dict.fromkeys(STEPS, "Completed")
    jobs = jobs_of(services.server, first.id)
    assert {step: [run.work_pool_name for run in runs] for step, runs in jobs.items()} == {step: [POOLS[step]] for step in STEPS}
    stored = [name for name in services.s3.objects("stackrlhf") if name.endswith("/manifest.json")]
    assert {name.split("/")[1] for name in stored} == set(STEPS)
    assert str(first.id).encode() in database_dump(services.database_port, *services.database)  # it is PostgreSQL that remembers


def test_the_same_again_is_all_cached_and_starts_no_job(services, first):
    again = finished(services)
    assert steps_of(services, again) == dict.fromkeys(STEPS, "Cached")
    assert jobs_of(services.server, again.id) == {}


def test_one_override_runs_only_what_depends_on_it(services, first):
    override, dependent = {"promote.pointer": "another"}, ["promote"]
    if PRESET != "ci":  # a minute more
        override, dependent = {"evaluate.confidence": 0.9}, ["evaluate", "promote"]
    changed = finished(services, overrides=override)
    assert steps_of(services, changed) == {step: "Completed" if step in dependent else "Cached" for step in STEPS}
    assert sorted(jobs_of(services.server, changed.id)) == sorted(dependent)


def test_the_machines_caches_agree_with_the_bucket_and_with_each_other(services, first, tmp_path):
    bucket = {}
    for name in services.s3.objects("stackrlhf"):
        if name.endswith("/manifest.json"):
            manifest = Manifest.parse(services.s3.send("GET", f"stackrlhf/{name}").decode())
            bucket[manifest.step, manifest.key] = manifest
    third = fetch_all(services, list(bucket), tmp_path)
    caches = {name: manifests(services.data[name] / "cache") for name in ("cpu-worker", "gpu-stand-in")}
    caches["third"] = manifests(third)
    assert set(caches["third"]) == set(bucket)
    assert {step for step, _ in caches["gpu-stand-in"]} >= {"ingest", "base", "sft", "reward", "ppo"}
    for machine, cache in caches.items():
        for key, (manifest, folder) in cache.items():
            assert manifest == bucket[key], f"{machine}: {key}"
            there = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
            digests = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in there}
            assert digests == {name: entry.sha256 for name, entry in manifest.files.items()}, f"{machine}: {key}"


def fetch_all(services: Services, keys: list[tuple[str, str]], home: Path) -> Path:
    """A third machine reads everything."""
    code = """if True:
        import json, sys
        from tasks.artifacts import Store
        store = Store(sys.argv[1])
        for step, key in json.load(sys.stdin):
            store.open(store.artifact(store.manifest(step, key)))
        """
    env = services.running["cpu-worker"].env | {"STACKRLHF_CACHE": str(home)}
    command = ["python", "-c", code, env["STACKRLHF_STORE"]]
    done = subprocess.run(
        command, cwd=services.folder, env=env, input=json.dumps(keys), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return home


def test_no_secret_is_in_the_database_the_logs_the_artifacts_or_any_folder(services, first):
    passwords = [value for name, value in SECRETS.items() if name != "S3_ACCESS_KEY"]  # the name of a key is no secret
    hidden = [value.split(":")[-1].encode() for value in passwords]
    hidden += [base64.b64encode(SECRETS["PREFECT_AUTH"].encode())]
    places = {"database": database_dump(services.database_port, *services.database)}
    places |= {f"s3://{name}": services.s3.send("GET", f"stackrlhf/{name}") for name in services.s3.objects("stackrlhf")}
    places |= {str(path): path.read_bytes() for path in services.home.rglob("*") if path.is_file()}
    assert len(places) > 100
    assert any(b"rlhf" in content for content in places.values())
    assert [(place, secret) for place, content in places.items() for secret in hidden if secret in content] == []
