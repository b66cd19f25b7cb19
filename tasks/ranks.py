"""The processes of `distributed.launch`. Torch's elastic launcher starts them, all anew when one is lost; here they get their
work (tasks.rank), are heard, and are ended; none outlives this process.

On one machine nothing listens to the network but gloo or NCCL, on the loopback interface: they meet in files of a private folder.
"""

import contextlib
import itertools
import json
import logging
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from tasks import interrupt
from tasks.compute import Compute
from tasks.processes import WorkerKilled
from tasks.progress import hear

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3
MACHINES_MEET = 1_800
"""Seconds that a machine waits for the others."""
SECOND_THOUGHTS = 0.5
"""Seconds in which a better reason is preferred to the one that was heard first: one rank's end is another's lost connection, and
most exceptions are raised by all ranks alike."""
ACROSS_MACHINES = 3.0
"""The same where the reason may have to come from another machine, and seconds until a machine that failed leaves the others."""
LEFT_ALONE = 15.0
"""Seconds that a launcher gets to end after a failure; it may be waiting for machines that are gone."""
RAISED, KILLED, LOST = range(3)

_launches = itertools.count()


def _name(arguments: dict[str, Any]) -> str:
    """Of a launch, the same on all machines: the step's key, with which an attempt's folder begins; else a number."""
    out = arguments.get("out")
    return str(next(_launches)) if out is None else out.name.partition(".")[0]


def run(function: Callable[..., Any], compute: Compute, arguments: dict[str, Any]) -> Any:
    """function(**arguments) on every rank of this machine; what rank 0 returns (on machines without it: None)."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    folder = tempfile.mkdtemp(prefix="stackrlhf-")
    try:
        config = LaunchConfig(
            min_nodes=compute.machines,
            max_nodes=compute.machines,
            nproc_per_node=compute.processes,
            run_id=(run_id := f"{function.__module__}.{function.__qualname__}-{_name(arguments)}"),
            max_restarts=MAX_RESTARTS,
            **_rendezvous(compute, folder),
        )
        ranks = _Ranks(f"{folder}/socket", compute, pickle.dumps((function, compute, folder, arguments)), arguments.get("progress"))
        code = f"import sys, time; born = time.monotonic(); sys.path[:] = {[*map(str, sys.path)]}; "
        code += f"from tasks.rank import serve; serve({ranks.address!r}, born)"
        launcher = _Launcher(lambda: elastic_launch(config, sys.executable)("-c", code))
        with ranks, _quiet(), _environment(compute), interrupt.forwarding(lambda: ranks.pids):
            launcher.start()
            if compute.machines > 1:
                _Board(compute, run_id, ranks).start()
            try:
                ranks.hear_until(lambda: not launcher.is_alive())
            finally:
                ranks.end()  # those that the launcher starts even now are told to end at once
                ranks.hear_until(lambda: not launcher.is_alive(), seconds=10)
        if ranks.error is not None:
            raise ranks.error
        if launcher.failure is not None:
            raise WorkerKilled(function.__qualname__, ranks.lost or str(launcher.failure)) from launcher.failure
        if ranks.interrupted:
            raise interrupt.Interrupted(ranks.interrupted)
        return ranks.result
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _rendezvous(compute: Compute, folder: str) -> dict[str, Any]:
    if compute.machines == 1:
        # Files instead of a port: torch's stores listen on every interface, and the rendezvous unpickles what it finds there.
        meeting = {"rdzv_endpoint": f"{folder}/rendezvous", "rdzv_configs": {"store_type": "file"}}
        return {"rdzv_backend": "c10d", "local_addr": "127.0.0.1", **meeting}
    is_host = str(compute.machine_rank == 0).lower()
    configs = {"is_host": is_host, "timeout": MACHINES_MEET, "join_timeout": MACHINES_MEET, "read_timeout": 60}
    return {"rdzv_backend": "c10d", "rdzv_endpoint": compute.rendezvous, "rdzv_configs": configs}


class _Launcher(threading.Thread):
    """Torch's agent in a thread of its own: in the main one it would take over the signals."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True, name="elastic")
        self.work, self.failure = work, cast(BaseException | None, None)

    def run(self) -> None:
        # Ranks inherit it: what comes before they listen waits for them, and kills none that is only beginning.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            self.work()
        except BaseException as failure:
            self.failure = failure


class _Ranks:
    """This process's side of the ranks of its machine."""

    def __init__(self, address: str, compute: Compute, work: bytes, progress: Any) -> None:
        self.address, self.compute, self.work, self.progress = address, compute, work, progress
        self.result: Any = None
        self.error: Exception | None = None
        self.interrupted = ""
        self.lost = ""
        self._first = compute.machine_rank * compute.processes
        self._connections: dict[Connection, tuple[int, int]] = {}  # -> (rank, pid); (-1, 0) until it tells
        self._finished: set[int] = set()
        self._troubles: list[tuple[int, int, Any]] = []  # (what, rank, exception or words), the best reason is the smallest
        self._decide = self._leave = 0.0
        self._heard = 0.0
        """When the first of the troubles was heard."""
        self._restarted = 0.0
        """The same of those for which all began anew; on the clock that processes share, time.monotonic."""
        self.ending = False
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(address)
        self._door.listen()

    def __enter__(self) -> "_Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self._door.close()

    @property
    def pids(self) -> list[int]:
        return [pid for rank, pid in self._connections.values() if pid and rank not in self._finished]

    def hear_until(self, over: Callable[[], bool], seconds: float | None = None) -> None:
        until = None if seconds is None else time.monotonic() + seconds
        while not over() and (until is None or time.monotonic() < until):
            interrupt.boundary()  # it is the ranks that are in a hurry, not this process
            for ready in wait([self._door, *self._connections], timeout=0.1):
                if ready is self._door:
                    self._connections[Connection(self._door.accept()[0].detach())] = -1, 0
                elif ready in self._connections:
                    self._read(cast(Connection, ready))
            if self.error is not None:
                if time.monotonic() > self._leave:
                    if self.ending:
                        return
                    self.end()
                    self._leave = time.monotonic() + LEFT_ALONE
            elif self._troubles and not self.ending and time.monotonic() > self._decide:
                self._answer(*min(self._troubles, key=lambda one: one[:2]))

    def fail(self, error: Exception) -> None:
        """End everything, for a reason that another machine tells."""
        self._trouble(RAISED, -1, error)

    def end(self, code: int = 0) -> None:
        """End every rank at once. Code 0 contents the launcher, any other makes it start them again."""
        self.ending = self.ending or code == 0
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send(("end", code))
            connection.close()
        self._connections.clear()
        self._finished.clear()
        self._troubles.clear()

    def _read(self, connection: Connection) -> None:
        rank, _ = self._connections[connection]
        try:
            kind, value = connection.recv()
        except (EOFError, OSError):
            del self._connections[connection]
            connection.close()
            if not self.ending:
                self._trouble(
                    KILLED, rank, f"rank {rank} was killed, often for want of memory" if rank >= 0 else "a rank did not start"
                )
            return
        if kind == "here":
            self._welcome(connection, *value)
        elif kind == "update":
            if rank == 0:
                hear(value)
        elif kind == "log":
            if rank == 0:
                name, level, text = value
                logging.getLogger(name).log(level, "%s", text)
        elif kind == "raised":
            self._trouble(RAISED, rank, value)
        else:
            self._done(rank, *value)

    def _welcome(self, connection: Connection, local_rank: int, pid: int, born: float, asked: bool) -> None:
        with contextlib.suppress(OSError):  # it is dead, which is noticed where it is read
            self._connections[connection] = self._first + local_rank, pid
            if self.ending:
                connection.send(("end", 0))
            elif born < self._restarted:
                del self._connections[connection]  # it was still beginning when one was lost and all began anew
                connection.send(("end", 1))
                connection.close()
            else:
                connection.send(("work", self.work))
                if interrupt.asked() and not asked:
                    os.kill(pid, signal.SIGTERM)

    def _done(self, rank: int, outcome: str, what: Any) -> None:
        if outcome == "lost":
            self._trouble(LOST, rank, f"rank {rank} lost the others: {what}")
            return
        if outcome == "interrupted":
            self.interrupted = what
        elif rank == 0:
            self.result = what
        self._finished.add(rank)
        if len(self._finished) == self.compute.processes:
            self.end()

    def _trouble(self, what: int, rank: int, reason: Any) -> None:
        elsewhere = what == LOST and self.compute.machines > 1
        if not self._troubles:
            self._heard = time.monotonic()
        decide = time.monotonic() + (ACROSS_MACHINES if elsewhere else SECOND_THOUGHTS)
        self._decide = min(self._decide, decide) if self._troubles else decide
        self._troubles.append((what, rank, reason))

    def _answer(self, what: int, rank: int, reason: Any) -> None:
        if what == RAISED:
            self.error = self._named(rank, reason)
            self._leave = time.monotonic() + (ACROSS_MACHINES if self.compute.machines > 1 else 0.0)
            return
        self.lost = reason
        if self.progress is not None:
            self.progress.note(f"{reason}; all ranks go on from the last checkpoint")
        self._restarted = self._heard
        self.end(1)

    def _named(self, rank: int, error: Exception) -> Exception:
        """The exception with its rank; rank 0 says nothing that one process would not say, too."""
        if rank < 0:
            return error
        error.add_note(f"In rank {rank} of {self.compute.processes * self.compute.machines}")
        if rank > 0 and error.args and isinstance(error.args[0], str):
            error.args = (f"{error.args[0]} (rank {rank})", *error.args[1:])
        return error


class _Board(threading.Thread):
    """Where a machine tells the others why it ended, in the store of the rendezvous: they would wait for it, and not know."""

    def __init__(self, compute: Compute, run_id: str, ranks: _Ranks) -> None:
        super().__init__(daemon=True, name="board")
        self.compute, self.key, self.ranks = compute, f"ended/{run_id}", ranks

    def run(self) -> None:
        from torch.distributed import TCPStore

        host, port = str(self.compute.rendezvous).rsplit(":", 1)
        with contextlib.suppress(Exception):  # it goes when machine 0 does
            store = TCPStore(host.strip("[]"), int(port), timeout=timedelta(seconds=MACHINES_MEET), wait_for_workers=False)
            while not self.ranks.ending or self.ranks.error is not None:
                if (error := self.ranks.error) is not None:
                    mine = [type(error).__name__, isinstance(error, ValueError), str(error), self.compute.machine_rank]
                    store.set(self.key, json.dumps(mine))
                    return
                if store.check([self.key]):
                    name, is_value, text, machine = json.loads(store.get(self.key))
                    said = f"{text} (machine {machine})"
                    self.ranks.fail(ValueError(said) if is_value else RuntimeError(f"{name}: {said}"))
                    return
                time.sleep(0.5)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What torch's launcher logs of a lost rank is told by us, in one line."""
    loggers = [
        logging.getLogger(name) for name in ("torch.distributed.elastic", "torch.distributed.launcher", "torchelastic-events-null")
    ]
    before = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for one, level in zip(loggers, before, strict=True):
            one.setLevel(level)


@contextlib.contextmanager
def _environment(compute: Compute) -> Iterator[None]:
    wanted = {"GLOO_SOCKET_IFNAME": _loopback(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if compute.machines == 1 else {}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update({name: value for name, value in wanted.items() if value})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _loopback() -> str:
    """Name of the interface of 127.0.0.1; empty where there is none, and gloo takes the host's own address."""
    import psutil

    addresses = psutil.net_if_addrs().items()
    return next((name for name, found in addresses if any(one.address == "127.0.0.1" for one in found)), "")
