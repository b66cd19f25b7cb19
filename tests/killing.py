"""Trainings that are killed by -9 at a chosen moment, and gone on with: a server that has imported torch once forks one child each.

def train_it(base, data, out, folder): ...  # a test module's own function; it keeps checkpoints in `folder`, one after every step

def test_it(kills, ...):
    kills.run(train_it, base, data, tmp_path / "out", tmp_path / "kept", kill=Kill("before the rename", save=3))
    kills.run(train_it, base, data, tmp_path / "out", tmp_path / "kept")
    assert content(tmp_path / "out") == content(undisturbed)
"""

import functools
import hashlib
import importlib
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PRELOADED = ("tasks.sft.train", "tasks.reward.train", "tasks.ppo.train", "transformers.models.llama.modeling_llama")

PHASES = (
    "before the save",
    "while the tensors are written",
    "after the tensors",
    "after the values",
    "while the seal is written",
    "before the rename",
    "after the rename",
    "while an older one is removed",
    "after the save",
    "in the step after it",
)


class Kill(NamedTuple):
    """The moment: one of PHASES, around the `save`-th save, from 1."""

    phase: str
    save: int


class Kills:
    """The test's side of the server."""

    def __init__(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        code = f"from tests.killing import serve; serve({theirs.fileno()})"
        self._process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()

    def run(self, function: Callable[..., Any], *arguments: Any, kill: Kill | None = None, seconds: float = 120) -> Any:
        """What the function returns in a child; None where it is killed. AssertionError where that came out otherwise."""
        self._connection.send((pickle.dumps((function, arguments)), kill))
        assert self._connection.poll(seconds), f"no end in {seconds} seconds"
        status, result, error = self._connection.recv()
        assert not error, error
        assert status == (-signal.SIGKILL if kill else 0), f"exit status {status}, and the kill was {kill}"
        return result

    def close(self) -> None:
        self._connection.close()
        self._process.wait(30)


def content(folder: Path) -> dict[str, str]:
    """sha256 of every file below."""
    found = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}


# ---- in the server


def serve(number: int) -> None:
    for name in PRELOADED:
        with suppress(ImportError):  # of a trainer that is being worked on: whoever tests it is told
            importlib.import_module(name)
    connection = Connection(number)
    while True:
        try:
            work, kill = connection.recv()
        except EOFError:
            return
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _work(work, kill, writing)
        os.close(writing)
        with open(reading, "rb") as pipe:
            told = pipe.read()
        _, status = os.waitpid(child, 0)
        result, error = pickle.loads(told) if told else (None, "")
        connection.send((os.waitstatus_to_exitcode(status), result, error))


def _work(work: bytes, kill: Kill | None, writing: int) -> None:
    result, error = None, ""
    try:
        if kill is not None:
            _arm(kill)
        function, arguments = pickle.loads(work)
        result = function(*arguments)
    except BaseException:
        error = traceback.format_exc()
    with open(writing, "wb") as pipe:
        pickle.dump((result, error), pipe)
    os._exit(0)


def _arm(kill: Kill) -> None:
    """Die at that moment, by what checkpoints are written with."""
    import safetensors.torch
    import torch

    from tasks import checkpoint

    assert kill.phase in PHASES, kill.phase
    saves = 0

    def die(phase: str) -> None:
        if saves == kill.save and phase == kill.phase:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(before: str, function: Callable[..., Any], after: str = "") -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*arguments: Any, **more: Any) -> Any:
            die(before)
            result = function(*arguments, **more)
            die(after)
            return result

        return wrapped

    def half(path: Path) -> None:
        os.truncate(path, path.stat().st_size // 2)

    def write(*arguments: Any) -> None:
        nonlocal saves
        saves += 1
        die("before the save")
        original(*arguments)
        die("after the save")

    def save_file(tensors: Any, path: Path, **more: Any) -> None:
        save_tensors(tensors, path, **more)
        if kill == ("while the tensors are written", saves):
            half(path)
        die("while the tensors are written")

    def write_durably(path: Path, text: str) -> None:
        die({checkpoint.VALUES: "after the tensors", checkpoint.SEAL: "after the values"}[path.name])
        durably(path, text)
        if path.name == checkpoint.SEAL and kill == ("while the seal is written", saves):
            half(path)
            die("while the seal is written")

    def rmtree(path: Path, **more: Any) -> None:
        if path.is_dir() and not path.name.endswith(".tmp") and kill == ("while an older one is removed", saves):
            (path / checkpoint.TENSORS).unlink()
            die("while an older one is removed")
        shutil.rmtree(path, **more)

    original, save_tensors, durably = checkpoint._write, safetensors.torch.save_file, checkpoint.write_durably
    checkpoint._write = write
    checkpoint.write_durably = write_durably
    safetensors.torch.save_file = save_file
    checkpoint.os = SimpleNamespace(rename=around("before the rename", os.rename, "after the rename"))
    checkpoint.shutil = SimpleNamespace(rmtree=rmtree)
    torch.optim.AdamW.step = around("in the step after it", torch.optim.AdamW.step)
