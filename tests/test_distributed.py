"""Several processes: what each gets and what comes together, how they end, and how they begin again. By gloo on the loopback."""

import contextlib
import dataclasses
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from tasks import distributed, interrupt
from tasks.checkpoint import Checkpoints, load_optimizer, optimizer_state
from tasks.compute import Compute
from tasks.distributed import World, launch
from tasks.interrupt import Interrupted
from tasks.progress import Progress, Update, listening

ROOT = Path(__file__).parents[1]
TWO = Compute(device="cpu", threads=1, processes=2)
STEPS = 12
KILLED, TERMINATED = 2, 4
WIDTH = 5


def test_one_process_shares_nothing():
    import torch

    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([1.0, 2.0])
    distributed.sum_gradients([weight])
    assert weight.grad.tolist() == [1.0, 2.0]
    assert distributed.world() == World()
    assert distributed.mine("abc") == ["a", "b", "c"] == distributed.gather(["a", "b", "c"], 3)
    assert (distributed.rounds(3), distributed.any_of(False), distributed.anywhere(True), distributed.agreed(7)) == (
        3,
        False,
        True,
        7,
    )
    assert launch(os.getpid, Compute()) == os.getpid()


# ---- what the ranks do together


def together(out: Path, progress: Progress) -> dict:
    """Everything that two ranks can tell each other; each rank's view, gathered."""
    import torch

    world = distributed.world()
    progress(1, 1)
    logging.getLogger("tasks.test").warning("rank %d warns", world.rank)
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(1))]
    parameters[0].grad = torch.full((2, 3), 10.0**world.rank)
    if world.rank == 1:
        parameters[1].grad = torch.arange(4.0)
    distributed.sum_gradients(parameters)
    seen = {
        "pid": os.getpid(),
        "world": world,
        "mine": distributed.mine(list("abcdefg")),
        "gathered": distributed.gather([(one, world.rank) for one in distributed.mine(range(7))], 7),
        "few": distributed.gather(distributed.mine(["x"]), 1),
        "agreed": distributed.agreed(f"rank {world.rank}"),
        "anywhere": (distributed.anywhere(world.rank == 1), distributed.anywhere(False)),
        "total": distributed.total(torch.tensor([1.0, world.rank])).tolist(),
        "gradients": [None if p.grad is None else p.grad.tolist() for p in parameters],
        "rounds": (distributed.rounds(3 + world.rank), distributed.any_of(world.rank == 0)),
        "out": str(out),
        "threads": torch.get_num_threads(),
    }
    distributed._world = dataclasses.replace(world, sharded=True)
    seen["sharded"] = distributed.rounds(3 + world.rank), distributed.any_of(world.rank == 0), distributed.any_of(False)
    distributed._world = world
    return dict(zip(("zero", "one"), distributed.gather([seen], 2), strict=True))


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    heard: list[Update] = []
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("tasks.test").addHandler(handler)
    with listening(heard.append):
        views = launch(together, TWO, out=tmp_path_factory.mktemp("out"), progress=Progress("test"))
    logging.getLogger("tasks.test").removeHandler(handler)
    return views["zero"], views["one"], heard, warned


def test_each_item_has_one_rank_and_the_results_come_back_in_their_order(views):
    zero, one, *_ = views
    assert zero["mine"] == ["a", "c", "e", "g"]
    assert one["mine"] == ["b", "d", "f"]
    assert zero["gathered"] == one["gathered"] == [(number, number % 2) for number in range(7)]
    assert zero["few"] == one["few"] == ["x"]


def test_sums_and_decisions_are_the_same_on_every_rank(views):
    zero, one, *_ = views
    assert zero["total"] == one["total"] == [2.0, 1.0]
    assert zero["agreed"] == one["agreed"] == "rank 0"
    assert zero["anywhere"] == one["anywhere"] == (True, False)


def test_a_gradient_that_one_rank_lacks_counts_as_zero_and_one_that_all_lack_stays_none(views):
    for view in views[:2]:
        assert view["gradients"] == [[[11.0] * 3] * 2, [0.0, 1.0, 2.0, 3.0], None]


def test_only_a_sharded_model_keeps_the_ranks_in_step(views):
    zero, one, *_ = views
    assert (zero["rounds"], one["rounds"]) == ((3, True), (4, False))
    assert zero["sharded"] == one["sharded"] == (4, True, False)


def test_other_ranks_write_into_a_folder_of_their_own_and_only_rank_0_is_heard(views):
    zero, one, heard, warned = views
    assert zero["world"] == World(0, 2)
    assert one["world"] == World(1, 2, local_rank=1)
    assert len({os.getpid(), zero["pid"], one["pid"]}) == 3
    assert zero["out"] != one["out"]
    assert not Path(one["out"]).exists()
    assert [update.done for update in heard] == [1]
    assert warned == ["rank 0 warns"]


# ---- how they end


def train(progress: Progress, checkpoints: Checkpoints, diary: Path, killed: Path | None = None) -> list[list[float]]:
    """A training in small: rows shared, gradients summed, a checkpoint after every step; `killed`: rank 1 dies there, once.

    The weights after each step, to compare.
    """
    import torch

    rank = distributed.world().rank
    rows = torch.randn(STEPS, 6, WIDTH, generator=torch.Generator().manual_seed(0))
    weight = torch.nn.Parameter(torch.ones(WIDTH))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    first, history = 0, []
    if (state := checkpoints.load()) is not None:
        first, weight.data = state.step, state.tensors["weight"]
        load_optimizer(optimizer, state.tensors)
    with diary.open("a") as file:
        file.write(f"{rank} from {first}\n")
    for step in range(first, STEPS):
        optimizer.zero_grad()
        if killed is not None and rank == 1 and step == KILLED and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        sum(((row @ weight) ** 2 for row in distributed.mine(rows[step])), torch.zeros(())).backward()
        distributed.sum_gradients([weight])
        optimizer.step()
        progress(step + 1, STEPS)
        time.sleep(0.02)  # the signal needs a moment
        checkpoints.after_step(step + 1, lambda: ({"weight": weight, **optimizer_state(optimizer)}, {}))
        history.append(weight.tolist())
    return history


def test_a_killed_rank_starts_all_anew_and_sigterm_saves_with_the_weights_of_one_process(tmp_path):
    from safetensors.torch import load_file

    undisturbed = train(Progress("test"), Checkpoints(), tmp_path / "alone")
    checkpoints, diary = Checkpoints(tmp_path / "kept", 0.0), tmp_path / "diary"
    work = {"progress": Progress("test"), "checkpoints": checkpoints, "diary": diary, "killed": tmp_path / "killed"}
    notes: list[str] = []

    def hear(update: Update) -> None:
        if update.note:
            notes.append(update.note)
        elif update.done == TERMINATED:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # whoever listened before us is told at the end
    try:
        with listening(hear), pytest.raises(Interrupted, match="saved at step"), interrupt.deferring():
            launch(train, TWO, **work)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert notes == ["rank 1 was killed, often for want of memory; all ranks go on from the last checkpoint"]
    starts = [int(line.split()[-1]) for line in diary.read_text().splitlines()]
    assert starts[:2] == [0, 0]
    assert starts[2] == starts[3] >= KILLED - 1

    with pytest.raises(ValueError, match="is of 2 processes, and this run has 1"):
        checkpoints.load()  # in one process
    step = max(int(folder.name.removeprefix("step-")) for folder in checkpoints.folder.glob("step-*"))
    assert TERMINATED <= step < STEPS
    saved = load_file(next(checkpoints.folder.glob(f"step-*{step}/*.safetensors")))["weight"].tolist()
    assert saved == pytest.approx(undisturbed[step - 1], abs=1e-6)


def fail(progress: Progress) -> None:
    import torch

    if distributed.world().rank == 1:
        raise ValueError(f"number 1 is wrong, {interrupt.asked()=}")
    distributed.total(torch.zeros(1))  # waits for a rank that will never come


def test_what_one_rank_raises_ends_all_and_is_raised_here_with_its_rank():
    """On the way: SIGTERM in a rank's first moments does not kill it, and is heard when it can be."""
    notes: list[str] = []
    newborn = threading.Thread(target=_terminate_newborn, args=(2,))
    newborn.start()
    with (
        listening(lambda update: notes.append(update.note)),
        pytest.raises(ValueError, match=re.escape("number 1 is wrong, interrupt.asked()=True (rank 1)")),
    ):
        launch(fail, TWO, progress=Progress("test"))
    newborn.join()
    assert notes == []


def _terminate_newborn(count: int) -> None:
    """SIGTERM to each of the next `count` ranks that this process starts, as soon as there is one."""
    told: set[int] = set()
    while len(told) < count:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if child.pid not in told and "tasks.rank" in " ".join(child.cmdline()):
                    child.send_signal(signal.SIGTERM)
                    told.add(child.pid)
        time.sleep(0.01)


def wait_for_ever(told: Path) -> None:
    (told / str(os.getpid())).touch()
    time.sleep(600)


def test_no_rank_outlives_who_launched_it(tmp_path):
    code = (
        "from pathlib import Path; from tests.test_distributed import TWO, wait_for_ever; from tasks.distributed import launch; "
        f"launch(wait_for_ever, TWO, told=Path({str(tmp_path)!r}))"
    )
    scratch = Path(tempfile.mkdtemp())  # not tmp_path: the path of a socket may not be long
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TMPDIR": str(scratch)})
    try:
        _until(lambda: len(list(tmp_path.iterdir())) == 2 or parent.poll() is not None)
    finally:
        parent.kill()
        parent.wait()
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    _until(lambda: not any(map(_alive, pids)))
    assert not list(scratch.glob("stackrlhf-*"))
    shutil.rmtree(scratch)


def _until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# ---- several machines: two processes that know each other only by host and port


def over_there(progress: Progress) -> None:
    world = distributed.world()
    progress.note(f"{world} {distributed.gather([number * number for number in distributed.mine(range(5))], 5)}")
    if world.rank == 1:
        raise ValueError("the disk of machine 1 is full")
    distributed.anywhere(False)  # waits for a rank that will never come


def machine(number: int, port: int) -> None:
    """Started by the test below, once a machine."""
    compute = Compute(device="cpu", threads=1, machines=2, machine_rank=number, rendezvous=f"127.0.0.1:{port}")
    try:
        with listening(lambda update: print(update.note, flush=True)):
            launch(over_there, compute, progress=Progress("test"))
    except ValueError as error:
        print(error, flush=True)


def test_two_machines_share_the_work_and_an_error_of_one_ends_both():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from tests.test_distributed import machine; machine({}, {})"
    machines = [
        subprocess.Popen([sys.executable, "-c", code.format(number, port)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for number in (0, 1)
    ]
    try:
        said = [one.communicate(timeout=100)[0].splitlines() for one in machines]
    finally:
        for one in machines:
            one.kill()
    assert said[0] == [f"{World(0, 2)} [0, 1, 4, 9, 16]", "the disk of machine 1 is full (rank 1) (machine 1)"]
    assert said[1] == ["the disk of machine 1 is full (rank 1)"]


# ---- what cannot be


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"machines": 2}, "needs compute.rendezvous=host:port"),
        ({"machines": 2, "machine_rank": 2, "rendezvous": "a:1"}, "the last is 1"),
        ({"rendezvous": "somewhere"}, "is not host:port"),
        ({"strategy": "fsdp"}, "set compute.processes"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(given, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        Compute(**given)


def test_the_command_refuses_them_in_one_line(capsys):
    from flows.cli import main

    assert main(["run", "--machines", "2", "--machine-rank", "1"]) == 2
    assert main(["run", "--checkpoint-seconds", "-1"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "compute.rendezvous=host:port" in first
    assert "checkpoint_seconds: Input should be greater than or equal to 0" in second
