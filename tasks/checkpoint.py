"""Checkpoints of a training: sealed, so that what is damaged or half written is never taken for whole. Nothing is pickled.

<folder>/step-00000120/tensors.safetensors, values.json   the state after step 120
<folder>/step-00000120/SEAL.json                          sha256 of each, written last
<folder>/step-00000140.<hex>.tmp/                         one that is being written, or was when its process was killed

In a launch of several processes rank 0 writes, and all go on from the checkpoint that rank 0 chose.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import distributed, interrupt
from tasks.disk import Damaged, fsync, is_disk_trouble, make_folder, write_durably
from tasks.interrupt import Interrupted
from tasks.local_store import sha256_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = [
    "NO_CHECKPOINTS",
    "Checkpoints",
    "Interrupted",
    "State",
    "load_optimizer",
    "load_parameters",
    "optimizer_state",
    "parameter_state",
    "seed_step",
]

logger = logging.getLogger(__name__)

KEPT = 2
TENSORS, VALUES, SEAL = "tensors.safetensors", "values.json", "SEAL.json"


@dataclass
class State:
    """All that a training needs to go on after `step` steps: tensors on the CPU, and what JSON can say."""

    step: int
    tensors: "dict[str, Tensor]"
    values: dict[str, Any]
    processes: int = 1
    """So many made it."""
    made_by: dict[str, str] = field(default_factory=dict)


@dataclass
class _Clock:
    saved: float | None = None


@dataclass(frozen=True)
class Checkpoints:
    """Where a training keeps its checkpoints, and how often it makes one. Can be pickled; `folder` None: none are kept."""

    folder: Path | None = None
    every_seconds: float = 300.0
    """0: one after every step."""
    made_by: Mapping[str, str] = field(default_factory=dict)
    """Code and libraries of this run: going on from a checkpoint of others is a warning."""
    _clock: _Clock = field(default_factory=_Clock, repr=False, compare=False)

    def part(self, name: str) -> "Checkpoints":
        """Those of one of several trainings of the same step."""
        return Checkpoints(None if self.folder is None else self.folder / name, self.every_seconds, self.made_by)

    def load(self) -> State | None:
        """The newest state that is whole; an older one, with a warning, where the newest is damaged; None to start from nothing.

        ValueError where another number of processes made it: shares and random streams are cut by that number.
        """
        self._clock.saved = time.monotonic()
        if self.folder is None:
            return None
        state = next(self._whole(), None) if distributed.world().rank == 0 else None
        chosen = distributed.agreed(state.step if state else None)
        if chosen is None:
            return None
        if state is None:  # another rank
            try:
                state = _read(self.folder / _name(chosen))
            except Damaged as damage:
                raise ValueError(
                    f"{damage}, but rank 0 goes on from there: all machines need to see the same checkpoints, which lie in "
                    "the store, or for a store on S3 in the cache (STACKRLHF_CACHE)"
                ) from damage
        if state.processes != (now := distributed.world().size):
            raise ValueError(
                f"{self.folder}: the checkpoint at step {state.step} is of {state.processes} processes, and this run has {now}: "
                f"run with {state.processes} to go on from it, or remove that folder to start from nothing"
            )
        if others := [name for name, what in self.made_by.items() if state.made_by.get(name, what) != what]:
            logger.warning(
                "the checkpoint at step %d was made with other %s; --refresh starts from nothing", state.step, ", ".join(others)
            )
        return state

    def after_step(self, step: int, state: "Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]") -> None:
        """Call it when `step` steps are done: saves what `state()` gives when it is time to.

        After SIGTERM it saves and raises Interrupted, on every rank after the same step.
        """
        interrupt.boundary()
        stop = distributed.anywhere(interrupt.asked())
        if self.folder is None:
            if stop:
                raise Interrupted(f"at step {step}, of which no checkpoint is kept")
            return
        if distributed.world().rank == 0 and (stop or self._is_due()):
            saved = self._save(step, *state())
            if stop and not saved:
                raise Interrupted(f"at step {step}, which could not be saved")
        if stop:
            raise Interrupted(f"saved at step {step}")

    def _is_due(self) -> bool:
        if self._clock.saved is None:
            self._clock.saved = time.monotonic()
        return time.monotonic() - self._clock.saved >= self.every_seconds

    def _save(self, step: int, tensors: "dict[str, Tensor]", values: dict[str, Any]) -> bool:
        """Whether it is on disk. A full disk does not end a training that may still come to its end: it is a warning."""
        assert self.folder is not None
        try:
            _write(self.folder, State(step, tensors, values, distributed.world().size, dict(self.made_by)))
        except Exception as error:
            if not is_disk_trouble(error):
                raise
            logger.warning("no checkpoint of step %d: %s: %s", step, self.folder, error)
            return False
        finally:
            self._clock.saved = time.monotonic()
        return True

    def _whole(self) -> Iterator[State]:
        """Whole states, the newest first."""
        assert self.folder is not None
        for path in self.folder.glob("*.tmp"):
            shutil.rmtree(path, ignore_errors=True)
        found = _steps(self.folder)
        for number, step in enumerate(found):
            try:
                yield _read(self.folder / _name(step))
            except Damaged as damage:
                after = "the one before it is tried" if number + 1 < len(found) else "the training starts from nothing"
                logger.warning("damaged checkpoint: %s; %s", damage, after)


NO_CHECKPOINTS = Checkpoints()


def seed_step(seed: int, step: int) -> None:
    """Seed torch for one optimizer step: what is drawn is a function of (seed, step, rank), so no generator has to be saved."""
    import torch

    text = f"{seed} {step} {distributed.world().rank}"
    torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1)


def parameter_state(parameters: "Mapping[str, nn.Parameter]") -> "dict[str, Tensor]":
    """model/<name> for each."""
    return {f"model/{name}": parameter.detach() for name, parameter in parameters.items()}


def load_parameters(parameters: "Mapping[str, nn.Parameter]", tensors: "dict[str, Tensor]") -> None:
    """Put what `parameter_state` took back in place; ValueError where names or shapes are others."""
    import torch

    saved = {name.removeprefix("model/"): tensor for name, tensor in tensors.items() if name.startswith("model/")}
    differing = {name for name in {*saved, *parameters} if name not in saved or name not in parameters}
    differing |= {name for name in {*saved} - differing if saved[name].shape != parameters[name].shape}
    if differing:
        raise ValueError(
            f"the checkpoint is not one of this model ({len(differing)} weights differ, first {min(differing)}): "
            "--refresh starts from nothing"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])


def optimizer_state(optimizer: "torch.optim.Optimizer") -> "dict[str, Tensor]":
    """Its tensors by the number of their parameter: optimizer/0/exp_avg, optimizer/0/step, ...; not the learning rates."""
    import torch

    state = optimizer.state_dict()["state"]
    return {
        f"optimizer/{number}/{name}": torch.as_tensor(value)
        for number, entries in state.items()
        for name, value in entries.items()
        if value is not None
    }


def load_optimizer(optimizer: "torch.optim.Optimizer", tensors: "dict[str, Tensor]") -> None:
    """Give a new optimizer over the same parameters the state that `optimizer_state` took; other names are passed over."""
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, number, entry = name.split("/", 2)
            state.setdefault(int(number), {})[entry] = tensor
    whole = optimizer.state_dict()
    count = sum(len(group["params"]) for group in whole["param_groups"])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    wrong = [n for n, e in state.items() if n >= count or ("exp_avg" in e and e["exp_avg"].shape != parameters[n].shape)]
    if wrong:
        raise ValueError(f"the checkpoint is not one of this model (weight {wrong[0]} of {count}): --refresh starts from nothing")
    optimizer.load_state_dict({**whole, "state": state})


# ---- files


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _steps(folder: Path) -> list[int]:
    """Steps of which there is a folder, the newest first; by number, because clocks are set back."""
    names = [path.name for path in folder.glob("step-*")]
    return sorted((int(name[5:]) for name in names if re.fullmatch(r"step-\d{8,}", name)), reverse=True)


def _write(folder: Path, state: State) -> None:
    from safetensors.torch import save_file

    make_folder(folder)
    work = folder / f"{_name(state.step)}.{uuid.uuid4().hex}.tmp"
    work.mkdir()
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}, work / TENSORS)
        fsync(work / TENSORS)
        about = {"step": state.step, "processes": state.processes, "made_by": state.made_by, "values": state.values}
        write_durably(work / VALUES, json.dumps(about))
        write_durably(work / SEAL, json.dumps({name: sha256_of(work / name) for name in (TENSORS, VALUES)}, indent=1))
        fsync(work)
        final = folder / _name(state.step)
        for later in _steps(folder):  # damaged ones, or this run would have gone on from there
            if later >= state.step:
                shutil.rmtree(folder / _name(later), ignore_errors=True)
        os.rename(work, final)
        fsync(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for old in _steps(folder)[KEPT:]:
        shutil.rmtree(folder / _name(old), ignore_errors=True)


def _read(folder: Path) -> State:
    """Damaged, naming the file, where anything is not as it was sealed."""
    from safetensors.torch import load_file

    path = folder / SEAL
    try:
        seal = json.loads(path.read_bytes())
        if set(seal) != {TENSORS, VALUES}:
            raise ValueError(f"it seals {sorted(seal)}")
        for name, digest in seal.items():
            path = folder / name
            if sha256_of(path) != digest:
                raise ValueError("its sha256 is not the seal's")
        path = folder / VALUES
        about = json.loads(path.read_bytes())
        if folder.name != _name(about["step"]):
            raise ValueError(f"it is of step {about['step']}")
        path = folder / TENSORS
        # Copies: what load_file gives lies in the file, which is removed some steps later.
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        return State(about["step"], tensors, about["values"], about["processes"], about["made_by"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path}: {'is missing' if isinstance(error, FileNotFoundError) else error}") from error
