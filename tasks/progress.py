"""How a step tells that it is alive. Whoever wants to show it (command, dashboard) listens; nobody has to."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """One moment of a step: `done` of `total` in `phase`, with the newest metrics; or a `note`, a line of text."""

    step: str
    phase: str = ""
    done: int = 0
    total: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    note: str = ""


Listener = Callable[[Update], None]
_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Every update made in this process inside the `with` goes to `listener` too."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def hear(update: Update) -> None:
    """Pass an update to every listener of this process."""
    for listener in tuple(_listeners):
        try:
            listener(update)
        except Exception:  # a broken display must not cost a training run
            logger.warning("a progress listener failed", exc_info=True)


@dataclass(frozen=True)
class Progress:
    """A step's voice: `progress(done, total, phase="train", loss=2.3)` and `progress.note("...")`."""

    step: str

    def __call__(self, done: int, total: int, phase: str = "", **metrics: float) -> None:
        hear(Update(self.step, phase, done, total, metrics))

    def note(self, text: str) -> None:
        logger.info("%s: %s", self.step, text)
        hear(Update(self.step, note=text))
