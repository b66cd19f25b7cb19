"""docs/operations.md: every command of the page is run, in its order, against a real server with real workers.

What needs an engine, a cluster, an account or a GPU is listed in ELSEWHERE, and checked there in another way. A command that is
neither run nor listed fails the test, and so does an entry for a command that the page no longer has.
"""

import argparse
import configparser
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from uuid import UUID

import psutil
import pytest
import yaml

from tests.orchestra import ROOT, clean_environment, free_port
from tests.s3_server import S3Server

PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
LONG_RUNNING = re.compile(r"^(?:[A-Z_]+=\S+ )*(prefect server start|prefect worker start|tensorboard)\b")
READING = re.compile(
    r"^stackrlhf (doctor|plan|why|report|chat|compare|export|store (ls|verify|gc.* --dry-run))\b"
    r"|^prefect (flow-run (ls|logs)|deployment schedule ls)\b"
)
"""Changes nothing that the others read: neighbours among these run at once, a core each."""


def commands(page: str = PAGE) -> list[str]:
    """The lines of every ```bash and ```console block, in the order of the page."""
    blocks = re.findall(r"^```(?:bash|console)\n(.*?)^```", page, re.M | re.S)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines() if line.strip() and line[0] != "#"]


# ---- what cannot run here, and what of it can be checked


def extra_exists(command: str) -> None:
    [extra] = re.findall(r"\.\[(\w+)\]", command)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extra in project["optional-dependencies"], f"pyproject.toml has no extra {extra}"


def make_knows(command: str) -> None:
    subprocess.run(["make", "-n", *command.split()[1:]], cwd=ROOT, check=True, capture_output=True)


def compose_would(command: str) -> None:
    """The services are those of compose.yaml, the options those of compose, what `exec` runs is run above."""
    words = shlex.split(command)
    assert words[2:4] == ["-f", "docker/compose.yaml"]
    verb, given = words[4], words[5:]
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    named = [word for word in given if word in services]
    if verb in {"exec", "logs"}:
        assert named, f"no service of compose.yaml in {command!r}"
    if verb == "exec":
        assert " ".join(given[1:]) in commands()
    if compose := shutil.which("docker-compose"):
        told = subprocess.run([compose, verb, "--help"], capture_output=True, text=True, check=True).stdout
        for option in [word for word in given if word.startswith("-")] if verb != "exec" else []:
            assert re.search(rf"(^|[ ,]){re.escape(option)}\b", told, re.M), f"docker compose {verb} has no {option}"


def dockerfile_takes(command: str) -> None:
    words = shlex.split(command)
    assert (ROOT / words[words.index("-f") + 1]).is_file()
    [argument] = [words[i + 1].partition("=")[0] for i, word in enumerate(words) if word == "--build-arg"]
    assert re.search(rf"^ARG {argument}\b", (ROOT / "docker" / "Dockerfile").read_text(), re.M)


def template(kind: str, pool: str, arguments: argparse.Namespace) -> dict:
    sys.path.insert(0, str(ROOT / "deployments"))
    try:
        return importlib.import_module("pool_templates").rendered(kind, pool, arguments)
    finally:
        sys.path.remove(str(ROOT / "deployments"))


def pools_render(command: str) -> None:
    """As the server would get them: this one has process pools, and a pool keeps its type."""
    words = shlex.split(command)
    assert "--type" in subprocess.run(
        [sys.executable, *words[1:2], "--help"], cwd=ROOT, capture_output=True, text=True, check=True, env=clean_environment()
    ).stdout  # fmt: skip
    parser = argparse.ArgumentParser()
    parser.add_argument("--type", default="process")
    for option in ("--image", "--store", "--volume", "--python"):
        parser.add_argument(option)
    parser.add_argument("--env", default=[])
    arguments = parser.parse_args(words[2:])
    for pool in ("cpu", "gpu"):
        rendered = template(arguments.type, pool, arguments)
        assert not arguments.image or rendered["variables"]["properties"]["image"]["default"] == arguments.image
        assert rendered["variables"]["properties"]["env"]["default"]["STACKRLHF_STORE"] == arguments.store


def secret_is_the_template_s(command: str) -> None:
    name = command.split()[4]
    arguments = argparse.Namespace(image="an/image", store="s3://bucket/store", volume=None, python=None, env=[])
    assert template("kubernetes", "gpu", arguments)["variables"]["properties"]["env_secret"]["default"] == name


def worker_type_is_known(command: str) -> None:
    kind = command.rpartition(" ")[2]
    assert (ROOT / "deployments" / "pools" / f"{kind}.yaml").is_file()
    if importlib.util.find_spec(f"prefect_{kind}") is None:
        print(f"prefect-{kind} is not installed: that it knows the type {kind} was not checked")
        return
    from prefect_kubernetes import KubernetesWorker

    assert KubernetesWorker.type == kind


def wandb_knows(command: str) -> None:
    if importlib.util.find_spec("wandb") is None:
        print(f"wandb is not installed: {command!r} was not checked")
        return
    subprocess.run([sys.executable, "-m", "wandb", command.split()[1], "--help"], check=True, capture_output=True)


def is_a_checkout(command: str) -> None:
    assert (ROOT / ".git").exists()


COMPOSE = "docker compose -f docker/compose.yaml"
ELSEWHERE: dict[str, Callable[[str], None]] = {
    "make install": make_knows,  # what has been done, where this test runs
    "git pull": is_a_checkout,
    "pip install -c requirements.lock -e '.[kubernetes]'": extra_exists,
    "pip install -c requirements.lock -e '.[tensorboard]'": extra_exists,
    # an engine
    f"{COMPOSE} up -d --build --wait": compose_would,
    f"{COMPOSE} exec cpu-worker prefect deployment run rlhf/tiny --watch": compose_would,
    f"{COMPOSE} logs --follow gpu-worker": compose_would,
    f"{COMPOSE} down": compose_would,
    "docker build -f docker/Dockerfile -t registry.example.org/stackrlhf --build-arg TORCH=cuda .": dockerfile_takes,
    # a cluster
    "kubectl create secret generic stackrlhf-env --from-literal=AWS_ACCESS_KEY_ID=... --from-literal=AWS_SECRET_ACCESS_KEY=...": (
        secret_is_the_template_s
    ),
    "python deployments/install.py --type kubernetes --image registry.example.org/stackrlhf --store s3://stackrlhf/store": (
        pools_render
    ),
    "python deployments/install.py --store s3://stackrlhf/store": pools_render,  # as the one of section 2 otherwise, which is run
    "prefect worker start --pool cpu --type kubernetes": worker_type_is_known,
    "prefect worker start --pool gpu --type kubernetes": worker_type_is_known,
    # an account
    "wandb sync trackers/wandb/offline-run-*": wandb_knows,
}  # fmt: skip


@pytest.mark.parametrize("command", ELSEWHERE)
def test_a_command_that_cannot_run_here_is_in_the_page_and_its_parts_are_right(command):
    assert command in commands(), "the page no longer has it: take it out of ELSEWHERE"
    ELSEWHERE[command](command)


def test_the_systemd_unit_starts_a_worker_of_one_gpu():
    [unit] = re.findall(r"^```ini\n(.*?)^```", PAGE, re.M | re.S)
    parsed = configparser.ConfigParser(strict=False)
    parsed.optionxform = str
    parsed.read_string(unit.replace("%", "%%"))
    start = parsed["Service"]["ExecStart"].replace("%H-gpu%i", "$(hostname)-gpu0")
    assert f"CUDA_VISIBLE_DEVICES=0 {start.removeprefix('/opt/stackrlhf/.venv/bin/')}" in commands()
    assert parsed["Service"]["Environment"] == "CUDA_VISIBLE_DEVICES=%i"


def test_every_variable_of_ours_is_in_the_page_s_table():
    sources = [path for folder in ("flows", "tasks", "deployments") for path in (ROOT / folder).rglob("*.py")]
    named = {name for path in sources for name in re.findall(r"\bSTACKRLHF_[A-Z_]+\b", path.read_text(encoding="utf-8"))}
    ours = named - {"STACKRLHF_VERSION"}  # from install.py to prefect.yaml
    table = PAGE[PAGE.index("### Environment") :]
    assert not {name for name in ours if f"`{name}`" not in table}


def test_every_link_of_the_page_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target


# ---- everything else is run


class Reader:
    """Someone who types the page's commands into a shell, in a copy of the checkout."""

    def __init__(self, home: Path) -> None:
        self.home, self.folder = home, home / "checkout"
        self.folder.mkdir()
        for entry in ROOT.iterdir():
            if entry.name not in {"store", "trackers", ".git", "docker"}:
                (self.folder / entry.name).symlink_to(entry)
        shutil.copytree(ROOT / "docker", self.folder / "docker")  # docker/.env is written there
        (home / "srv" / "backup").mkdir(parents=True)
        (home / "srv" / "models").mkdir()
        self.port, self.board = free_port(), free_port()
        self.s3 = S3Server()
        self.s3.send("PUT", "stackrlhf")
        self.env = clean_environment() | {
            "PREFECT_HOME": str(home / "prefect"),
            "STACKRLHF_CACHE": str(home / "cache"),
            "AWS_ACCESS_KEY_ID": "reader",
            "AWS_SECRET_ACCESS_KEY": "reader",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.going: list[tuple[str, subprocess.Popen[bytes], Path]] = []
        self.runs: list[UUID] = []
        self.seconds: dict[str, float] = {}

    def here(self, command: str) -> str:
        """The command with what is different on this machine: ports, places, the small preset, the run that was started last."""
        for there, here in (
            (r"\brlhf/tiny\b", "rlhf/ci"),
            (r"\bconfig=tiny\b", "config=ci"),
            (r"^stackrlhf (run|plan|why \w+|doctor)\b", r"stackrlhf \1 --preset ci"),
            (r" --watch$", " --watch --watch-interval 1"),
            (r"^(prefect server start)$", rf"\1 --port {self.port}"),
            (r"http://127\.0\.0\.1:4200", f"http://127.0.0.1:{self.port}"),
            (r"https://s3\.example\.org", self.s3.url),
            (r"/srv/", f"{self.home}/srv/"),
            (r"\bRUN_ID\b", str(self.runs[-1]) if self.runs else "RUN_ID"),
            (r"^(tensorboard .*)$", rf"\1 --port {self.board}"),
            (r"\blatest champion\b", "latest latest"),  # the small preset learns nothing, so there is no champion
            (r"^(prefect deployment run rlhf/stackllama-7b .*)$", r"\1 --start-in '30 days'"),  # accepted, and not begun
        ):
            command = re.sub(there, here, command)
        return command

    def type(self, command: str) -> None:
        started = time.monotonic()
        line = self.here(command)
        if export := re.fullmatch(r"export (\w+)=(\S+)", line):
            self.env[export[1]] = export[2]
        elif LONG_RUNNING.match(line):
            self._start(line)
        else:
            done = subprocess.run(
                ["bash", "-euc", line], cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=240, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{line}\nended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            if found := re.search(r"UUID: ([0-9a-f-]{36})", done.stdout):
                self.runs.append(UUID(found[1]))
        self.seconds[command] = time.monotonic() - started

    def _start(self, line: str) -> None:
        log = self.home / f"{len(self.going)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-euc", f"exec env {line}"], cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, start_new_session=True,
            )  # fmt: skip
        self.going.append((line, process, log))
        until = time.monotonic() + 120
        while not self._is_up(line, log):
            assert process.poll() is None, f"{line}\nended with {process.returncode}:\n{log.read_text()[-3000:]}"
            assert time.monotonic() < until, f"{line}\ndid not start:\n{log.read_text()[-3000:]}"
            time.sleep(0.2)

    def _is_up(self, line: str, log: Path) -> bool:
        if "prefect worker start" in line:
            return "started!" in log.read_text()
        address = f"127.0.0.1:{self.board}/" if line.startswith("tensorboard") else f"127.0.0.1:{self.port}/api/health"
        with suppress(OSError), urllib.request.urlopen(f"http://{address}", timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    def end(self, keep: int = 0) -> None:
        """End what was started last, until `keep` are left."""
        while len(self.going) > keep:
            _, process, _ = self.going.pop()
            below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            for child in below:
                with suppress(psutil.Error):
                    child.kill()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)

    def state(self, run: UUID, wanted: set[str], seconds: float = 240) -> str:
        from prefect.client.orchestration import SyncPrefectClient

        until, name = time.monotonic() + seconds, "?"
        while time.monotonic() < until:
            with SyncPrefectClient(f"http://127.0.0.1:{self.port}/api") as client:
                name = client.read_flow_run(run).state.name
            if name in wanted:
                return name
            time.sleep(0.3)
        raise AssertionError(f"{run} is {name}, not {wanted}")


@pytest.fixture
def reader(tmp_path) -> Iterator[Reader]:
    reader = Reader(tmp_path)
    yield reader
    reader.end()
    reader.s3.stop()


def test_every_other_command_runs_as_it_stands(reader):
    typed = [command for command in dict.fromkeys(commands()) if command not in ELSEWHERE]  # each once
    wrong: list[str] = []

    def run(command: str) -> None:
        if command.startswith("tensorboard") and importlib.util.find_spec("tensorboard") is None:
            print(f"not installed, not run: {command}")
            return
        try:
            reader.type(command)
            does_what_the_page_says(command, reader)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            wrong.append(f"{command}\n{error}")

    with ThreadPoolExecutor(2) as both:
        for reads, group in itertools.groupby(typed, lambda command: bool(READING.match(command))):
            for _ in (both.map if reads else map)(run, list(group)):
                pass
    print("\n".join(f"{seconds:6.1f} s  {command}" for command, seconds in sorted(reader.seconds.items(), key=lambda x: -x[1])))
    assert not wrong, "\n\n".join(wrong)


def does_what_the_page_says(command: str, reader: Reader) -> None:
    if command.startswith("prefect deployment run") and "--watch" not in command and "stackllama" not in command:
        reader.state(reader.runs[-1], {"Running", "Completed"})
    if "prefect flow-run cancel" in command:
        reader.state(reader.runs[-1], {"Cancelled", "Completed"})
    if "prefect flow-run retry" in command:
        reader.state(reader.runs[-1], {"Completed"})
    if "retrain/weekly -p" in command:  # it began; how it ends is tested in tests/flows/test_retrain.py
        reader.type(f"prefect flow-run cancel {reader.runs[-1]}")
        reader.state(reader.runs[-1], {"Cancelled", "Failed", "Crashed"})
    if "$(hostname)" in command or command.startswith("tensorboard"):
        reader.end(keep=3)  # the server and the two workers go on
    if "--report-to tensorboard" in command:
        assert list((reader.folder / "trackers" / "tensorboard").glob("sft-*/events.out.*"))
    if command.startswith("tar"):
        assert Path(reader.here(command).split()[-2]).stat().st_size > 0
    if command.startswith("stackrlhf export"):
        assert (reader.home / "srv" / "models" / "best" / "README.md").is_file()
