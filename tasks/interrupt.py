"""SIGTERM while a step trains: it goes on to its next step boundary, saves there and ends, so that the next run goes on from it."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

GRACE_SECONDS = 60.0
"""How long after SIGTERM the next step boundary is waited for, at least; twice a step's time where that is longer."""
ECHO_SECONDS = 1.0
"""Signals so close together are one: who ends a whole group sends one to a parent, which passes it on, and one to its child."""


class Interrupted(BaseException):
    """SIGTERM came, and what was done so far is saved; the command ends with exit code 75. Like KeyboardInterrupt it is no
    Exception: nobody retries it, or takes it for a failure."""


class _Watch:
    """What is known of SIGTERM in this process."""

    deferred = False
    asked = False
    asked_at = 0.0
    overdue = False
    """GRACE_SECONDS are over."""
    waiting: threading.Timer | None = None
    pace = 0.0
    """Seconds between the last two boundaries."""
    boundary: float | None = None
    forwards: tuple[Callable[[], Iterable[int]], ...] = ()


_watch = _Watch()


@contextmanager
def deferring() -> Iterator[None]:
    """Inside the `with`, the first SIGTERM only makes `asked()` true, here and in the processes that `forwarding` names.

    A second one raises Interrupted wherever the main thread is, and so does the first, when no boundary came for GRACE_SECONDS.
    At the end of the `with` the signal is handed on to whoever listened before (Prefect, the command), as if it came only now;
    where nobody did, Interrupted is raised. Outside the main thread, which signals never reach, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _hear)
    outer = _watch.deferred
    _watch.deferred, _watch.asked, _watch.overdue, _watch.pace, _watch.boundary = True, False, False, 0.0, None
    try:
        yield
        if _watch.asked:
            raise Interrupted("the step came to its end")
    except Interrupted:
        if callable(before):
            before(signal.SIGTERM, None)
        raise
    finally:
        _stop_waiting()
        _watch.deferred, _watch.asked = outer, False
        signal.signal(signal.SIGTERM, before)


def deferred() -> bool:
    """Is this inside such a `with`?"""
    return _watch.deferred


def asked() -> bool:
    """Has SIGTERM come since the step began?"""
    return _watch.asked


def boundary() -> None:
    """A step of the training ends here: from now on nobody is hurried."""
    now = time.monotonic()
    if _watch.boundary is not None:
        _watch.pace = now - _watch.boundary
    _watch.boundary = now
    if _watch.asked:
        _stop_waiting()


@contextmanager
def forwarding(pids: Callable[[], Iterable[int]]) -> Iterator[None]:
    """Inside the `with`, the first SIGTERM also goes to the processes that `pids()` names: they do the training."""
    _watch.forwards = (*_watch.forwards, pids)
    try:
        yield
    finally:
        _watch.forwards = tuple(other for other in _watch.forwards if other is not pids)


def _hear(*_: Any) -> None:
    if _watch.asked:
        if not _watch.overdue and time.monotonic() - _watch.asked_at < ECHO_SECONDS:
            return
        raise Interrupted("without waiting for the end of a step; what was saved before stands")
    _watch.asked, _watch.asked_at = True, time.monotonic()
    others = [pid for pids in _watch.forwards for pid in pids()]
    for pid in others:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    if not others:  # else it is they who come to boundaries, and who are in a hurry
        _watch.waiting = threading.Timer(max(GRACE_SECONDS, 2 * _watch.pace), _end)
        _watch.waiting.daemon = True
        _watch.waiting.start()


def _end() -> None:
    _watch.overdue = True
    os.kill(os.getpid(), signal.SIGTERM)


def _stop_waiting() -> None:
    if _watch.waiting is not None:
        _watch.waiting.cancel()
        _watch.waiting = None
