"""The image and the installation around it, checked without an engine: hadolint, compose's own reader, and the files themselves."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.docker.services import COMPOSE, DOCKERFILE, image_environment, instructions, read_compose
from tests.orchestra import BIN, ROOT

SECRETS = ["POSTGRES_PASSWORD", "PREFECT_AUTH", "S3_ACCESS_KEY", "S3_SECRET_KEY"]
FILLED = {name: f"filled-{name}" for name in SECRETS}
DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")
OURS = {"migrate", "server", "bucket", "deploy", "cpu-worker", "gpu-worker", "gpu-stand-in"}
FILES = ["requirements.txt", "torch-cpu.txt", "torch-cuda.txt", "build.txt"]


@pytest.fixture(scope="module")
def compose():
    return read_compose(FILLED, "gpu", "no-gpu")


def locked(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9][a-z0-9._-]*)==([^\s\\;]+)", path.read_text(), re.MULTILINE))


def test_hadolint_finds_nothing():
    done = subprocess.run([BIN / "hadolint", "--no-color", DOCKERFILE], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_would_find_something(tmp_path):
    (tmp_path / "Dockerfile").write_text(DOCKERFILE.read_text().replace("USER 10001:10001", "USER root"))
    done = subprocess.run([BIN / "hadolint", tmp_path / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode
    assert "DL3002" in done.stdout


def test_every_image_is_pinned_by_a_digest(compose):
    ours = compose["services"]["server"]["image"]
    others = {name: service["image"] for name, service in compose["services"].items() if service["image"] != ours}
    bases = [rest.partition("=")[2] for word, rest in instructions() if word == "ARG" and rest.startswith("BASE=")]
    examples = re.findall(r"BASE=(\S+)", (ROOT / "docker/.env.example").read_text() + DOCKERFILE.read_text())
    assert set(others) == {"postgres", "s3"}
    assert bases
    assert any("nvidia/cuda" in image for image in examples)
    assert [image for image in [*others.values(), *bases, *examples] if not DIGEST.search(image)] == []


def test_every_stage_stands_on_the_base_and_every_build_argument_is_used():
    stages = [rest for word, rest in instructions() if word == "FROM"]
    assert stages == ["${BASE} AS base", "base AS build", "base"]
    text = "\n".join(rest for _, rest in instructions())
    arguments = {rest.partition("=")[0] for word, rest in instructions() if word == "ARG"}
    assert arguments == {"BASE", "TORCH", "REVISION"}
    assert [name for name in arguments if f"${{{name}}}" not in text] == []


def test_nothing_runs_as_root_and_only_data_is_written():
    last = instructions()[[word for word, _ in instructions()].index("USER") :]
    assert last[0] == ("USER", "10001:10001")  # by number: Kubernetes' runAsNonRoot cannot know a name
    assert {word for word, _ in last} == {"USER", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    folders = {name: value for name, value in image_environment().items() if value.startswith("/") and name != "PATH"}
    assert all(value.startswith("/data/") for value in folders.values())
    assert {"PREFECT_HOME", "STACKRLHF_STORE", "STACKRLHF_CACHE", "HF_HOME"} <= set(folders)


def test_the_images_command_and_what_compose_runs_in_it_exist(compose):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    command = json.loads(next(rest for word, rest in instructions() if word == "CMD"))
    assert command[0] in scripts
    assert subprocess.run([BIN / command[0], *command[1:]], capture_output=True, timeout=120, check=False).returncode == 0
    for name in OURS:
        program, *rest = compose["services"][name]["command"]
        assert program in {"python", "prefect"}
        files = [word for word in rest if word.endswith(".py")]
        assert [file for file in files if not (ROOT / file).is_file() or not file.startswith("deployments/")] == []


def test_what_is_copied_into_the_image_is_there_and_not_ignored():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [word for name, rest in instructions() if name == "COPY" and "--from" not in rest for word in rest.split()[:-1]]
    assert copied
    for word in copied:
        assert (ROOT / word).exists(), word
        assert any(Path(word).match(pattern) for pattern in allowed), word
    assert {"flows", "tasks", "deployments"} <= set(copied)


def test_the_hash_locked_files_hold_the_versions_of_requirements_lock():
    lock = locked(ROOT / "requirements.lock")
    files = {name: locked(ROOT / "docker" / name) for name in FILES}
    for name in ["requirements.txt", "build.txt"]:
        assert {key: value for key, value in files[name].items() if lock.get(key) != value} == {}, (
            f"{name}: run python docker/lock.py"
        )
    assert files["torch-cpu.txt"] == {"torch": f"{lock['torch']}+cpu"}
    assert files["torch-cuda.txt"]["torch"] == lock["torch"]
    assert any(name.startswith("nvidia-") for name in files["torch-cuda.txt"])
    assert not set(files["requirements.txt"]) & set(files["torch-cuda.txt"])


def test_every_requirement_has_digests_and_names_no_place():
    for name in FILES:
        text = (ROOT / "docker" / name).read_text()
        entries = [line for line in re.sub(r"\\\n", " ", text).splitlines() if not line.startswith("#")]
        assert [line for line in entries if not re.search(r"==\S+ .*--hash=sha256:[0-9a-f]{64}", line)] == [], name
        assert "://" not in text, name


def test_the_image_has_every_package_that_the_code_depends_on_and_none_of_the_tests_tools():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    image = set(locked(ROOT / "docker/requirements.txt")) | {"torch"}
    extras = {name: wanted for name, wanted in project["optional-dependencies"].items() if name != "dev"}
    wanted = [Requirement(text) for text in [*project["dependencies"], *(text for extra in extras.values() for text in extra)]]
    missing = {item.name.lower() for item in wanted if not item.marker or item.marker.evaluate()} - image
    assert not missing, "run python docker/lock.py"
    assert not image & {"pytest", "moto", "ruff", "mypy", "kernels"}  # kernels: bitsandbytes would download compiled code


def test_nothing_starts_without_its_secrets():
    for name in SECRETS:
        with pytest.raises(ValueError, match=name):
            read_compose({key: value for key, value in FILLED.items() if key != name})
    example = (ROOT / "docker/.env.example").read_text()
    assert [name for name in SECRETS if not re.search(rf"^{name}=$", example, re.MULTILINE)] == []


def test_every_variable_of_the_installation_is_explained_in_the_example():
    used = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text())) | {"BASE", "TORCH"}
    stated = set(re.findall(r"^#? ?([A-Z0-9_]+)=", (ROOT / "docker/.env.example").read_text(), re.MULTILINE))
    assert used - stated == {"IMAGE"}
    assert stated - used == {"COMPOSE_PROFILES"}


def test_nothing_listens_beyond_loopback(compose):
    ports = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert {name: [port["host_ip"] for port in published] for name, published in ports.items()} == {
        "server": ["127.0.0.1"],
        "s3": ["127.0.0.1"],
    }
    assert set(compose["services"]["postgres"]["networks"]) == {"database"}
    assert compose["networks"]["database"]["internal"]


def test_what_serves_has_a_health_check_and_whoever_needs_it_waits_for_it(compose):
    services = compose["services"]
    lasting = {name for name, service in services.items() if service.get("restart") == "unless-stopped"}
    assert lasting == set(services) - {"migrate", "bucket", "deploy"}
    assert {name for name, service in services.items() if "healthcheck" in service} == lasting
    waits = {
        name: {other: how["condition"] for other, how in service.get("depends_on", {}).items()}
        for name, service in services.items()
    }
    for name, needed in waits.items():
        for other, condition in needed.items():
            assert condition == ("service_healthy" if other in lasting else "service_completed_successfully"), (name, other)
    assert set(waits["server"]) == {"migrate"}
    assert set(waits["cpu-worker"]) == set(waits["gpu-worker"]) == set(waits["gpu-stand-in"]) == {"deploy", "bucket"}


def test_the_gpu_worker_reserves_a_gpu_and_its_stand_in_does_the_same_jobs(compose):
    gpu, stand_in = (compose["services"][name] for name in ("gpu-worker", "gpu-stand-in"))
    assert gpu["profiles"] == ["gpu"]
    assert stand_in["profiles"] == ["no-gpu"]
    devices = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"capabilities": ["gpu"], "driver": "nvidia", "device_ids": ["0"]}]
    for command in (gpu["command"], stand_in["command"]):
        assert command[command.index("--pool") + 1] == "gpu"
        assert command[command.index("--limit") + 1] == "1"  # never two jobs on one GPU
    assert int(gpu["shm_size"]) >= 2**30


def test_containers_share_no_folder_but_the_gpu_workers(compose):
    mounted = {name: [volume["source"] for volume in service.get("volumes", [])] for name, service in compose["services"].items()}
    assert mounted["cpu-worker"] == ["cpu", "dumps"]
    assert mounted["gpu-worker"] == mounted["gpu-stand-in"] == ["gpu"]
    assert mounted["postgres"] == ["postgres"]
    assert set(compose["volumes"]) == {source for sources in mounted.values() for source in sources}


def test_the_software_bill_of_materials_lists_what_is_locked_with_its_digests(tmp_path):
    wanted = locked(ROOT / "docker/requirements.txt") | locked(ROOT / "docker/torch-cuda.txt")
    text = "".join((ROOT / "docker" / name).read_text() for name in ("requirements.txt", "torch-cuda.txt"))
    tool = shutil.which("cyclonedx-py")
    if tool is None:
        # not among the tests' packages: what it brings makes jsonschema, and so every Prefect process, start a second later
        pytest.skip("cyclonedx-py is not on PATH: install cyclonedx-bom in an environment of its own")
    command = [tool, "requirements", "-", "--output-reproducible", "--of", "JSON"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=True)
    parts = json.loads(done.stdout)["components"]
    assert {part["name"]: part["version"] for part in parts} == wanted
    assert all(part["externalReferences"][0]["hashes"] for part in parts)
