"""All tests, in three parts side by side: one computes, the others mostly wait for servers and their jobs.  python .ci/tests.py

Started from Python: what a script starts with `&` is deaf to Ctrl-C, and some tests press it.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

POOLS = [f"tests/flows/test_{name}.py" for name in ("pool", "pool_kills", "pool_parent", "install", "rlhf", "dashboard")]
SERVICES = [f"tests/flows/test_{name}.py" for name in ("schedule", "retrain", "screenshots")]
SERVICES += ["tests/test_operations.py", "tests/test_services.py"]
PARTS = {
    "pools": POOLS,
    "services": SERVICES,
    "the rest": [f"--ignore={path}" for path in (*POOLS, *SERVICES)],
}


def command(folder: str, name: str, *arguments: str) -> list[str]:
    part = name.replace(" ", "-")
    places = ["-o", f"cache_dir={folder}/cache-{part}", f"--basetemp={folder}/{part}"]
    return [sys.executable, "-m", "pytest", "--durations=15", *places, *arguments]


def environment(folder: str, name: str) -> dict[str, str]:
    return {**os.environ, "PREFECT_HOME": f"{folder}/prefect-{name.replace(' ', '-')}"}


started = time.monotonic()
ended: dict[str, int] = {}
with tempfile.TemporaryDirectory() as folder:
    running = {}
    for name, arguments in PARTS.items():
        log = Path(folder) / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command(folder, name, *arguments),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(folder, name),
            )
        running[name] = log, process
    while running:
        for name, (log, process) in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            ended[name] = process.returncode
            print(f"\n--> tests, {name}: exit {process.returncode} after {time.monotonic() - started:.0f} s", flush=True)
            sys.stdout.write(log.read_text(errors="replace"))
            sys.stdout.flush()
        time.sleep(0.5)
    # Servers, jobs and deadlines on two cores: what failed beside the others gets one more try by itself, and both are printed.
    for name, code in ended.items():
        if code == 1:
            print(f"\n--> tests, {name}: what failed once more, alone", flush=True)
            again = command(folder, name, "--last-failed", "--last-failed-no-failures=none", *PARTS[name])
            ended[name] = subprocess.run(again, stdin=subprocess.DEVNULL, env=environment(folder, name), check=False).returncode
sys.exit(any(ended.values()))
