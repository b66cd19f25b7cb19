"""What running on work pools costs: a real server, a worker for each pool, preset ci. Prints one JSON object.

    python benchmarks/orchestration.py [--runs 3] [--query 1] [--supervised]

`cached_seconds`: from `prefect deployment run` of a pipeline whose steps are all stored to Completed, by its own times;
`command_seconds`: what the prefect command itself takes before that. `overhead_seconds` by step: the parent's task run, start to
end, less what the step's own work took (the manifest's seconds). Goals: a cached run under 10 s, a job under 6 s.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.orchestra import Server, Worker, deploy, submit, wait

COMPUTE = {"executor": "pool", "threads": 1, "workers": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="cached runs; the median counts")
    parser.add_argument("--query", default="1", help="PREFECT_WORKER_QUERY_SECONDS of the workers")
    parser.add_argument("--supervised", action="store_true", help="without our pools' command: Prefect starts a supervisor first")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        home = Path(folder)
        server = stack.enter_context(Server(home / "prefect"))
        deploy(server)
        if arguments.supervised:
            without_command(server)
        for pool in ("cpu", "gpu"):
            env = {"PREFECT_WORKER_QUERY_SECONDS": arguments.query}
            stack.enter_context(Worker(server, pool, str(home / "store"), name=pool, env=env))
        first, _ = run(server, home / "store")
        cached = [run(server, home / "store") for _ in range(arguments.runs)]
        found = {
            "cached_seconds": round(statistics.median(one.end_time.timestamp() - one.created.timestamp() for one, _ in cached), 2),
            "command_seconds": round(statistics.median(seconds for _, seconds in cached), 2),
            "overhead_seconds": overheads(server, first.id, home / "store"),
            "load": [round(one, 1) for one in os.getloadavg()],
            "whole_run_seconds": round((first.end_time - first.created).total_seconds(), 1),
        }
    print(json.dumps(found))


def without_command(server: Server) -> None:
    from prefect.client.schemas.actions import WorkPoolUpdate

    with server.client() as client:
        for name in ("cpu", "gpu"):
            template = client.read_work_pool(name).base_job_template
            template["variables"]["properties"]["command"]["default"] = None
            client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))


def run(server: Server, store: Path) -> tuple[Any, float]:
    """A flow run of rlhf/ci, Completed, and the seconds that the command took which submitted it."""
    started = time.monotonic()
    run_id = submit(server, "rlhf/ci", compute=COMPUTE, store=str(store))
    seconds = time.monotonic() - started
    ended = wait(server, run_id, 600)
    assert ended.state.is_completed(), ended.state
    return ended, seconds


def overheads(server: Server, run_id: Any, store: Path) -> dict[str, float]:
    from prefect.client.schemas.filters import FlowRunFilter

    from tasks.artifacts import Store

    own = {manifest.step: manifest.seconds for manifest in Store(store).list()}
    time.sleep(2)  # states of task runs arrive by events
    with server.client() as client:
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [run_id]}}))
    return {t.name: round(t.total_run_time.total_seconds() - own[t.name], 2) for t in tasks if t.name in own}


if __name__ == "__main__":
    main()
