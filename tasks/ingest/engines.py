"""What runs the blocks and partitions of ingest: this process, processes of this machine, a Dask cluster or a Ray cluster.

The records are the same whichever it is. Workers exchange files by path, so with a cluster of several machines the dumps, the
scratch folder and the store must lie on storage that all of them share, under the same paths, and all need this package at this
version.
"""

import contextlib
import importlib.util
import os
import pickle
import queue
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from tasks.compute import Compute, cores
from tasks.processes import Pool, WorkerKilled, answer, in_words
from tasks.progress import Progress, Update, hear, listening

POOL_BYTES = 32_000_000  # of tables; below, starting processes costs more than they bring
WORKER_MB = 350
"""Memory of a worker."""
AHEAD = 2
"""Arguments taken beyond one for each worker, so that none waits while the next is read."""
TRIES = 3
"""Of a task, where workers are killed."""
TIMEOUT = 10
"""Seconds until a cluster must have answered."""
MODULES = ("tasks.ingest.scan", "tasks.ingest.partitions")
"""What workers import while the parent still plans."""


class Engine(ABC):
    """Runs independent tasks of ingest; made by `engine`."""

    workers: int

    @abstractmethod
    def run(self, function: Callable[[Any], Any], arguments: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """(number, function(argument)) for every argument, counted from 0, in order of completion.

        `function` is a module's own; arguments and results can be pickled. `arguments` is read as it is used up: at most
        workers + AHEAD of it are taken and not yet answered for. What a call raises is raised here, and the others are given up,
        as they are when the iterator is closed. A task whose worker is killed runs again, TRIES times in all, with a note;
        RuntimeError after that. One run at a time.
        """


@contextmanager
def engine(compute: Compute, size: int) -> Iterator[Engine]:
    """The engine that `compute` names, for tables of `size` bytes; its workers start at once, and end with the `with`.

    Where processes are asked for, but the tables are small or one worker is to do it all, everything runs in this process.
    ValueError where a cluster is asked for and its package is missing, or nothing answers at its address.
    """
    workers = compute.workers or cores()
    if compute.engine == "dask":
        with _dask(compute, workers) as made:
            yield made
    elif compute.engine == "ray":
        with _ray(compute, workers) as made:
            yield made
    elif workers == 1 or size <= POOL_BYTES:
        yield _Here()
    else:
        # One core for each worker: threads of its own would only take the others' time.
        with Pool(workers, preload=MODULES, environment={"OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}) as pool:
            yield _Processes(pool)


class _Here(Engine):
    workers = 1

    def run(self, function: Callable[[Any], Any], arguments: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        with _memory_as_in_workers():
            for number, argument in enumerate(arguments):
                yield number, function(argument)


@contextmanager
def _memory_as_in_workers() -> Iterator[None]:
    """Arrow's own allocator keeps a quarter more memory than the system's for what we do, and is slower by a few percent."""
    import pyarrow as pa

    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)


class _Processes(Engine):
    def __init__(self, pool: Pool) -> None:
        self.workers, self._pool = pool.workers, pool

    def run(self, function: Callable[[Any], Any], arguments: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        each = ((argument,) for argument in arguments)
        results = self._pool.run(function, each, ahead=AHEAD, tries=TRIES, note=Progress("ingest").note)
        with contextlib.closing(results):
            try:
                yield from results
            except WorkerKilled as error:
                raise _given_up(error.task, error.how, self.workers) from error


class _Lost(Exception):
    """A task ended without an answer; says how. `final`: the cluster has tried it again itself."""

    def __init__(self, how: str, final: bool = False) -> None:
        super().__init__(how)
        self.final = final


class _Cluster(Engine):
    """What Dask and Ray have in common: handles of tasks, answered in any order. The retries are ours, so that they are told."""

    def run(self, function: Callable[[Any], Any], arguments: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        source, more = enumerate(arguments), True
        running: dict[Any, tuple[int, str, bytes, int]] = {}  # number, in words, what was sent, tries so far
        try:
            while True:
                while more and len(running) < self.workers + AHEAD:
                    if (one := next(source, None)) is None:
                        more = False
                        break
                    number, argument = one
                    question = pickle.dumps((function, (argument,)), pickle.HIGHEST_PROTOCOL)
                    running[self._submit(question)] = number, in_words(function, (argument,)), question, 1
                if not running:
                    return
                handle = self._completed(running)
                number, words, question, tries = running.pop(handle)
                try:
                    reply, updates = self._reply(handle)
                except _Lost as lost:
                    if lost.final or tries == TRIES:
                        raise _given_up(words, str(lost), self.workers) from lost
                    Progress("ingest").note(f"a worker was lost ({lost}), its task goes to another: {words}")
                    running[self._submit(question)] = number, words, question, tries + 1
                    continue
                for update in updates:
                    hear(update)
                kind, value = pickle.loads(reply)
                if kind == "raised":
                    raise value
                yield number, value
        finally:
            self._cancel(running)

    @abstractmethod
    def _submit(self, question: bytes) -> Any: ...

    @abstractmethod
    def _completed(self, running: Iterable[Any]) -> Any:
        """One that is done; waits for it."""

    @abstractmethod
    def _reply(self, handle: Any) -> tuple[bytes, list[Update]]:
        """_Lost where there is none."""

    @abstractmethod
    def _cancel(self, running: Iterable[Any]) -> None: ...


class _Dask(_Cluster):
    def __init__(self, client: Any, workers: int) -> None:
        self.workers, self._client = workers, client
        self._done: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def _submit(self, question: bytes) -> Any:
        # Not scattered before: that is no faster (0.2 s for 16 MB either way), and scattered data is lost with its worker.
        future = self._client.submit(_answer, question, pure=False)
        future.add_done_callback(self._done.put)
        return future

    def _completed(self, running: Iterable[Any]) -> Any:
        while (future := self._done.get()) not in running:
            pass  # given up in an earlier run
        return future

    def _reply(self, handle: Any) -> tuple[bytes, list[Update]]:
        from concurrent.futures import CancelledError

        from distributed import KilledWorker

        try:
            return handle.result()
        except KilledWorker as error:
            raise _Lost("killed, often for want of memory", final=error.allowed_failures >= TRIES - 1) from None
        except CancelledError as error:
            raise _Lost(f"Dask lost it: {error}") from None

    def _cancel(self, running: Iterable[Any]) -> None:
        self._client.cancel(list(running))


@contextmanager
def _dask(compute: Compute, workers: int) -> Iterator[Engine]:
    _need("dask", "distributed")
    import dask
    from distributed import Client, LocalCluster

    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set({"distributed.admin.large-graph-warning-threshold": "1GB"}))
        if compute.engine_address is None:
            # Each loss is told here, and counted; and a worker holds one task, so that its end is blamed on that alone.
            scheduler = {"distributed.scheduler.allowed-failures": 0, "distributed.scheduler.worker-saturation": 1.0}
            stack.enter_context(dask.config.set(scheduler))
            loopback: Any = dict.fromkeys(("dashboard_address", "worker_dashboard_address"), "127.0.0.1:0")
            cluster = stack.enter_context(
                LocalCluster(n_workers=workers, threads_per_worker=1, processes=True, silence_logs="CRITICAL", **loopback)
            )
            client = stack.enter_context(Client(cluster, set_as_default=False))
        else:
            address = compute.engine_address
            _knock(compute, "Dask scheduler", "tcp://10.0.0.1:8786")
            try:
                client = stack.enter_context(Client(address, timeout=TIMEOUT, set_as_default=False))
            except (OSError, ValueError) as error:
                raise ValueError(_no_answer(compute, "Dask scheduler", "tcp://10.0.0.1:8786", error)) from error
            if not (threads := sum(client.nthreads().values())):
                raise ValueError(
                    f"compute.engine_address={address}: this Dask cluster has no workers: start some with `dask worker`"
                )
            workers = min(threads, compute.workers or threads)
        yield _Dask(client, workers)


class _Ray(_Cluster):
    def __init__(self, workers: int) -> None:
        import ray

        self.workers, self._ray = workers, ray
        self._answer = ray.remote(num_cpus=1, max_retries=0)(_answer)

    def _submit(self, question: bytes) -> Any:
        # A large one travels once, through the object store, as Ray does with arguments above 100 kB by itself.
        return self._answer.remote(question)

    def _completed(self, running: Iterable[Any]) -> Any:
        done, _ = self._ray.wait(list(running), num_returns=1)
        return done[0]

    def _reply(self, handle: Any) -> tuple[bytes, list[Update]]:
        from ray import exceptions

        try:
            return self._ray.get(handle)
        except (exceptions.WorkerCrashedError, exceptions.OutOfMemoryError):
            raise _Lost("killed, often for want of memory") from None
        except (exceptions.NodeDiedError, exceptions.ObjectLostError) as error:
            raise _Lost(str(error).splitlines()[0]) from None

    def _cancel(self, running: Iterable[Any]) -> None:
        for handle in running:
            self._ray.cancel(handle, force=True)


@contextmanager
def _ray(compute: Compute, workers: int) -> Iterator[Engine]:
    _need("ray", "ray")
    environment = {"RAY_USAGE_STATS_ENABLED": "0", **(local_ray() if compute.engine_address is None else {})}
    with _environment(environment):
        import ray

    if compute.engine_address is not None:
        _knock(compute, "Ray cluster", "ray://10.0.0.1:10001")
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():  # it is where this process itself is a job of Ray's
            options: dict[str, Any] = {"log_to_driver": False}
            if compute.engine_address is None:
                # Sockets in it have names of some 70 characters, and 107 is the most that Linux takes.
                folder = tempfile.mkdtemp(prefix="ray-", dir=None if len(tempfile.gettempdir()) < 25 else "/tmp")
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                options |= {"address": "local", "num_cpus": workers, "include_dashboard": False, "_temp_dir": folder}
                options |= {"object_store_memory": 512_000_000}
            else:
                options["address"] = compute.engine_address
            if not (compute.engine_address or "").startswith("ray://"):  # such a server is given all options, and fails at this
                options["logging_level"] = "ERROR"
            try:
                with _environment(environment), _handler_of_sigterm_kept():
                    ray.init(**options)
            except (OSError, ImportError, RuntimeError, ValueError) as error:
                if compute.engine_address is None:
                    raise
                raise ValueError(_no_answer(compute, "Ray cluster", "ray://10.0.0.1:10001", error)) from error
            stack.callback(ray.shutdown)
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        yield _Ray(min(cpus, compute.workers or cpus))


@cache
def local_ray() -> dict[str, str]:
    """Environment of a Ray cluster on this machine for this process, and of others that are to join it."""
    return {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # whatever the name says: its servers listen on loopback only
        "RAY_AUTH_MODE": "token",  # as by default, only that the token would be left in the user's home
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }


def _answer(question: bytes) -> tuple[bytes, list[Update]]:
    """Runs in a worker of a cluster: what is to be sent back, with the progress that was made."""
    updates: list[Update] = []
    with listening(updates.append):
        return answer(question), updates


def _given_up(task: str, how: str, workers: int) -> RuntimeError:
    return RuntimeError(
        f"ingest gave up {task}, at which {TRIES} workers were lost (the last: {how}): most likely there is not memory enough, as "
        f"{workers} workers need some {workers * WORKER_MB} MB; set fewer in compute.workers"
    )


def _need(extra: str, module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"compute.engine={extra} needs a package that is not here: pip install 'stackrlhf[{extra}]'")


def _no_answer(compute: Compute, what: str, example: str, error: object) -> str:
    detail = " ".join(str(error).split())[:200]
    return (
        f"compute.engine_address={compute.engine_address}: no {what} answers there ({detail}): start one, give an address such as "
        f"{example}, or leave it out to start one on this machine"
    )


def _knock(compute: Compute, what: str, example: str) -> None:
    """ValueError where nothing listens; Ray would try for half a minute."""
    address = compute.engine_address or ""
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.hostname and parts.port:
        try:
            socket.create_connection((parts.hostname, parts.port), TIMEOUT).close()
        except OSError as error:
            raise ValueError(_no_answer(compute, what, example, error)) from error


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """For processes that are started within the `with`."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _handler_of_sigterm_kept() -> Iterator[None]:
    """Ray puts its own in place of Prefect's."""
    here = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if here and handler is not None:
            signal.signal(signal.SIGTERM, handler)
