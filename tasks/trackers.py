"""Experiment trackers: what a step is set to and what it measures, sent to TensorBoard, MLflow, Weights & Biases or Trackio.

Each tracker is a process of its own (tasks/tracker.py), which hears of the step through a pipe. So a tracker's imports, threads and
exit handlers are not in the training's process, and one that hangs can be ended: nothing here raises after the start, no update
waits, and the end waits for all trackers together `LAST_WORDS_SECONDS` at most.
"""

import contextlib
import json
import logging
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import psutil

from tasks.artifacts import Identity
from tasks.compute import Tracker
from tasks.progress import Update, listening

logger = logging.getLogger(__name__)

MODULES: dict[Tracker, str] = {tracker: tracker for tracker in get_args(Tracker)}
"""What has to be importable for each; the extra of this package has the tracker's name."""
WAITING_UPDATES = 2_000
"""A tracker that is further behind misses updates; how many is said at the end."""
LAST_WORDS_SECONDS = 30.0
"""How long a finished step waits for its trackers at most, all together: MLflow's first database alone takes ten seconds."""
HURRY_SECONDS = 5.0
"""The same for a step that failed, or was told to end."""
MAIN_PHASES = ("", "train")

Final = Callable[[Mapping[str, Any]], None]


def check_installed(report_to: Sequence[Tracker]) -> None:
    """ValueError where a tracker is asked for that is not installed."""
    for tracker in report_to:
        if find_spec(MODULES[tracker]) is None:
            raise ValueError(
                f"compute.report_to={tracker}, but {MODULES[tracker]} is not installed: pip install 'stackrlhf[{tracker}]', "
                f"or leave {tracker} out"
            )


@contextmanager
def reporting(report_to: Sequence[Tracker], identity: Identity, folder: Path) -> Iterator[Final]:
    """Inside the `with`, each of the trackers is told the step's settings and whatever its progress says.

    What it yields is to be called with the final metrics; a step that raises is marked as failed. `folder` is where trackers put
    their files for which no variable of the environment names another place (docs/operations.md). A step that goes on after a stop
    goes on in the same run of a tracker: the run's name and id are made of the step's key. With several machines only machine 0
    should report, and of its processes only rank 0 is heard here.
    """
    check_installed(report_to)
    told = [_Told(tracker, opening(identity, folder)) for tracker in dict.fromkeys(report_to)]

    def listen(update: Update) -> None:
        if update.step == identity.step and update.metrics:
            for one in told:
                one.tell({"metrics": named(update), "step": update.done, "prefix": prefix(update), "time": time.time()})

    final: dict[str, Any] = {}
    state = "failed"
    try:
        with listening(listen) if told else contextlib.nullcontext():
            yield final.update
        state = "finished"
    finally:
        until = time.monotonic() + (LAST_WORDS_SECONDS if state == "finished" else HURRY_SECONDS)
        for one in told:
            one.tell({"final": plain(final), "state": state})
        for one in told:
            one.close(until)


def opening(identity: Identity, folder: Path) -> dict[str, Any]:
    """What a tracker is told first. `data` is the same for all steps that were made from the same data."""
    key = identity.key
    inputs = {f"input.{name}": value[:12] for name, value in identity.inputs.items()}
    return {
        "folder": str(folder.absolute()),
        "step": identity.step,
        "name": f"{identity.step}-{key[:12]}",
        "config": flat(identity.config),
        "tags": {"step": identity.step, "key": key, "data": identity.inputs.get("ingest", key)[:12], **inputs},
    }


def flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """{"lora": {"r": 8}} -> {"lora.r": 8}."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {above + name: value}
    return found


def prefix(update: Update) -> str:
    """`sft`; and `reward/judge` where a step has phases of training with numbers of their own."""
    return update.step if update.phase in (*MAIN_PHASES, update.step) else f"{update.step}/{update.phase}"


def named(update: Update) -> dict[str, float]:
    """`sft/loss`, `ppo/objective/kl`; what is not a finite number is left out."""
    return {f"{prefix(update)}/{name}": float(value) for name, value in update.metrics.items() if math.isfinite(value)}


def plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's scalars: numbers of numpy and torch become Python's, what is not finite becomes a word."""
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        number = value.item() if hasattr(value, "item") else value
        scalar = isinstance(number, str | bool | int | None) or (isinstance(number, float) and math.isfinite(number))
        found[name] = number if scalar else str(number)
    return found


class _Told:
    """This process's side of one tracker: a queue, a thread that empties it into the pipe, and the process at its other end."""

    def __init__(self, tracker: Tracker, first: Mapping[str, Any]) -> None:
        self.tracker = tracker
        self.missed = 0
        self._said = False
        self._queue: queue.Queue[bytes] = queue.Queue(WAITING_UPDATES)
        self._over = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed in close()
        self.tell(first)
        self._thread = threading.Thread(target=self._send, daemon=True, name=f"tracker-{tracker}")
        try:
            self._process = self._start()
        except OSError as error:
            self._say(f"could not be started: {error}")
            return
        self._thread.start()

    def tell(self, message: Mapping[str, Any]) -> None:
        try:
            self._queue.put_nowait(json.dumps(message, default=str).encode() + b"\n")
        except queue.Full:
            self.missed += 1
            if "final" in message:  # the last words count more than what waits
                with contextlib.suppress(queue.Empty):
                    self._queue.get_nowait()
                with contextlib.suppress(queue.Full):
                    self._queue.put_nowait(json.dumps(message, default=str).encode() + b"\n")

    def close(self, until: float) -> None:
        """Nothing more will be told. Waits until `until` at most, and ends what is still there then."""
        process = self._process
        if process is not None:
            self._over.set()
            self._thread.join(max(0.0, until - time.monotonic()))
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                _kill(process)
                self._say("did not answer in time, and was ended: what it had not sent is missing there")
            self._say_how_it_ended(process)
            if self.missed:
                self._say(f"could not keep up: {self.missed} updates are missing there")
        self._errors.close()

    def _say_how_it_ended(self, process: "subprocess.Popen[bytes]") -> None:
        if process.returncode:
            self._errors.seek(0)
            lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines()]
            self._say(f"failed: {next(filter(None, reversed(lines)), f'exit code {process.returncode}')[:300]}")

    def _say(self, what: str) -> None:
        """Once: the first trouble is the cause of all others."""
        if not self._said:
            self._said = True
            logger.warning("tracker %s %s; the step itself is not affected", self.tracker, what)

    def _start(self) -> "subprocess.Popen[bytes]":
        code = f"import sys; sys.path[:] = {[*map(str, sys.path)]}; from tasks.tracker import serve; serve({self.tracker!r})"
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        return subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # of this process it may be --json's
            stderr=self._errors,
            env=environment,
            start_new_session=True,  # Ctrl-C is the training's to answer; it tells the trackers afterwards
        )

    def _send(self) -> None:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            with process.stdin as pipe:
                while True:
                    try:
                        pipe.write(self._queue.get(timeout=0.2))
                        pipe.flush()
                    except queue.Empty:
                        if self._over.is_set():
                            return
        except OSError:  # it is gone: better said now than at the end of a long step
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(HURRY_SECONDS)
                self._say_how_it_ended(process)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """The process and whatever it started: wandb has a service of its own."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    process.kill()
    process.wait()
