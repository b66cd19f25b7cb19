"""All tests, in two halves side by side: one half computes, the other waits for servers and their jobs.  python .ci/tests.py

Started from Python: what a script starts with `&` is deaf to Ctrl-C, and some tests press it.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FLOWS = ["dashboard", "install", "pool", "pool_kills", "pool_parent", "retrain", "rlhf", "schedule", "screenshots"]
SERVERS = [*(f"tests/flows/test_{name}.py" for name in FLOWS), "tests/test_operations.py", "tests/test_services.py"]
HALVES = {
    "without servers": [f"--ignore={path}" for path in SERVERS],
    "with servers": SERVERS,
}

failed = False
started = time.monotonic()
with tempfile.TemporaryDirectory() as folder:
    running = {}
    for name, arguments in HALVES.items():
        log = Path(folder) / f"{name}.log"
        command = [sys.executable, "-m", "pytest", "--durations=15", f"--basetemp={folder}/{name.replace(' ', '-')}", *arguments]
        env = os.environ | {"PREFECT_HOME": f"{folder}/prefect-{name.replace(' ', '-')}"}
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env)
        running[name] = log, process
    while running:
        for name, (log, process) in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            print(f"\n--> tests {name}: exit {process.returncode} after {time.monotonic() - started:.0f} s", flush=True)
            sys.stdout.write(log.read_text(errors="replace"))
            sys.stdout.flush()
            failed |= process.returncode != 0
        time.sleep(0.5)
sys.exit(failed)
