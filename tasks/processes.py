"""Independent pieces of one step side by side, each in a process of its own; their progress is heard here as if they ran here."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from tasks.progress import Update, hear, listening


def side_by_side(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], processes: int) -> list[Any]:
    """[function(*a) for a in arguments], at most `processes` at once; with one process, here and one after the other.

    `function` is a module's own, and arguments and results can be pickled. What a call raises is raised here, and the others are
    ended. RuntimeError where a process is killed.
    """
    if processes <= 1:
        return [function(*one) for one in arguments]
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads, and hang
    results: list[Any] = [None] * len(arguments)
    waiting = list(range(len(arguments)))
    running: dict[Any, tuple[int, Any]] = {}  # connection -> number of the call and its process
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                number = waiting.pop(0)
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(there, function, arguments[number]), daemon=True)
                process.start()
                there.close()
                running[here] = (number, process)
            for connection in cast(list[Connection], wait(list(running))):
                number, process = running[connection]
                try:
                    kind, value = connection.recv()
                except EOFError:
                    process.join()
                    what = "killed, often for want of memory" if process.exitcode == -9 else f"exit code {process.exitcode}"
                    raise RuntimeError(f"a process of this step ended before its work was done ({what})") from None
                if kind == "update":
                    hear(value)
                elif kind == "raised":
                    raise value
                else:
                    results[number] = value
                    del running[connection]
                    process.join()
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()
    return results


def _work(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    def tell(update: Update) -> None:
        try:
            connection.send(("update", update))
        except OSError:
            os._exit(1)  # whoever waits for the result is gone

    with listening(tell):
        try:
            result = ("done", function(*arguments))
        except Exception as error:
            result = ("raised", error)
    connection.send(result)
