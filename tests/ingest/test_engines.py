"""The engines of ingest: on each the same results, taken in bit by bit, and a killed worker costs another try, not the run."""

import contextlib
import functools
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.compute import Compute
from tasks.ingest import engines, ingest, partitions, scan
from tasks.ingest.config import IngestConfig
from tasks.ingest.engines import AHEAD, POOL_BYTES, TRIES, Engine, engine
from tasks.progress import Progress, Update, listening

LARGE = POOL_BYTES + 1
"""Bytes of tables for which processes are worth while."""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wait_and_tell(seconds: float) -> int:
    Progress("ingest")(1, 2, phase="wait")
    time.sleep(seconds)
    return os.getpid()


def fail(number: int) -> int:
    if number == 3:
        raise ValueError(f"number {number} is wrong")
    return number


def die(path: Path | None, tries: int, number: int) -> int:
    """Its process is killed, as the system does for want of memory, `tries` times: each leaves a byte in the file."""
    if path is not None and number == 3:
        with path.open("ab") as file:
            file.write(b".")
        if path.stat().st_size <= tries:
            os.kill(os.getpid(), signal.SIGKILL)
    return number


EVERY = ["here", "processes", "dask", "ray"]
SEVERAL = EVERY[1:]


@pytest.fixture(scope="module")
def runner(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine by name; the clusters are real ones, on this machine."""
    compute = Compute(workers=1) if request.param == "here" else Compute(engine=request.param, workers=2)
    with engine(compute, LARGE) as made:
        yield made


on_every_engine = pytest.mark.parametrize("runner", EVERY, indirect=True)
with_several_workers = pytest.mark.parametrize("runner", SEVERAL, indirect=True)


@on_every_engine
def test_results_are_those_of_a_plain_loop_whatever_runs_them(runner):
    texts = [bytes([n]) * n for n in range(60)]
    results = dict(runner.run(sha256, texts))
    assert results == {n: hashlib.sha256(text).hexdigest() for n, text in enumerate(texts)}
    assert list(runner.run(sha256, [])) == []


@on_every_engine
def test_large_arguments_arrive_whole(runner):
    texts = [os.urandom(5_000_000) for _ in range(3)]
    assert dict(runner.run(sha256, texts)) == {n: hashlib.sha256(text).hexdigest() for n, text in enumerate(texts)}


@on_every_engine
def test_arguments_are_taken_as_they_are_used_up(runner):
    taken, most = 0, 0

    def arguments() -> Iterator[bytes]:
        nonlocal taken
        for n in range(50):
            taken += 1
            yield bytes([n])

    for answered, _ in enumerate(runner.run(sha256, arguments()), start=1):
        most = max(most, taken - answered + 1)
    assert taken == 50
    assert most <= runner.workers + AHEAD


@with_several_workers
def test_results_come_in_order_of_completion_and_from_other_processes(runner):
    seconds = [1.0, 0.01, 0.01]
    results = list(runner.run(wait_and_tell, seconds))
    assert [number for number, _ in results][-1] == 0
    assert os.getpid() not in {pid for _, pid in results}


@on_every_engine
def test_progress_made_in_a_worker_is_heard_here(runner):
    heard: list[Update] = []
    with listening(heard.append):
        list(runner.run(wait_and_tell, [0.0, 0.0]))
    assert heard == [Update("ingest", "wait", 1, 2)] * 2


@on_every_engine
def test_what_a_call_raises_is_raised_here_and_the_engine_lives_on(runner):
    with pytest.raises(ValueError, match="number 3 is wrong") as raised:
        list(runner.run(fail, range(1000)))
    assert str(raised.value) == "number 3 is wrong"
    assert dict(runner.run(fail, range(3))) == {0: 0, 1: 1, 2: 2}


@on_every_engine
def test_whoever_has_seen_enough_may_stop(runner):
    with contextlib.closing(runner.run(sha256, (b"" for _ in range(1000)))) as results:
        next(results)
    assert dict(runner.run(fail, range(3))) == {0: 0, 1: 1, 2: 2}


@with_several_workers
def test_a_task_whose_worker_is_killed_runs_again(runner, tmp_path):
    heard: list[Update] = []
    with listening(heard.append):
        results = dict(runner.run(functools.partial(die, tmp_path / "deaths", TRIES - 1), range(8)))
    assert results == {n: n for n in range(8)}
    assert (tmp_path / "deaths").read_bytes() == b"." * TRIES
    assert len([update.note for update in heard if "a worker was lost" in update.note and "die" in update.note]) == TRIES - 1


@with_several_workers
def test_a_task_that_kills_every_worker_is_named_with_the_likely_cause(runner, tmp_path):
    with pytest.raises(
        RuntimeError, match=rf"gave up .*die.*\(3\), at which {TRIES} workers were lost .*killed.* compute.workers$"
    ):
        list(runner.run(functools.partial(die, tmp_path / "deaths", 99), range(8)))
    assert (tmp_path / "deaths").read_bytes() == b"." * TRIES
    assert dict(runner.run(fail, range(3))) == {0: 0, 1: 1, 2: 2}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_do_not_outlive_whoever_started_them(number):
    script = (
        "import signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job is born deaf to it
        "from tasks.compute import Compute\n"
        "from tasks.ingest.engines import engine\n"
        f"with engine(Compute(workers=2), {LARGE}) as made:\n"
        "    for _ in made.run(time.sleep, [0, 0, 99, 99]): print('working', flush=True)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert parent.stdout is not None
    assert [parent.stdout.readline() for _ in range(2)] == [b"working\n"] * 2
    workers = psutil.Process(parent.pid).children(recursive=True)
    assert len(workers) == 2
    parent.send_signal(number)
    parent.wait(10)
    _, alive = psutil.wait_procs(workers, timeout=3)
    assert not alive


def test_small_tables_and_one_worker_are_worked_on_in_this_process():
    for workers, size in ((2, POOL_BYTES), (1, LARGE)):
        with engine(Compute(workers=workers), size) as made:
            assert made.workers == 1
            assert [result for _, result in made.run(wait_and_tell, [0.0])] == [os.getpid()]


@pytest.mark.parametrize(("name", "package"), [("dask", "distributed"), ("ray", "ray")])
def test_a_package_that_is_not_here_is_asked_for(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)  # as Python has it for a module that cannot be imported
    with (
        pytest.raises(ValueError, match=rf"compute.engine={name} .*pip install 'stackrlhf\[{name}\]'"),
        engine(Compute(engine=name), 1),
    ):
        pass


@pytest.mark.parametrize(("name", "scheme"), [("dask", "tcp://"), ("ray", "ray://"), ("ray", "")])
def test_an_address_where_nothing_answers_is_told(name, scheme):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    address = f"{scheme}127.0.0.1:{port}"
    with (
        pytest.raises(ValueError, match=rf"compute.engine_address={address}: no .* answers there"),
        engine(Compute(engine=name, engine_address=address), 1),
    ):
        pass


def test_a_dask_cluster_that_is_there_is_used_and_left_running():
    from distributed import LocalCluster

    with LocalCluster(n_workers=0, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster:
        compute = Compute(engine="dask", engine_address=cluster.scheduler_address)
        with pytest.raises(ValueError, match="has no workers"), engine(compute, 1):
            pass
        cluster.scale(2)
        cluster.wait_for_workers(2)
        for _ in range(2):
            with engine(compute, 1) as made:
                assert made.workers == 2
                assert dict(made.run(sha256, [b"oil"])) == {0: hashlib.sha256(b"oil").hexdigest()}


@pytest.mark.parametrize("runner", ["dask", "ray"], indirect=True)
def test_a_cluster_of_this_machine_cannot_be_reached_from_another(runner):
    assert dict(runner.run(fail, range(3))) == {0: 0, 1: 1, 2: 2}
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    sockets = [socket for process in family for socket in process.net_connections("inet") if socket.status == "LISTEN"]
    assert sockets
    assert {socket.laddr.ip for socket in sockets} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


@pytest.mark.parametrize("runner", ["ray"], indirect=True)
def test_a_ray_cluster_that_is_there_is_used_and_left_running(runner):
    import ray

    script = (
        "from tasks.compute import Compute\n"
        "from tasks.ingest.engines import engine\n"
        f"with engine(Compute(engine='ray', engine_address={ray.get_runtime_context().gcs_address!r}), 1) as made:\n"
        "    print(made.workers, sorted(made.run(abs, [42, -99])))\n"
    )
    other = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **engines.local_ray()},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (other.returncode, other.stdout) == (0, "2 [(0, 42), (1, 99)]\n"), other.stderr
    assert dict(runner.run(fail, range(3))) == {0: 0, 1: 1, 2: 2}


def die_late(stage: str, path: Path, argument: Any) -> Any:
    """What the stage makes of it; but whoever is first done with number 1 is killed before it can tell."""
    result = {"scan": scan.scan, "process": partitions.process}[stage](argument)
    if argument.number == 1:
        with contextlib.suppress(FileExistsError):
            path.touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
    return result


@with_several_workers
def test_the_records_are_the_same_byte_for_byte_on_every_engine_with_workers_killed_in_both_stages(
    runner, site, tmp_path, monkeypatch, request
):
    def digests(compute: Compute) -> dict[str, str]:
        out = tmp_path / f"out-{compute.engine}-{compute.workers}"
        out.mkdir()
        config = IngestConfig(dump=(str(dump),), max_quarantine=1.0)
        ingest.ingest(config, out=out, compute=compute, progress=Progress("ingest"))
        return {str(path.relative_to(out)): sha256(path.read_bytes()) for path in sorted(out.glob("**/*.parquet"))}

    dump = site.write([*site.plain(400), "<row Id='1' />"])
    monkeypatch.setattr(ingest, "BLOCK_BYTES", (20_000, 20_000, 1_500))
    monkeypatch.setattr(ingest, "PARTITION_BYTES", (20_000, 20_000, 2_000))
    expected = digests(Compute(workers=1))
    assert len(expected) > 4

    monkeypatch.setattr(engines, "POOL_BYTES", 0)
    monkeypatch.setattr(scan, "scan", functools.partial(die_late, "scan", tmp_path / "killed-in-scan"))
    monkeypatch.setattr(ingest, "process", functools.partial(die_late, "process", tmp_path / "killed-in-process"))
    heard: list[Update] = []
    with listening(heard.append):
        assert digests(Compute(engine=request.node.callspec.params["runner"], workers=2)) == expected
    assert len([update for update in heard if "a worker was lost" in update.note]) >= 2
    assert (tmp_path / "killed-in-scan").exists()
    assert (tmp_path / "killed-in-process").exists()
