"""Work side by side: the same results in the same order, progress heard here, and no call that fails goes unnoticed."""

import os
import signal
import time
from pathlib import Path

import pytest

from tasks import interrupt
from tasks.processes import side_by_side
from tasks.progress import Progress, Update, listening


def work(number: int) -> tuple[int, int]:
    Progress("test")(number, 3, phase="work")
    return number * number, os.getpid()


def fail(number: int) -> None:
    raise ValueError(f"number {number} is wrong")


class OddError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def fail_oddly(number: int) -> None:
    raise OddError("this", "that")


def make_a_function(number: int) -> object:
    return lambda: number


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("processes", [1, 2])
def test_results_keep_their_order_and_progress_is_heard_here(processes):
    heard: list[Update] = []
    with listening(heard.append):
        results = side_by_side(work, [(1,), (2,), (3,)], processes)
    assert [square for square, _ in results] == [1, 4, 9]
    assert ({pid for _, pid in results} == {os.getpid()}) == (processes == 1)
    assert sorted(update.done for update in heard) == [1, 2, 3]


@pytest.mark.parametrize("processes", [1, 2])
def test_what_a_call_raises_is_raised_here(processes):
    with pytest.raises(ValueError, match="number 1 is wrong"):
        side_by_side(fail, [(1,)], processes)


def test_a_killed_process_is_told():
    with pytest.raises(RuntimeError, match="killed, often for want of memory"):
        side_by_side(die, [(1,), (2,)], 2)


def test_what_cannot_travel_between_processes_is_told():
    with pytest.raises(RuntimeError, match="OddError: this and that"):
        side_by_side(fail_oddly, [(1,), (2,)], 2)
    with pytest.raises(Exception, match=r"make_a_function.*lambda"):
        side_by_side(make_a_function, [(1,), (2,)], 2)


def test_workers_that_cannot_start_end_the_run(monkeypatch, capfd):
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    with pytest.raises(RuntimeError, match="end before their first task"):
        side_by_side(work, [(1,), (2,)], 2)
    capfd.readouterr()


def train(folder: str, number: int) -> int:
    """Steps for ever, until it is told to end."""
    for step in range(1, 3000):
        time.sleep(0.01)
        Progress(f"training {number}")(step, 3000)
        if interrupt.asked():
            time.sleep(0.2 * number)  # to the boundary
            (Path(folder) / str(number)).touch()
            raise interrupt.Interrupted("saved")
    return number


def test_sigterm_lets_every_process_of_a_training_come_to_a_boundary_and_save(tmp_path):
    heard, sent = set(), []

    def terminate(update: Update) -> None:
        heard.add(update.step)
        if len(heard) == 2 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    with pytest.raises(interrupt.Interrupted, match="saved"), listening(terminate), interrupt.deferring():
        side_by_side(train, [(str(tmp_path), number) for number in range(3)], 2)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}  # the third was not begun


def test_sigterm_when_all_processes_have_done_their_work_loses_nothing():
    heard = []

    def terminate(update: Update) -> None:
        heard.append(update)
        if len(heard) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    results = []
    with pytest.raises(interrupt.Interrupted, match="came to its end"), listening(terminate), interrupt.deferring():
        results = side_by_side(work, [(1,), (2,)], 2)
    assert [square for square, _ in results] == [1, 4]
