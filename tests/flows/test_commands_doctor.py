"""doctor: what is well, what is not, each with its remedy; nothing is left behind, and no secret is printed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli import main
from flows.commands import checks_machine, checks_server
from flows.commands.doctor import Check
from tests.orchestra import clean_environment, free_port
from tests.s3_server import SECRET, TOKEN, S3Server, use

ROOT = Path(__file__).parents[2]


def doctor(capsys, *more: str) -> tuple[int, dict[str, Check], str]:
    code = main(["doctor", "--preset", "ci", "--json", *more])
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["ok"] == (code == 0)
    return code, {one["name"]: Check(**one) for one in found["checks"]}, said.out + said.err


@pytest.fixture
def light(monkeypatch):
    """Without what takes seconds and is looked at in a test of its own."""
    for name in ("packages", "accelerators"):
        monkeypatch.setattr(checks_machine, name, lambda: iter(()))
    for name in ("memory",):
        monkeypatch.setattr(checks_machine, name, lambda config: iter(()))
    monkeypatch.setattr(checks_server, "server", lambda: iter(()))


def test_this_machine_is_ready_and_nothing_is_left_behind(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(checks_server, "server", lambda: iter(()))
    code, found, _ = doctor(capsys, "--store", str(tmp_path / "store"))
    assert code == 0, found
    assert {"python", "packages", "cores", "torch", "bf16", "bitsandbytes", "memory", "disk", "tmp", "store"} <= set(found)
    assert all(check.remedy for check in found.values() if check.state != "ok")
    assert "ci needs" in found["memory"].text
    assert "not made yet" in found["store"].text
    assert list(tmp_path.iterdir()) == []


def test_a_version_outside_pyprojects_range_is_named_with_its_remedy(monkeypatch):
    true = checks_machine.version
    wrong = {"fastapi": "0.155.1", "prefect": "2.20.0"}
    monkeypatch.setattr(checks_machine, "version", lambda name: wrong.get(name) or true(name))
    found = {check.name: check for check in checks_machine.packages() if check.state == "fail"}
    assert set(found) == {"fastapi", "prefect"}
    assert "Prefect's server cannot start with it" in found["fastapi"].text
    assert found["fastapi"].remedy.startswith("pip install 'fastapi")


def test_what_does_not_fit_and_what_cannot_be_written_fails(capsys, light, monkeypatch):
    monkeypatch.setattr("flows.disk.free_at", lambda place: 1000)
    code, found, _ = doctor(capsys, "--store", "/proc/stackrlhf")
    assert code == 1
    assert {name: found[name].state for name in ("disk", "tmp", "store")} == {"disk": "fail", "tmp": "warn", "store": "fail"}
    assert "store gc" in found["disk"].remedy
    assert "cannot be written" in found["store"].text


def test_a_bucket_is_tried_out_and_left_as_it_was(capsys, light, tmp_path, monkeypatch):
    server = S3Server()
    server.send("PUT", "bucket")
    use(monkeypatch, server.url, tmp_path / "cache")
    code, found, said = doctor(capsys, "--store", "s3://bucket/prefix")
    assert (code, found["store"].state, found["clock"].state) == (0, "ok", "ok")
    assert server.objects("bucket") == []
    code, found, told = doctor(capsys, "--store", "s3://elsewhere/prefix")
    assert (code, found["store"].state) == (1, "fail")
    assert "make it, or name another --store" in found["store"].remedy
    server.stop()
    for secret in (SECRET, TOKEN):
        assert secret not in said + told


ALONE = """
import sys
from flows.cli import main
from flows.commands import checks_machine
for name in ("packages", "accelerators", "memory"):
    setattr(checks_machine, name, lambda *_: iter(()))
sys.exit(main(["doctor", "--preset", "ci", "--json", "--store", sys.argv[1]]))
"""


def run(tmp_path: Path, env: dict[str, str]) -> tuple[int, dict[str, Check], str]:
    """In a process of its own, whose Prefect reads `env`; without what takes long."""
    command = [sys.executable, "-c", ALONE, str(tmp_path / "store")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)
    return done.returncode, {one["name"]: Check(**one) for one in json.loads(done.stdout)["checks"]}, done.stdout + done.stderr


def test_a_server_that_is_away_fails_and_its_password_is_not_told(tmp_path):
    url = f"http://user:CANARYurl@127.0.0.1:{free_port()}/api"
    env = clean_environment() | {"PREFECT_HOME": str(tmp_path), "PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": "me:CANARYauth"}
    code, found, said = run(tmp_path, env)
    assert (code, found["prefect"].state) == (1, "fail")
    assert "prefect server start" in found["prefect"].remedy
    assert "CANARY" not in said


def test_a_server_with_everything_on_it_is_well(orchestra, tmp_path):
    code, found, said = run(tmp_path, orchestra.server.env)
    assert code == 0, said
    for name in ("prefect", "auth", "pool cpu", "pool gpu", "deployments", "automation"):
        assert found[name].state == "ok", found[name]
    assert orchestra.cpu.name in found["pool cpu"].text


@pytest.mark.parametrize(
    ("host", "scheme", "secret", "state"),
    [
        ("127.0.0.1", "http", False, "ok"),
        ("localhost", "http", False, "ok"),
        ("10.0.0.4", "http", False, "fail"),
        ("prefect.example", "https", False, "fail"),
        ("prefect.example", "http", True, "warn"),
        ("prefect.example", "https", True, "ok"),
    ],
)
def test_a_server_beyond_this_machine_needs_a_password(host, scheme, secret, state):
    check = checks_server._safety(f"{scheme}://{host}", host, scheme, secret)
    assert check.state == state
    assert bool(check.remedy) == (state != "ok")


def test_a_preset_that_there_is_not_is_one_line(capsys):
    assert main(["doctor", "--preset", "tinny"]) == 2
    assert "did you mean tiny?" in capsys.readouterr().err
