"""Work side by side in processes of this machine: progress made there is heard here, and no worker outlives whoever started it."""

import contextlib
import functools
import importlib
import multiprocessing
import os
import pickle
import reprlib
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Self

from tasks import interrupt
from tasks.progress import Update, hear, listening

FALSE_STARTS = 5
"""Workers that may end before their first task (a broken installation, no memory left) until a run gives up."""


class WorkerKilled(RuntimeError):
    """A worker ended in the middle of a task, and so did those that tried again. `task` and `how` say which and in what way."""

    def __init__(self, task: str, how: str) -> None:
        super().__init__(f"a process of this step ended before its work was done ({how}): {task}")
        self.task, self.how = task, how

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.task, self.how)


def side_by_side(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], processes: int) -> list[Any]:
    """[function(*a) for a in arguments], at most `processes` at once; with one process, here and one after the other.

    `function` is a module's own, and arguments and results can be pickled. What a call raises is raised here, and the others are
    ended. RuntimeError where a process is killed.
    """
    if processes <= 1:
        return [function(*one) for one in arguments]
    results: list[Any] = [None] * len(arguments)
    with Pool(min(processes, len(arguments))) as pool:
        for number, result in pool.run(function, arguments):
            results[number] = result
    return results


class Pool:
    """A fixed number of worker processes, started at once. Not for several threads.

    They are fresh interpreters, because a fork would inherit torch's and Prefect's threads and hang, and unlike
    multiprocessing's they do not import the main module again, which costs 0.3 s for our command and 1.3 s for Prefect's.
    A worker that is killed costs its task another try, not the pool. All end with the parent, also when that is killed by -9.
    """

    def __init__(self, workers: int, *, preload: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        """`preload`: modules that workers import before their first task. `environment`: defaults where this process has none."""
        self.workers = workers
        self._preload, self._environment = tuple(preload), {**(environment or {}), **os.environ}
        # Only this process holds the end that could be written to: the other end closes when it dies, however it dies.
        self._alive, self._life = os.pipe()
        self._running: dict[Connection, _Worker] = {}
        self._busy = False
        self._fill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end(list(self._running))
        os.close(self._alive)
        os.close(self._life)

    def run(
        self,
        function: Callable[..., Any],
        arguments: Iterable[tuple[Any, ...]],
        *,
        ahead: int = 0,
        tries: int = 1,
        note: Callable[[str], None] = lambda text: None,
    ) -> Generator[tuple[int, Any], None, None]:
        """(number, function(*a)) for every a of `arguments`, in order of completion.

        `arguments` is read as it is used up: never more than `workers + ahead` of it are taken out and not yet answered for.
        What a call raises is raised here, and ends the others. A task whose worker is killed is tried `tries` times in all,
        with a `note`, and is a WorkerKilled then. In a step that defers SIGTERM every call gets to its next boundary; then
        Interrupted is raised.
        """
        assert not self._busy, "a pool runs one thing at a time"
        self._busy = True
        source, more = enumerate(arguments), True
        waiting: deque[tuple[int, tuple[Any, ...]]] = deque()
        working: dict[Connection, tuple[int, tuple[Any, ...]]] = {}
        deaths: dict[int, int] = {}
        false_starts, stopped = 0, ""
        call = functools.partial(_interruptible, function) if interrupt.deferred() else function

        def pids() -> list[int]:
            return [self._running[connection].process.pid for connection in working]

        stack = contextlib.ExitStack()
        stack.enter_context(interrupt.forwarding(pids))
        try:
            while True:
                if interrupt.asked():
                    if waiting or (more and next(source, None) is not None):
                        stopped = stopped or "before all was begun"
                    more = False
                    waiting.clear()
                    if stopped and not working:
                        raise interrupt.Interrupted(stopped)
                room = more and len(waiting) + len(working) < self.workers + ahead
                if room:
                    if (one := next(source, None)) is None:
                        more = False
                        continue
                    waiting.append(one)
                elif not waiting and not working:
                    return
                self._fill()
                self._hand_out(call, waiting, working)
                # One argument at a time, and a look at the workers after each: making one can take as long as a task.
                for connection in wait(list(self._running), timeout=0 if room else None):
                    assert isinstance(connection, Connection)
                    worker = self._running[connection]
                    try:
                        kind, value = connection.recv()
                    except (EOFError, OSError):
                        how = self._end([connection])
                        if connection not in working:
                            false_starts += not worker.ready
                            if false_starts > FALSE_STARTS:
                                raise RuntimeError(f"processes of this step end before their first task ({how})") from None
                            continue
                        number, argument = working.pop(connection)
                        if interrupt.asked():
                            stopped = stopped or "at once"
                            continue
                        deaths[number] = deaths.get(number, 0) + 1
                        task = in_words(function, argument)
                        if deaths[number] >= tries:
                            raise WorkerKilled(task, how) from None
                        note(f"a worker was lost ({how}), its task goes to another: {task}")
                        waiting.appendleft((number, argument))
                        continue
                    if kind == "update":
                        hear(value)
                    elif kind == "ready":
                        worker.ready = True
                    elif kind == "raised":
                        del working[connection]
                        raise value
                    elif kind == "interrupted":
                        del working[connection]
                        stopped = value
                    else:
                        number, _ = working.pop(connection)
                        self._hand_out(call, waiting, working)  # before whoever asked for the result takes their time with it
                        yield number, value
        finally:
            stack.close()
            self._end(list(working), signal.SIGKILL)  # nobody wants these results any more
            self._busy = False

    def _fill(self) -> None:
        while len(self._running) < self.workers:
            worker = _Worker(self._preload, self._environment, self._alive)
            self._running[worker.connection] = worker

    def _hand_out(
        self,
        function: Callable[..., Any],
        waiting: deque[tuple[int, tuple[Any, ...]]],
        working: dict[Connection, tuple[int, tuple[Any, ...]]],
    ) -> None:
        for connection, worker in self._running.items():
            if waiting and worker.ready and connection not in working:
                number, argument = waiting.popleft()
                payload = pickle.dumps((function, argument), pickle.HIGHEST_PROTOCOL)
                working[connection] = number, argument
                with contextlib.suppress(OSError):  # it is dead: this is noticed, and counted, where its answer is awaited
                    connection.send_bytes(payload)

    def _end(self, connections: Sequence[Connection], how: signal.Signals = signal.SIGTERM) -> str:
        """End these workers; say how the last of them ended."""
        workers = [self._running.pop(connection) for connection in connections]
        for worker in workers:
            worker.connection.close()
            if worker.process.poll() is None:
                with contextlib.suppress(OSError):
                    worker.process.send_signal(how)
        for worker in workers:
            try:
                worker.process.wait(5)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        code = workers[-1].process.returncode if workers else 0
        return "killed, often for want of memory" if code == -signal.SIGKILL else f"exit code {code}"


class _Worker:
    """The parent's side of one process."""

    def __init__(self, preload: Sequence[str], environment: Mapping[str, str], alive: int) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        self.ready = False
        code = f"import sys; sys.path[:] = {[*map(str, sys.path)]}; from tasks.processes import serve; "
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{code}serve({theirs.fileno()}, {alive}, {[*preload]})"],
            pass_fds=(theirs.fileno(), alive),
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        theirs.close()


def serve(connection_number: int, alive: int, preload: Sequence[str]) -> None:
    """A worker's life: import, then call what comes in until the parent closes the connection, or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    connection, lock = Connection(connection_number), threading.Lock()

    def send(message: bytes) -> None:
        with lock:
            try:
                connection.send_bytes(message)
            except OSError:
                os._exit(1)  # whoever waits for it is gone

    def tell(update: Update) -> None:
        send(pickle.dumps(("update", update)))

    for name in preload:
        with contextlib.suppress(Exception):  # a task that needs it fails with the same, and tells so
            importlib.import_module(name)
    send(pickle.dumps(("ready", None)))
    with listening(tell):
        while True:
            try:
                question = connection.recv_bytes()
            except (EOFError, OSError):
                return
            try:
                send(answer(question))
            except interrupt.Interrupted as stop:
                send(pickle.dumps(("interrupted", str(stop))))


def answer(question: bytes) -> bytes:
    """Of a pickled (function, arguments): ("done", its result), or ("raised", its exception), pickled."""
    try:
        function, arguments = pickle.loads(question)
        del question  # arguments may be large
        return pickle.dumps(("done", function(*arguments)), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        error.add_note(f"In a worker:\n{traceback.format_exc()}")
        try:
            raised = pickle.dumps(("raised", error))
            pickle.loads(raised)  # an exception whose __init__ takes other arguments than it hands on fails only here
        except Exception:
            raised = pickle.dumps(("raised", RuntimeError(f"{type(error).__name__}: {error}")))
        return raised


def _interruptible(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), which SIGTERM ends at its next boundary."""
    finished, result = False, None
    try:
        with interrupt.deferring():
            result = function(*arguments)
            finished = True
    except interrupt.Interrupted:
        if not finished:
            raise
    return result


def _end_with_parent(alive: int) -> None:
    while os.read(alive, 1):
        pass
    os._exit(1)


def in_words(function: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    """A call for a message; each argument in some hundred characters at most."""
    name = getattr(function, "__name__", None) or _short.repr(function)
    return f"{name}({', '.join(map(_short.repr, arguments))})"


_short = reprlib.Repr()
_short.maxother = _short.maxstring = 120
