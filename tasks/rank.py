"""One rank of `distributed.launch`, from the inside: it takes the work, does it with the others, and tells what came of it."""

import contextlib
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
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tasks import distributed, interrupt
from tasks.processes import answer
from tasks.progress import Update, listening


def serve(address: str, born: float) -> None:
    """A rank's life, until it is told to end. `born`: when, by time.monotonic; SIGTERM is blocked since, and heard now."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    # When the work is over the parent's word counts alone. Not SIG_IGN, which would drop what waits.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with contextlib.suppress(interrupt.Interrupted), interrupt.deferring():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        _serve(address, born)


def _serve(address: str, born: float) -> None:
    parent = os.getppid()
    door = socket.socket(socket.AF_UNIX)
    door.connect(address)
    connection, lock = Connection(door.detach()), threading.Lock()

    def send(message: bytes) -> None:
        with lock, contextlib.suppress(OSError):  # whoever waits for it is gone, and so is this process in a moment
            connection.send_bytes(message)

    def tell(update: Update) -> None:
        send(pickle.dumps(("update", update)))

    def end_when_told() -> None:
        """Or with the parent; whatever the main thread is doing, were it in a collective that will never end."""
        while os.getppid() == parent:
            try:
                if connection.poll(1):
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(connection.recv()[1])
            except (EOFError, OSError):
                break
        time.sleep(0.5)  # a process's connections close a moment before it is gone
        if os.getppid() != parent:
            shutil.rmtree(Path(address).parent, ignore_errors=True)
        os._exit(1)

    logging.basicConfig(handlers=[_Told(send)], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    here = int(os.environ["LOCAL_RANK"]), os.getpid(), born, interrupt.asked()
    send(pickle.dumps(("here", here)))
    kind, work = connection.recv()
    if kind == "end":
        os._exit(work)
    ending = threading.Thread(target=end_when_told)
    ending.start()
    with listening(tell):
        send(answer(pickle.dumps((_share, (work,)))))
    ending.join()


class _Told(logging.Handler):
    """Warnings of a rank are the parent's to show."""

    def __init__(self, send: Callable[[bytes], None]) -> None:
        super().__init__(logging.WARNING)
        self.send = send

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # as any handler: what cannot be told costs no training
            self.send(pickle.dumps(("log", (record.name, record.levelno, record.getMessage()))))


def _share(work: bytes) -> tuple[str, Any]:
    """This rank's share of the work, and what came of it: result, interrupted, or lost where the others are gone."""
    try:
        function, compute, folder, arguments = pickle.loads(work)
        with distributed.joined(compute, folder) as world:
            if world.rank > 0 and "out" in arguments:  # thrown away with the launch's folder, however this rank ends
                arguments["out"] = Path(tempfile.mkdtemp(prefix=f"rank-{world.rank}-", dir=folder))
            return "result", function(**arguments)
    except interrupt.Interrupted as stop:
        return "interrupted", str(stop)
    except Exception as error:
        if not _in_a_collective(error):
            raise
        return "lost", " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]])


def _in_a_collective(error: BaseException) -> bool:
    """Whether torch's communication raised it: then another rank is the cause, and has told its own or is dead."""
    frames = traceback.extract_tb(error.__traceback__)
    return any("/torch/distributed/" in frame.filename.replace(os.sep, "/") for frame in frames[-3:])
