"""A real Prefect server and real process workers for tests, each a process of its own, ended by its pid whatever happens."""

import atexit
import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any, Self
from uuid import UUID

import psutil

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

_started: list["_Process"] = []


@atexit.register
def _end_all() -> None:
    for process in _started[:]:
        process.stop(seconds=1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def clean_environment() -> dict[str, str]:
    """This process's, without what a user or another test told Prefect, the store or the trackers."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "STACKRLHF"))}
    return mine | {
        "PATH": f"{BIN}{os.pathsep}{mine.get('PATH', '')}",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "NO_COLOR": "1",
        "COLUMNS": "200",  # tables and messages of the prefect command are not wrapped
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_CLI_PROMPT": "false",
    }


class _Process:
    """A child in a session of its own, its output in a file."""

    log: Path

    def __init__(self) -> None:
        self._popen: subprocess.Popen[bytes] | None = None
        self._left: list[psutil.Process] = []

    def _start(self, command: list[str], env: dict[str, str]) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._popen = subprocess.Popen(
                command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        _started.append(self)

    @property
    def process(self) -> psutil.Process:
        assert self._popen is not None, "not started"
        return psutil.Process(self._popen.pid)

    @property
    def running(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    def _below(self) -> list[psutil.Process]:
        """Everything below this process, and what it left behind when it was killed."""
        found = []
        if self.running:
            with suppress(psutil.Error):
                found = self.process.children(recursive=True)
        return found + [process for process in self._left if process not in found and process.is_running()]

    def kill(self) -> None:
        """SIGKILL this process alone; what it started goes on, until `stop`."""
        if self._popen is not None:
            self._left = self._below()
            self._popen.kill()
            self._popen.wait(10)

    def stop(self, seconds: float = 10) -> None:
        """End it and everything below it."""
        if self._popen is None:
            return
        below = self._below()
        if self.running:
            self._popen.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._popen.wait(seconds)
        for process in below:
            with suppress(psutil.Error):
                process.kill()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)  # its own session: nobody else's
        self._popen.wait(10)
        psutil.wait_procs(below, 5)
        self._popen, self._left = None, []
        if self in _started:
            _started.remove(self)

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""


class Server(_Process):
    """`prefect server start` on loopback; sqlite in `home` unless `database` is a connection URL."""

    def __init__(self, home: Path, *, database: str | None = None, auth: str | None = None, port: int | None = None):
        super().__init__()
        self.home, self.auth, self.port = Path(home), auth, port or free_port()
        self.log = self.home / "server.log"
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.env = clean_environment() | {"PREFECT_HOME": str(self.home), "PREFECT_API_URL": self.url}
        self.server_env: dict[str, str] = {}
        """More environment for the server alone; may be changed before `start`."""
        if auth:
            self.env["PREFECT_API_AUTH_STRING"] = auth
            self.server_env["PREFECT_SERVER_API_AUTH_STRING"] = auth
        if database:
            self.server_env["PREFECT_API_DATABASE_CONNECTION_URL"] = database

    def __enter__(self) -> Self:
        self.start()
        return self

    def start(self) -> None:
        env = {name: value for name, value in self.env.items() if name != "PREFECT_API_URL"} | self.server_env
        env.setdefault("PREFECT_SERVER_UI_API_URL", self.url)  # its pages ask port 4200 otherwise
        self._start([sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)], env)
        until = time.monotonic() + 180
        while not self.healthy():
            if not self.running or time.monotonic() > until:
                tail = self._tail()
                self.stop()
                raise AssertionError(f"the server did not start:\n{tail}")
            time.sleep(0.2)

    def healthy(self) -> bool:
        request = urllib.request.Request(f"{self.url}/health")
        if self.auth:
            request.add_header("Authorization", "Basic " + base64.b64encode(self.auth.encode()).decode())
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def client(self) -> Any:
        """A synchronous client of this server, whatever the settings of this process are."""
        from prefect.client.orchestration import SyncPrefectClient

        return SyncPrefectClient(self.url, auth_string=self.auth)


class Worker(_Process):
    """`prefect worker start` of the process pool `pool`; its jobs use the store `store`."""

    def __init__(
        self,
        server: Server,
        pool: str,
        store: str,
        *,
        name: str | None = None,
        limit: int | None = None,
        env: dict[str, str] | None = None,
    ):
        super().__init__()
        self.server, self.pool, self.name, self.limit = server, pool, name or f"{pool}-{os.urandom(3).hex()}", limit
        self.log = server.home / f"worker-{self.name}.log"
        self.env = server.env | {"PREFECT_WORKER_QUERY_SECONDS": "1", "STACKRLHF_STORE": str(store)} | (env or {})

    def __enter__(self) -> Self:
        self.start()
        return self

    def start(self) -> None:
        limit = ["--limit", str(self.limit)] if self.limit else []
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", self.pool, "--name", self.name, *limit]
        self._start(command, self.env)
        until = time.monotonic() + 90
        while "started!" not in self._tail():
            if not self.running or time.monotonic() > until:
                tail = self._tail()
                self.stop()
                raise AssertionError(f"the worker of {self.pool} did not start:\n{tail}")
            time.sleep(0.1)

    def jobs(self) -> list[psutil.Process]:
        """The processes that run flows for this worker, one a flow run; those that outlived it too."""
        return [process for process in self._below() if _is_job(process)]

    def job(self, run_id: UUID, seconds: float = 60) -> psutil.Process:
        """The process of one flow run; waits until it is there."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for process in self.jobs():
                if run_of(process) == run_id:
                    return process
            time.sleep(0.1)
        raise AssertionError(f"no job of {run_id} on {self.name} within {seconds} s:\n{self._tail()}")


def _is_job(process: psutil.Process) -> bool:
    try:
        return "prefect.engine" in " ".join(process.cmdline()) or "prefect.flow_engine" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def run_of(job: psutil.Process) -> UUID | None:
    """Which flow run a job process executes."""
    try:
        return UUID(job.environ()["PREFECT__FLOW_RUN_ID"])
    except (psutil.Error, KeyError, ValueError):
        return None


# ---- what a user does


def prefect(server: Server, *args: str, check: bool = False) -> subprocess.CompletedProcess[str]:
    """The prefect command against the server."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", *args]
    return _command(server, command, check)


def deploy(server: Server, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The documented command."""
    return _command(server, [sys.executable, "deployments/install.py", *args], check)


def _command(server: Server, command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=ROOT, env=server.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False
    )
    assert not check or done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


def submit(server: Server, deployment: str, **parameters: Any) -> UUID:
    """Start a flow run of a deployment by the prefect command; returns at once."""
    given = [part for name, value in parameters.items() for part in ("-p", f"{name}={json.dumps(value)}")]
    done = prefect(server, "deployment", "run", deployment, *given, check=True)
    found = re.search(r"UUID: ([0-9a-f-]{36})", done.stdout)
    assert found, done.stdout
    return UUID(found[1])


def wait(server: Server, run_id: UUID, timeout: float = 300, *, states: set[str] | None = None) -> Any:
    """The flow run once it is final (or in one of `states`, by name); an API that is away meanwhile is waited for."""
    until, run = time.monotonic() + timeout, None
    while time.monotonic() < until:
        with suppress(Exception), server.client() as client:
            run = client.read_flow_run(run_id)
            if run.state and (run.state.name in states if states else run.state.is_final()):
                return run
        time.sleep(0.3)
    raise AssertionError(f"{run_id} is {run.state if run else 'not readable'} after {timeout} s")


def task_states(server: Server, run_id: UUID, seconds: float = 15) -> dict[str, str]:
    """The names of the task runs' states by the task runs' names, the newest of each. States arrive by events: of a finished
    run all are waited for, `seconds` at most."""
    from prefect.client.schemas.filters import FlowRunFilter

    until = time.monotonic() + seconds
    while True:
        with server.client() as client:
            ended = client.read_flow_run(run_id).state.is_final()
            runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [run_id]}))
        if not ended or (runs and all(run.state and run.state.is_final() for run in runs)) or time.monotonic() > until:
            runs.sort(key=lambda run: run.start_time or run.expected_start_time or run.created)
            return {run.name: run.state.name if run.state else "?" for run in runs}
        time.sleep(0.3)


def jobs_of(server: Server, run_id: UUID) -> dict[str, list[Any]]:
    """The flow runs that a flow run started, by the flow's name (the step), oldest first."""
    from prefect.client.schemas.filters import FlowRunFilter

    found: dict[str, list[Any]] = {}
    with server.client() as client:
        runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id={"any_": [run_id]}))
        names: dict[UUID, str] = {}
        for run in sorted(runs, key=lambda run: run.created):
            if run.flow_id not in names:
                names[run.flow_id] = client.request("GET", "/flows/{id}", path_params={"id": run.flow_id}).json()["name"]
            found.setdefault(names[run.flow_id], []).append(run)
    return found


def artifacts(server: Server, run_id: UUID) -> dict[str, Any]:
    """The data of the artifacts of a run and of its jobs by their keys, the newest of each."""
    from prefect.client.schemas.filters import FlowRunFilter

    ids = [run_id, *(run.id for runs in jobs_of(server, run_id).values() for run in runs)]
    with server.client() as client:
        found = client.read_artifacts(flow_run_filter=FlowRunFilter(id={"any_": ids}), limit=200)
    return {artifact.key: artifact.data for artifact in sorted(found, key=lambda artifact: artifact.updated) if artifact.key}
