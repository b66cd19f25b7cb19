"""The base job template of a work pool: pools/<type>.yaml, with what the pool has of its own and what install.py was given."""

import argparse
import copy
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

POOLS = Path(__file__).resolve().parent / "pools"
ENGINE = "-m prefect.engine"
SECRETS = ("SECRET", "TOKEN", "PASSWORD", "ACCESS_KEY", "API_KEY", "AUTH")


def rendered(kind: str, pool: str, arguments: argparse.Namespace, present: dict[str, Any] | None = None) -> dict[str, Any]:
    """The base job template of a pool: pools/<kind>.yaml with what this pool has of its own and what was given, now or earlier."""
    file = yaml.safe_load((POOLS / f"{kind}.yaml").read_text())
    template = {name: copy.deepcopy(file[name]) for name in ("job_configuration", "variables")}
    template = merged(template, file["pools"][pool])
    variables = template["variables"]["properties"]
    earlier = {name: known.get("default") for name, known in ((present or {}).get("variables", {}).get("properties", {})).items()}
    env = (earlier.get("env") or {}) | variables["env"]["default"] | environment(arguments)
    variables["env"]["default"] = {name: value for name, value in env.items() if value}
    if kind == "process":
        now = f"{shlex.quote(arguments.python)} {ENGINE}" if arguments.python else earlier.get("command")
        variables["command"]["default"] = now or f"{shlex.quote(sys.executable)} {ENGINE}"
    else:
        image = arguments.image or earlier.get("image")
        if not image:
            raise ValueError(
                f"--type {kind} needs --image: the one that docker/Dockerfile makes, such as registry/stackrlhf@sha256:..."
            )
        variables["image"]["default"] = image
        volume, claim = arguments.volume, {"name": "data", "persistentVolumeClaim": {"claimName": arguments.volume}}
        now = (f"{volume}:/data" if kind == "docker" else claim) if volume else None
        variables["data_volume"]["default"] = now or earlier.get("data_volume") or variables["data_volume"]["default"]
    if kind != "process" and arguments.python:
        raise ValueError("--python is for --type process: a container has the Python of its image")
    if kind == "process" and (arguments.image or arguments.volume):
        raise ValueError("--image and --volume are for --type docker and kubernetes: a process job has what its worker has")
    store = variables["env"]["default"].get("STACKRLHF_STORE", "")
    if kind == "kubernetes" and "emptyDir" in variables["data_volume"]["default"] and not store.startswith("s3://"):
        raise ValueError("a pod's folders go when it ends: give --store s3://bucket/prefix, or --volume CLAIM for a store in /data")
    return template


def environment(arguments: argparse.Namespace) -> dict[str, str]:
    given = {"STACKRLHF_STORE": arguments.store} if arguments.store else {}
    for entry in arguments.env:
        name, equals, value = entry.partition("=")
        if not equals or not name:
            raise ValueError(f"--env {entry}: write it as NAME=VALUE")
        if any(word in name.upper() for word in SECRETS):
            raise ValueError(
                f"--env {name}: whoever may look at the pool would read it. Credentials belong into the worker's environment "
                "(process), an AWS credentials file (docker: credentials_volume) or a Secret (kubernetes: env_secret); see "
                "deployments/README.md"
            )
        given[name] = value
    return given


def merged(ours: Any, more: Any) -> Any:
    """`more` laid over `ours`; lists of one length element by element."""
    if isinstance(ours, dict) and isinstance(more, dict):
        return ours | {name: merged(ours[name], value) if name in ours else value for name, value in more.items()}
    if isinstance(ours, list) and isinstance(more, list) and len(ours) == len(more):
        return [merged(one, other) for one, other in zip(ours, more)]
    return more
