"""An environment for each version of a peer, made once in the user's cache: our packages, and the peer over them."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

VERSIONS = {"trl": "1.16.0", "trl_ppo": "1.12.0"}  # 1.12.0 is the last release of TRL with a PPO trainer
SILENCE = {
    "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1", "TRANSFORMERS_VERBOSITY": "error",
}  # fmt: skip


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stackrlhf" / "benchmarks"


def python_of(peer: str) -> Path:
    """The interpreter with TRL in it; the environment is made where it is not there yet (pip, no dependencies: 1 MB)."""
    version = VERSIONS[peer]
    folder = cache() / f"trl-{version}"
    python = folder / "bin" / "python"
    ours = sysconfig.get_paths()["purelib"]
    made = folder / "made-for"
    if made.is_file() and made.read_text() == ours:
        return python
    print(f"making {folder} (once)", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    where = [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    library = subprocess.run(where, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()
    # behind its own folder on sys.path, so what is installed here wins
    (Path(library) / "shared.pth").write_text(ours + "\n")
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", f"trl=={version}"]
    subprocess.run(install, check=True, stdout=sys.stderr)
    made.write_text(ours)
    return python
