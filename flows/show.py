"""What the terminal shows: a line per step while it runs, tables at the end; plain lines where there is no terminal."""

import logging
import time
from collections.abc import Sequence
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from tasks.artifacts import Manifest, Store
from tasks.progress import Pace, Update, in_words
from tasks.step import Event

PLAIN_SECONDS = 15.0
"""Between two lines of progress where there is no terminal."""
HEADLINES = {
    "ingest": ("questions", "pairs"),
    "base": ("loss", "parameters"),
    "sft": ("base_loss", "loss"),
    "reward": ("accuracy", "best_baseline"),
    "ppo": ("score_before", "score_after", "kl"),
    "evaluate": ("verdict", "gain"),
    "promote": ("word", "moved"),
}


def console(file: IO[str]) -> Console:
    """At least 120 columns where the output goes to a file or a pipe: rich would cut at 80."""
    return Console(file=file, highlight=False, width=None if file.isatty() else 160)


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def bytes_text(count: int) -> str:
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def headline(manifest: Manifest) -> str:
    """The number of a step that one looks at first."""
    metrics = manifest.metrics
    names = [name for name in HEADLINES.get(manifest.step, ()) if name in metrics] or list(metrics)[:2]
    return "  ".join(f"{name} {plain(value)}" for name in names if (value := metrics[name]) is not None)


def plain(value: Any) -> str:
    """A metric or a setting."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def printable(text: str) -> str:
    """What a dump or a model says must not steer the terminal: escapes and marks of direction are shown as what they are."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def numbers(manifest: Manifest | None, store: Store | None) -> dict[str, Any]:
    """What --json says of every artifact; without a store the manifest is only of its like."""
    return {
        "seconds": manifest.seconds if manifest else None,
        "peak_memory_bytes": manifest.peak_memory_bytes if manifest else None,
        "metrics": dict(manifest.metrics) if manifest and store else {},
        "uri": store.artifact(manifest).uri if manifest and store else None,
    }


def gain_text(verdict: dict[str, Any]) -> str:
    """A verdict or a comparison with its interval: better (gain +0.120, interval +0.010 to +0.230, by true)."""
    low, high = verdict["interval"]
    return f"{verdict['word']} (gain {verdict['gain']:+.3f}, interval {low:+.3f} to {high:+.3f}, by {verdict['by']})"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    made = Table(
        title=escape(title) or None, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for column in columns:
        made.add_column(
            column,
            header_style="bold",
            justify="right" if column in {"time", "memory", "disk", "size", "rows", "line", "offset"} else "left",
            overflow="fold",
        )
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    return made


class Live:
    """Listens to steps and their progress, and shows them on standard error."""

    def __init__(self, file: IO[str] | None = None):
        self._console = Console(stderr=True, highlight=False) if file is None else Console(file=file, highlight=False)
        self._fancy = self._console.is_terminal
        self._tasks: dict[str, TaskID] = {}
        self._phase = ("", "")
        self._pace: dict[str, Pace] = {}
        self._printed = 0.0
        self._bars = Progress(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.fields[step]:8}", table_column=Column(min_width=8)),
            TextColumn("{task.fields[state]:7}", table_column=Column(min_width=7)),
            BarColumn(bar_width=16, table_column=Column(min_width=16)),
            TimeElapsedColumn(table_column=Column(min_width=7)),
            TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=self._console,
            expand=True,
        )

    def __enter__(self) -> "Live":
        if self._fancy:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._idle()
        if self._fancy:
            self._bars.stop()

    def line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def busy(self, text: str) -> None:
        """Something before the first step."""
        if self._fancy:
            self._tasks["-"] = self._bars.add_task("", total=None, step="", state="", text=text)

    def _idle(self) -> None:
        if "-" in self._tasks:
            self._bars.remove_task(self._tasks.pop("-"))

    def event(self, event: Event) -> None:
        self._idle()
        step, outcome = event.step, event.outcome
        took = f" {duration(outcome.manifest.seconds)}" if event.state == "ran" and outcome else ""
        if not self._fancy:
            self.line(f"{step}: {event.state}{took}")
            return
        if step not in self._tasks:
            self._tasks[step] = self._bars.add_task("", total=None if event.state == "running" else 1, step=step, state="", text="")
        done = {} if event.state == "running" else {"total": 1, "completed": 1 if event.state != "failed" else 0}
        self._bars.update(self._tasks[step], state=event.state, **done)  # type: ignore[arg-type]
        if event.state == "failed":
            self._bars.stop_task(self._tasks[step])

    def update(self, update: Update) -> None:
        if update.note:
            self.line(f"{update.step}: {update.note}")
            return
        pace = self._pace.setdefault(update.step, Pace())
        pace.hear(update)
        left = f"  {in_words(seconds)} left" if (seconds := pace.left()) else ""
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in list(update.metrics.items())[:4])
        text = f"{update.phase} {update.done}/{update.total}{left}  {numbers}".rstrip()
        if self._fancy:
            if update.step in self._tasks:
                self._bars.update(self._tasks[update.step], total=update.total or None, completed=update.done, text=text)
        elif (update.step, update.phase) != self._phase or time.monotonic() - self._printed > PLAIN_SECONDS:
            self._phase, self._printed = (update.step, update.phase), time.monotonic()
            self.line(f"{update.step}: {text}")

    def handler(self) -> logging.Handler:
        """Our warnings, and errors of others, as lines above the bars."""
        live = self

        class Handler(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                if record.name.startswith(("tasks", "flows")) or record.levelno >= logging.ERROR:
                    live.line(f"{record.levelname.lower()}: {record.getMessage()}")

        return Handler(logging.WARNING)
