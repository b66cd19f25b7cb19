"""Write the image's hash-locked requirements anew from pyproject.toml and requirements.lock.  python docker/lock.py  (minutes)

    requirements.txt   what the image installs but torch: the package's dependencies with every extra but dev
    torch-cpu.txt      torch without CUDA
    torch-cuda.txt     torch as the package index has it, and the CUDA libraries it asks for
    build.txt          what builds this package

The versions are requirements.lock's; pip-compile adds the digest of every file of theirs. Of torch's CPU build it lists the files
that pip finds: with pip configured for an index that has that build, all of them. Digests that torch-cpu.txt already has of the
same version stay.
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ENTRY = re.compile(r"^(?P<name>[a-z0-9][a-z0-9._-]*)==(?P<version>[^\s\\;]+)[^\n]*(?:\n[ \t]+[^\n]*)*\n", re.MULTILINE)
HASH = re.compile(r"--hash=\S+")
CUDA = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
MADE = "# Made by `python docker/lock.py`; see there.\n"
COMPILE = [
    "--generate-hashes",
    "--strip-extras",
    "--allow-unsafe",
    "--no-emit-options",
    "--no-emit-index-url",
    "--no-emit-find-links",
    "--no-emit-trusted-host",
    "--no-header",
    "--no-annotate",
    "--quiet",
]


def entries(text: str) -> dict[str, str]:
    return {found["name"]: found[0] for found in ENTRY.finditer(text)}


def pin(entry: str) -> str:
    found = ENTRY.match(entry)
    assert found
    return found["version"]


def main() -> None:
    lock = ROOT / "requirements.lock"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        subprocess.run([folder / "venv/bin/python", "-m", "pip", "install", "-qq", "pip-tools==7.6.2"], check=True)

        def compiled(source: Path, *options: str, constraints: Path = lock, env: dict[str, str] | None = None) -> dict[str, str]:
            command = [
                folder / "venv/bin/pip-compile",
                *COMPILE,
                *options,
                "--constraint",
                constraints,
                "--output-file",
                "-",
                source,
            ]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env, cwd=folder)
            return entries(done.stdout)

        def lines(file: str, text: str) -> Path:
            (folder / file).write_text(text)
            return folder / file

        everything = compiled(ROOT / "pyproject.toml", *(f"--extra={extra}" for extra in sorted(extras) if extra != "dev"))
        common = {name: entry for name, entry in everything.items() if not CUDA.fullmatch(name)}
        (HERE / "requirements.txt").write_text(MADE + "".join(common.values()))

        version = pin(everything["torch"]).split("+")[0]
        kept = entries((HERE / "torch-cpu.txt").read_text())["torch"]
        hashes = set(HASH.findall(kept)) if pin(kept) == f"{version}+cpu" else set()
        if pin(everything["torch"]).endswith("+cpu"):
            hashes |= set(HASH.findall(everything["torch"]))
        if not hashes:
            sys.exit(f"pip finds no CPU build of torch {version}: configure pip for an index that has it, then run this again")
        comment = (HERE / "torch-cpu.txt").read_text().split("torch==")[0]
        (HERE / "torch-cpu.txt").write_text(comment + " \\\n    ".join([f"torch=={version}+cpu", *sorted(hashes)]) + "\n")

        # without pip's configuration: it may name a place that has the CPU build, which pip prefers
        plain = {name: value for name, value in os.environ.items() if name not in {"PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"}}
        others = lines(
            "others.txt", "".join(line + "\n" for line in lock.read_text().splitlines() if not line.startswith("torch=="))
        )
        wanted = lines("torch.in", f"torch=={version}\n")
        cuda = compiled(wanted, constraints=others, env=plain | {"PIP_CONFIG_FILE": os.devnull})
        (HERE / "torch-cuda.txt").write_text(MADE + "".join(entry for name, entry in cuda.items() if name not in common))

        (HERE / "build.txt").write_text(MADE + "".join(compiled(lines("build.in", "hatchling\n")).values()))


if __name__ == "__main__":
    main()
