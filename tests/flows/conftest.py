"""A Prefect of its own for the session: a fresh database, a server on loopback, nothing of the user's."""

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.orchestra import Server, Worker, deploy, wait


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory):
    from prefect.testing.utilities import prefect_test_harness

    import flows  # noqa: F401  sets what Prefect reads when it is imported

    with prefect_test_harness(server_startup_timeout=180):
        yield


@dataclass(frozen=True)
class Orchestra:
    """A server of its own on sqlite, everything deployed, and a worker for each of the two pools."""

    server: Server
    cpu: Worker
    gpu: Worker
    store: Path
    said: str
    """By the command that deployed."""


@pytest.fixture(scope="session")
def orchestra(tmp_path_factory):
    """What a user has after the documented commands; shared by the tests of the session, so ask for runs of your own seed."""
    home = tmp_path_factory.mktemp("orchestra")
    store = home / "store"
    with ExitStack() as stack:
        server = stack.enter_context(Server(home / "prefect"))
        said = deploy(server).stdout
        # the cpu worker has no limit: a pipeline waits on this pool for its own steps
        cpu = stack.enter_context(Worker(server, "cpu", str(store), name=f"cpu-{os.getpid()}"))
        gpu = stack.enter_context(Worker(server, "gpu", str(store), name=f"gpu-{os.getpid()}", limit=1))
        yield Orchestra(server, cpu, gpu, store, said)


@pytest.fixture(scope="session")
def first(orchestra) -> SimpleNamespace:
    """A whole small run on the pools, undisturbed; for every file that compares with one."""
    from tests.flows.test_pool import start

    run_id = start(orchestra, orchestra.store)
    return SimpleNamespace(run=wait(orchestra.server, run_id, 400), id=run_id, store=orchestra.store)
