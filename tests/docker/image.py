"""What `docker build` would do with docker/Dockerfile, as far as a machine without an engine can: the steps of its stage `build`,
read from the file itself, with /opt and /build moved into a folder.  python -m tests.docker.image FOLDER [cpu|cuda] [PYTHON]
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.docker.services import instructions
from tests.orchestra import ROOT


def ignored() -> list[str]:
    """What .dockerignore lets through, as patterns below the root."""
    lines = [line.strip() for line in (ROOT / ".dockerignore").read_text().splitlines()]
    return [line[1:] for line in lines if line.startswith("!")]


def build(folder: Path, torch: str = "cpu", python: str = "python3") -> tuple[Path, Path]:
    """What the image has at /opt/stackrlhf/bin and at /app, in `folder`."""
    here, arguments, stage = folder, {}, ""
    context = folder / "context"
    context.mkdir(parents=True)
    for pattern in ignored():
        for source in ROOT.glob(pattern):
            target = context / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__")) if source.is_dir() else shutil.copy(
                source, target
            )
    for word, rest in instructions():
        if word == "FROM":
            stage = rest.partition(" AS ")[2]
        if stage == "base" or "--from=" in rest:
            continue
        if word == "ARG":
            name, _, default = rest.partition("=")
            arguments[name] = torch if name == "TORCH" else default
        elif word == "WORKDIR":
            here = folder / rest.strip("/")
            here.mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                there = here / target / Path(source).name if target.endswith("/") else here / target
                (shutil.copytree if (context / source).is_dir() else shutil.copy)(context / source, there)
        elif word == "RUN" and stage == "build":
            script = (
                re.sub(r"--mount=\S+\s*", "", rest)
                .replace("/opt/", f"{folder}/opt/")
                .replace("python3 -m venv", f"{python} -m venv")
            )
            env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))} | arguments
            subprocess.run(["/bin/bash", "-euo", "pipefail", "-c", script], cwd=here, env=env, stdin=subprocess.DEVNULL, check=True)
    return folder / "opt/stackrlhf/bin", folder / "app"


if __name__ == "__main__":
    print(*build(Path(sys.argv[1]).absolute(), *sys.argv[2:]))
