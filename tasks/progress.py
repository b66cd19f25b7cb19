"""How a step tells that it is alive. Whoever wants to show it (command, dashboard) listens; nobody has to."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
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


# ---- how fast, and how long still

WINDOW_SECONDS = 60.0
"""The rate is that of the last minute, or of the last third of the phase where that is longer."""
MOST_POINTS = 256
PHASE_SILENT_SECONDS = 120.0
"""A phase that said nothing for so long, while another one did, is over."""

Point = tuple[float, int]
"""(seconds of a monotonic clock, done)"""


def seconds_each(points: Sequence[Point], window: float = WINDOW_SECONDS) -> float | None:
    """Seconds that one more takes, by the newest of these points of one phase; None until two of them differ.

    What was done before the first point does not count, so a run that goes on from a checkpoint is not taken to be fast.
    """
    if len(points) < 2 or points[-1][1] <= points[0][1]:
        return None
    last, done = points[-1]
    reach = last - max(window, (last - points[0][0]) / 3)
    start, begun = next(((when, n) for when, n in reversed(points) if when <= reach and n < done), points[0])
    return (last - start) / (done - begun)


def seconds_left(points: Sequence[Point], total: int, now: float, window: float = WINDOW_SECONDS) -> float | None:
    """Until a phase has done `total`; None as long as there is no rate. It shrinks between two points, by one unit at most."""
    each = seconds_each(points, window)
    if each is None:
        return None
    waited = max(0.0, now - points[-1][0])
    return max(0.0, (total - points[-1][1]) * each - min(waited, each))


@dataclass
class _Phase:
    total: int
    points: list[Point]

    def add(self, point: Point, total: int) -> None:
        if self.points and point[1] < self.points[-1][1]:
            self.points.clear()  # begun anew
        self.total = total
        if len(self.points) > 1 and point[1] == self.points[-1][1]:
            return
        self.points.append(point)
        if len(self.points) > MOST_POINTS:
            del self.points[1 : MOST_POINTS // 2 : 2]  # the older half, thinner


class Pace:
    """Hears the updates of one step and tells how fast its present phase goes and how long that still takes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._phases: dict[str, _Phase] = {}
        self._newest = ""
        self.started = clock()

    def hear(self, update: Update) -> None:
        if update.note or update.total <= 0:
            return
        now = self._clock()
        self._phases.setdefault(update.phase, _Phase(update.total, [])).add((now, update.done), update.total)
        self._newest = update.phase

    @property
    def elapsed(self) -> float:
        return self._clock() - self.started

    def each(self) -> float | None:
        """Seconds a unit of the present phase."""
        return seconds_each(self._phases[self._newest].points) if self._newest in self._phases else None

    def left(self) -> float | None:
        """Seconds until the present phase is over; the longest where several go on side by side."""
        now = self._clock()
        going = [
            phase
            for name, phase in self._phases.items()
            if phase.points and phase.points[-1][1] < phase.total
            and (name == self._newest or now - phase.points[-1][0] < PHASE_SILENT_SECONDS)
        ]  # fmt: skip
        found = [left for phase in going if (left := seconds_left(phase.points, phase.total, now)) is not None]
        return max(found) if found else None


def in_words(seconds: float) -> str:
    """A rough time for people: 8 s, 3 min 20 s, 2 h 05 min, 3 d 4 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest:02d} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"
