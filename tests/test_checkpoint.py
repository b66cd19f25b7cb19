"""Checkpoints: what was saved comes back to the bit, and what is damaged is noticed, named, and never gone on from."""

import json
import os
import pickle
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from tasks import checkpoint, interrupt, optim
from tasks.checkpoint import Checkpoints, Interrupted, load_optimizer, optimizer_state, seed_step


def save(folder: Path, *steps: int, **values) -> Checkpoints:
    checkpoints = Checkpoints(folder, every_seconds=0)
    for step in steps:
        checkpoints.after_step(step, lambda step=step: ({"weight": torch.full((3,), step / 3)}, {"seen": step, **values}))
    return checkpoints


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_was_saved_comes_back_to_the_bit(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "a/b": torch.randn(3, 4),
        "turned": torch.randn(3, 4).T,
        "half": torch.randn(5).bfloat16(),
        "count": torch.tensor(7),
        "none": torch.zeros(0),
    }
    values = {"curves": [{"loss": 0.1 + 0.2, "never": float("nan")}], "large": 2**70, "word": "é", "no": None}
    checkpoints = Checkpoints(tmp_path / "new" / "folder", every_seconds=0)
    checkpoints.after_step(12, lambda: (tensors, values))
    state = checkpoints.load()
    assert state.step == 12
    assert {name: tensor.dtype for name, tensor in state.tensors.items()} == {n: t.dtype for n, t in tensors.items()}
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in tensors.items())
    assert str(state.values) == str(values)  # nan is not equal to itself
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix not in {".json", ".safetensors"}]


def test_nothing_saved_is_nothing_to_go_on_from(tmp_path):
    assert Checkpoints(tmp_path / "none").load() is None
    Checkpoints().after_step(1, lambda: pytest.fail("asked for a state that nobody keeps"))
    assert Checkpoints().load() is None


def test_the_two_newest_by_number_are_kept_whatever_the_clock_says(tmp_path):
    checkpoints = save(tmp_path, 3, 7, 12)
    assert names(tmp_path) == {"step-00000007", "step-00000012"}
    os.utime(tmp_path / "step-00000012", (0, 0))
    save(tmp_path, 13)
    assert names(tmp_path) == {"step-00000012", "step-00000013"}
    assert checkpoints.load().step == 13


def test_it_saves_when_it_is_time_to_and_not_before(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    checkpoints, saved = Checkpoints(tmp_path, every_seconds=300), []
    checkpoints.load()
    for step, at in enumerate((1100, 1299, 1300, 1400, 1650, 1900, 1949, 1950), start=1):
        now[0] = at
        checkpoints.after_step(step, lambda step=step: (saved.append(step) or {}, {}))
    assert saved == [3, 5, 8]


def test_parts_of_a_step_keep_their_own(tmp_path):
    whole = pickle.loads(pickle.dumps(Checkpoints(tmp_path, every_seconds=0)))  # as a worker process gets it
    for name, step in (("reward", 4), ("judge", 9)):
        whole.part(name).after_step(step, lambda: ({}, {}))
    assert [whole.part(name).load().step for name in ("reward", "judge")] == [4, 9]
    assert whole.load() is None
    assert Checkpoints().part("judge").load() is None


def test_every_file_is_on_disk_before_the_seal_and_the_seal_before_the_name(tmp_path, monkeypatch):
    done, fsync, rename = [], os.fsync, os.rename

    def note_fsync(number: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        fsync(number)

    def note_rename(old: Path, new: Path) -> None:
        done.append("renamed")
        rename(old, new)

    save(tmp_path, 7)
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    save(tmp_path, 8)
    tensors, values, seal, folder, renamed, parent = done
    assert (tensors, values, seal) == (checkpoint.TENSORS, checkpoint.VALUES, checkpoint.SEAL)
    assert folder.startswith("step-00000008.")
    assert (renamed, parent) == ("renamed", tmp_path.name)


# ---- damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def swap_with_the_older_one(path: Path) -> None:
    shutil.copyfile(path.parents[1] / "step-00000007" / path.name, path)


FILES = [checkpoint.TENSORS, checkpoint.VALUES, checkpoint.SEAL]
DAMAGES = {
    **{f"no {name}": lambda folder, name=name: (folder / name).unlink() for name in FILES},
    **{f"a bit of {name}": lambda folder, name=name: flip(folder / name) for name in FILES},
    **{f"the end of {name}": lambda folder, name=name: cut(folder / name) for name in FILES},
    **{f"another step's {name}": lambda folder, name=name: swap_with_the_older_one(folder / name) for name in FILES},
    "another step's folder": lambda folder: (shutil.rmtree(folder), shutil.copytree(folder.parent / "step-00000007", folder)),
    "an empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "a file in its place": lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(damage, tmp_path, caplog):
    checkpoints = save(tmp_path, 7, 12)
    DAMAGES[damage](tmp_path / "step-00000012")
    state = checkpoints.load()
    assert (state.step, state.values["seen"], float(state.tensors["weight"][0])) == (7, 7, pytest.approx(7 / 3))
    assert "damaged checkpoint" in caplog.text
    assert "step-00000012" in caplog.text
    assert "the one before it is tried" in caplog.text


def test_where_all_are_damaged_the_training_starts_from_nothing_and_says_so(tmp_path, caplog):
    checkpoints = save(tmp_path, 7, 12)
    cut(tmp_path / "step-00000007" / checkpoint.TENSORS)
    flip(tmp_path / "step-00000012" / checkpoint.VALUES)
    assert checkpoints.load() is None
    assert "step-00000007" in caplog.text
    assert "the training starts from nothing" in caplog.text


def test_a_half_written_one_is_not_looked_at_and_goes(tmp_path, caplog):
    checkpoints = save(tmp_path, 7)
    shutil.copytree(tmp_path / "step-00000007", tmp_path / "step-00000012.0123.tmp")
    assert checkpoints.load().step == 7
    assert names(tmp_path) == {"step-00000007"}
    assert not caplog.text


def test_the_next_save_removes_what_is_damaged_so_that_two_whole_ones_stay(tmp_path):
    checkpoints = save(tmp_path, 7, 12)
    cut(tmp_path / "step-00000012" / checkpoint.SEAL)
    assert checkpoints.load().step == 7
    save(tmp_path, 8)
    assert names(tmp_path) == {"step-00000007", "step-00000008"}


def test_another_number_of_processes_is_refused_with_both_numbers_and_a_remedy(tmp_path, monkeypatch):
    from tasks import distributed

    monkeypatch.setattr(distributed, "_world", distributed.World(rank=0, size=4))
    monkeypatch.setattr(distributed, "agreed", lambda value: value)
    monkeypatch.setattr(distributed, "anywhere", lambda flag: flag)
    checkpoints = save(tmp_path, 7)
    monkeypatch.setattr(distributed, "_world", distributed.World())
    with pytest.raises(ValueError, match=r"step 7 is of 4 processes, and this run has 1: run with 4 .*or remove that folder"):
        checkpoints.load()
    assert names(tmp_path) == {"step-00000007"}


def test_a_full_disk_is_a_warning_and_leaves_the_older_one(tmp_path, monkeypatch, caplog):
    checkpoints = save(tmp_path, 7)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_durably", full)
    checkpoints.after_step(8, lambda: ({}, {}))
    assert "no checkpoint of step 8" in caplog.text
    assert names(tmp_path) == {"step-00000007"}


# ---- randomness and the optimizer


def test_what_is_drawn_hangs_on_seed_step_and_rank_and_on_nothing_before(monkeypatch):
    def draw(seed: int, step: int) -> list[float]:
        torch.rand(step + 3)  # whatever was drawn before
        seed_step(seed, step)
        return torch.rand(4).tolist()

    first = draw(1, 5)
    assert draw(1, 5) == first
    assert draw(1, 6) != first
    assert draw(2, 5) != first
    monkeypatch.setattr(checkpoint.distributed, "_world", checkpoint.distributed.World(rank=1, size=2))
    assert draw(1, 5) != first


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(3)
    return [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(4))]


def steps(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        for weight in weights:
            weight.grad = torch.full_like(weight, 0.1 * step) + weight.detach()
        optimizer.step()


def test_an_optimizer_that_is_saved_and_loaded_goes_on_to_the_same_bits(tmp_path):
    whole = parameters()
    steps(optim.adamw(whole, 0.01, 0.1), whole, 0, 6)
    half = parameters()
    optimizer = optim.adamw(half, 0.01, 0.1)
    steps(optimizer, half, 0, 3)
    checkpoints = Checkpoints(tmp_path, every_seconds=0)
    checkpoints.after_step(3, lambda: ({"0": half[0], "1": half[1], **optimizer_state(optimizer)}, {}))
    state = checkpoints.load()
    again = [torch.nn.Parameter(state.tensors[name]) for name in "01"]
    optimizer = optim.adamw(again, 0.01, 0.1)
    load_optimizer(optimizer, state.tensors)
    steps(optimizer, again, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    other = [torch.nn.Parameter(torch.randn(3, 5)), torch.nn.Parameter(torch.randn(4))]
    with pytest.raises(ValueError, match="not one of this model"):
        load_optimizer(optim.adamw(other, 0.01, 0.1), state.tensors)


# ---- SIGTERM


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)  # Python hears it between two of its own instructions


def deferred(work) -> None:
    with interrupt.deferring():
        work()


def test_sigterm_saves_at_the_next_boundary_and_ends_there(tmp_path):
    checkpoints, before = Checkpoints(tmp_path), signal.getsignal(signal.SIGTERM)
    done = []

    def work():
        for step in (1, 2, 3):
            if step == 2:
                terminate()
            done.append(step)
            checkpoints.after_step(step, lambda: ({}, {"done": list(done)}))

    with pytest.raises(Interrupted, match="saved at step 2"):
        deferred(work)
    assert done == [1, 2]
    assert checkpoints.load().values == {"done": [1, 2]}
    assert signal.getsignal(signal.SIGTERM) == before
    assert not interrupt.asked()


def test_an_interruption_is_no_failure_that_somebody_would_catch():
    assert not issubclass(Interrupted, Exception)


def test_two_signals_at_the_same_time_are_one(tmp_path):
    """Who ends a process group signals the parent, which passes it on, and the child."""
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(Interrupted, match="saved at step 1"):
        deferred(lambda: (terminate(), terminate(), checkpoints.after_step(1, lambda: ({}, {}))))


def test_a_second_sigterm_ends_at_once(monkeypatch):
    monkeypatch.setattr(interrupt, "ECHO_SECONDS", 0.0)
    reached = []
    with pytest.raises(Interrupted, match="without waiting"):
        deferred(lambda: (terminate(), terminate(), reached.append(1)))
    assert not reached


def test_a_step_that_comes_to_no_boundary_is_ended(monkeypatch):
    monkeypatch.setattr(interrupt, "GRACE_SECONDS", 0.1)
    reached = []
    with pytest.raises(Interrupted, match="without waiting"):
        deferred(lambda: (terminate(), threading.Event().wait(30), reached.append(1)))
    assert not reached


def test_slow_steps_get_twice_their_time(monkeypatch):
    monkeypatch.setattr(interrupt, "GRACE_SECONDS", 0.1)

    def work():
        interrupt.boundary()
        time.sleep(0.3)
        interrupt.boundary()
        terminate()
        time.sleep(0.35)

    with pytest.raises(Interrupted, match="the step came to its end"):
        deferred(work)


def test_a_step_that_ends_before_a_boundary_hands_the_signal_on_to_whoever_listened_before():
    class TerminationSignal(BaseException):
        """As Prefect's."""

    def listen(number, frame):
        raise TerminationSignal

    before = signal.signal(signal.SIGTERM, listen)
    finished = []
    try:
        with pytest.raises(TerminationSignal) as caught:
            deferred(lambda: (terminate(), finished.append(1)))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert finished
    assert isinstance(caught.value.__context__, Interrupted)


def test_without_a_folder_sigterm_still_ends_the_training():
    with pytest.raises(Interrupted, match="no checkpoint is kept"):
        deferred(lambda: (terminate(), Checkpoints().after_step(1, lambda: ({}, {}))))


def test_outside_the_main_thread_nothing_changes():
    heard = []

    def work():
        before = signal.getsignal(signal.SIGTERM)
        with interrupt.deferring():
            heard.append(signal.getsignal(signal.SIGTERM) == before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert heard == [True]


def test_the_seal_names_every_file_with_its_digest(tmp_path):
    import subprocess

    save(tmp_path, 7)
    folder = tmp_path / "step-00000007"
    seal = json.loads((folder / checkpoint.SEAL).read_text())
    assert set(seal) == names(folder) - {checkpoint.SEAL}
    for name, digest in seal.items():
        told = subprocess.run(["sha256sum", str(folder / name)], capture_output=True, text=True, check=True).stdout
        assert told.split()[0] == digest
