"""The services of docker/compose.yaml as processes on this machine: no engine, the same commands and environments.

The file is read by `docker-compose config`, so defaults, profiles and required variables mean what they mean there; the environment
that the image gives is read from the Dockerfile. What a container has to itself is translated: names and ports within its network
become ports on loopback, its volume /data a folder. In the place of two images stand PostgreSQL of Debian's packages, and moto's
server.
"""

import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.orchestra import BIN, ROOT, Server, _Process, clean_environment, free_port
from tests.s3_server import S3Server

COMPOSE = ROOT / "docker" / "compose.yaml"
DOCKERFILE = ROOT / "docker" / "Dockerfile"


def read_compose(env: dict[str, str], *profiles: str) -> dict[str, Any]:
    """What compose understands of the file; needs no engine."""
    command = [BIN / "docker-compose", "-f", COMPOSE, *(f"--profile={name}" for name in profiles), "config", "--format", "json"]
    bare = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    done = subprocess.run(command, env=bare | env, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise ValueError(done.stderr)
    return json.loads(done.stdout)


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, argument), comments out and continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", "", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def image_environment() -> dict[str, str]:
    found = " ".join(rest for word, rest in instructions() if word == "ENV")
    return dict(re.findall(r"(\w+)=(\S+)", found))


def postgres_folder() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[4]))
    return found[-1].parent if found else None


@contextmanager
def postgresql(user: str, password: str, database: str) -> Iterator[int]:
    """PostgreSQL on a free port of loopback; as user postgres where we are root, as which it refuses to run."""
    bin_folder = postgres_folder()
    assert bin_folder
    port, folder = free_port(), Path(tempfile.mkdtemp(prefix="stackrlhf-pg-", dir="/tmp"))  # pytest's own folders are closed to it
    owner: dict[str, Any] = {"cwd": folder}
    (folder / "password").write_text(password)
    if os.geteuid() == 0:
        entry = pwd.getpwnam("postgres")
        owner |= {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        for path in (folder, folder / "password"):
            os.chown(path, entry.pw_uid, entry.pw_gid)

    def ran(program: str, *args: object, **how: Any) -> None:
        command = [bin_folder / program, *map(str, args)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False, **how)
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stderr}")

    process = None
    try:
        made = ["-D", folder / "data", "-U", user, "--pwfile", folder / "password", "-E", "UTF8", "--no-sync"]
        ran("initdb", *made, "--auth-host=scram-sha-256", "--auth-local=reject", **owner)
        options = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": "", "fsync": "off"}
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [bin_folder / "postgres", "-D", folder / "data", *(f"--{name}={value}" for name, value in options.items())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **owner,
            )
        reach = ["--host=127.0.0.1", f"--port={port}", f"--username={user}"]
        until = time.monotonic() + 60
        while subprocess.run([bin_folder / "pg_isready", *reach], capture_output=True, check=False).returncode:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError((folder / "log").read_text())
            time.sleep(0.1)
        ran("createdb", *reach, database, env={"PGPASSWORD": password})
        yield port
    finally:
        if process and process.poll() is None:
            process.send_signal(signal.SIGINT)  # it ends its sessions, and stops
            process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def database_dump(port: int, user: str, password: str, database: str) -> bytes:
    folder = postgres_folder()
    assert folder
    command = [folder / "pg_dump", "--host=127.0.0.1", f"--port={port}", f"--username={user}", database]
    return subprocess.run(command, env={"PGPASSWORD": password}, capture_output=True, timeout=120, check=True).stdout


class Service(_Process):
    """One service's command, its output in a file."""

    def __init__(self, name: str, command: list[str], env: dict[str, str], check: list[str] | None, log: Path):
        super().__init__()
        self.name, self.command, self.env, self.check, self.log = name, command, env, check, log

    def start(self) -> None:
        self._start(self.command, self.env)

    def completed(self, seconds: float = 180) -> None:
        assert self._popen is not None
        code = self._popen.wait(seconds)
        assert code == 0, f"{self.name} ended with {code}:\n{self._tail()}"

    def healthy(self, seconds: float = 120) -> None:
        """Wait for the service's own health check, as compose does."""
        assert self.check, f"{self.name} has no health check"
        until = time.monotonic() + seconds
        while subprocess.run(self.check, env=self.env, capture_output=True, timeout=30, check=False).returncode:
            if not self.running or time.monotonic() > until:
                raise AssertionError(f"{self.name} is not healthy:\n{self._tail()}")
            time.sleep(0.3)


class Services:
    """All of them, started in the order of their `depends_on`. `data[name]` is what the service has mounted at /data.

    `programs` and `folder` are what the image has as /opt/stackrlhf/bin and /app; without them it is this environment and the root.
    """

    def __init__(self, home: Path, env: dict[str, str], *profiles: str, programs: Path = BIN, folder: Path = ROOT):
        self.home, self.programs, self.folder = home, programs, folder
        self.config = read_compose(env, *profiles)
        self.running: dict[str, Service] = {}
        self.data: dict[str, Path] = {}
        self._port = free_port()
        self.server = Server(home / "client", auth=env["PREFECT_AUTH"], port=self._port)
        """Not started by itself: how tests/orchestra.py speaks with the one that runs."""

    def __enter__(self) -> "Services":
        with ExitStack() as stack:
            stack.callback(self._stop)
            self.s3 = S3Server()
            stack.callback(self.s3.stop)
            login = self.config["services"]["postgres"]["environment"]
            self.database = login["POSTGRES_USER"], login["POSTGRES_PASSWORD"], login["POSTGRES_DB"]
            self.database_port = stack.enter_context(postgresql(*self.database))
            self._started = {"postgres", "s3"}
            for name in self.config["services"]:
                self._up(name)
            for service in self.running.values():
                if service.check and service.running:
                    service.healthy()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _stop(self) -> None:
        for service in reversed(self.running.values()):
            service.stop()

    def _up(self, name: str) -> None:
        if name in self._started:
            return
        self._started.add(name)
        definition = self.config["services"][name]
        for other, how in definition.get("depends_on", {}).items():
            self._up(other)
            if other in self.running:
                wait = {"service_healthy": Service.healthy, "service_completed_successfully": Service.completed}
                wait[how["condition"]](self.running[other])
        self.running[name] = self._service(name, definition)
        self.running[name].start()

    def _service(self, name: str, definition: dict[str, Any]) -> Service:
        mounted = [volume["source"] for volume in definition.get("volumes", []) if volume["target"] == "/data"]
        data = self.data[name] = self.home / (mounted[0] if mounted else f"unmounted-{name}")
        data.mkdir(parents=True, exist_ok=True)
        own = str(free_port())

        def here(text: str) -> str:
            text = text.replace("http://server:4200", f"http://127.0.0.1:{self._port}").replace("http://s3:7070", self.s3.url)
            text = text.replace("127.0.0.1:4200", f"127.0.0.1:{self._port}").replace("127.0.0.1:8080", f"127.0.0.1:{own}")
            return re.sub(r"^/data", str(data), {"0.0.0.0": "127.0.0.1", "4200": str(self._port)}.get(text, text))

        image = {key: here(value) for key, value in image_environment().items() if key != "PATH"}
        stated = {key: here(value) for key, value in definition.get("environment", {}).items()}
        address = {"PREFECT_SERVER_DATABASE_HOST": "127.0.0.1", "PREFECT_SERVER_DATABASE_PORT": str(self.database_port)}
        base = {key: value for key, value in clean_environment().items() if not re.match(r"AWS_|PG|.*_proxy$", key, re.IGNORECASE)}
        env = {**base, **image, **stated, **{key: value for key, value in address.items() if key in stated}}
        env |= {"PREFECT_WORKER_WEBSERVER_PORT": own, "PREFECT_SERVER_UI_API_URL": self.server.url}
        env |= {
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        }
        check = definition.get("healthcheck", {}).get("test")
        env["PATH"] = f"{self.programs}{os.pathsep}{os.environ['PATH']}"
        words = ["env", f"--chdir={self.folder}", *map(here, definition["command"])]
        test = ["env", *map(here, check[1:])] if check else None
        return Service(name, words, env, test, self.home / "logs" / f"{name}.log")
