"""The page of a whole run on the dashboard: every step with its cost and headline number, lineage, verdict, decision, report.

One Markdown artifact on the parent flow run, written again whenever a step begins or ends. Best effort, from a daemon thread:
nothing here raises, and an API that is away costs the run nothing.
"""

import contextvars
import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import FlowRunContext

from flows.presets import STEPS, RLHFConfig, Step
from flows.show import bytes_text, duration, headline
from tasks import pages
from tasks.artifacts import Artifact, Identity, Manifest, Store
from tasks.dashboard import Shown, report_link

logger = logging.getLogger(__name__)

KEY = "rlhf-overview"
LOOK_SECONDS = 15.0
"""Between two looks at what a running step's job is; the page is sent only when it has changed."""
LAST_WORDS_SECONDS = 1.5

State = Literal["waiting", "running", "stored", "ran", "failed"]
WORDS = {"better": "Better", "no-evidence": "No evidence", "worse": "Worse"}


@dataclass(frozen=True)
class Line:
    """A step as the page tells it."""

    state: State = "waiting"
    job: UUID | None = None
    """The flow run of its job, where it has one."""
    artifact: Artifact | None = None
    manifest: Manifest | None = None
    report: str = ""
    """Address of its report."""


class Overview:
    """Told of a run's steps one by one; `close` waits 1.5 s for the last page at most."""

    def __init__(self, config: RLHFConfig, store: Store, plan: Mapping[Step, Identity]):
        self.config, self.store, self.plan = config, store, plan
        self._lines: dict[Step, Line] = {step: Line() for step in STEPS}
        self._changed, self._closed = threading.Event(), False
        self._told: dict[str, Any] = {}
        self._thread: threading.Thread | None = None
        self._flow_run = context.flow_run if (context := FlowRunContext.get()) else None
        if self._flow_run is not None:
            inside = contextvars.copy_context()
            self._thread = threading.Thread(target=lambda: inside.run(self._work), daemon=True, name="overview")
            self._thread.start()

    def begin(self, step: Step) -> None:
        self._set(step, Line("running"))

    def end(self, step: Step, artifact: Artifact | None, state: Literal["stored", "ran", "failed"]) -> None:
        self._set(step, Line(state, self._lines[step].job, artifact))

    def close(self) -> None:
        self._closed = True
        self._changed.set()
        if self._thread is not None:
            self._thread.join(LAST_WORDS_SECONDS)

    def _set(self, step: Step, line: Line) -> None:
        self._lines[step] = line
        self._changed.set()

    # -- in the thread

    def _work(self) -> None:
        shown = Shown(KEY, "markdown", of_flow_run=True)
        while True:
            self._changed.wait(LOOK_SECONDS)
            self._changed.clear()
            closed = self._closed
            try:
                self._look_up()
                text = pages.bounded(pages.without_secrets(self.page()))
                shown.show(text, pages.without_secrets(self.line()))
            except Exception as error:
                logger.debug("the overview was not written: %s", error)
            if closed:
                return

    def _look_up(self) -> None:
        """What the store and the server know of the steps that ended."""
        jobs = self._jobs()
        for step, line in tuple(self._lines.items()):
            job = line.job or jobs.get(step)
            manifest, report = line.manifest, line.report
            if line.artifact is not None and manifest is None:
                manifest = self.store.find(self.plan[step])
                report = report_link(step, line.artifact.key)
            new = Line(line.state, job, line.artifact, manifest, report)
            if self._lines[step] is line:  # else it went on meanwhile, and this runs again
                self._lines[step] = new
        for step, file in (("evaluate", "verdict.json"), ("promote", "decision.json")):
            artifact = self._lines[step].artifact
            if artifact is not None and step not in self._told:
                folder = self.store.open(artifact)
                self._told[step] = json.loads((folder / file).read_text(encoding="utf-8"))
                if step == "evaluate":
                    self._told["report"] = pages.report_place(artifact.key, str(folder / "report.html"))

    def _jobs(self) -> dict[str, UUID]:
        """The newest job of each step, where steps are flow runs of their own."""
        assert self._flow_run is not None
        with get_client(sync_client=True) as client:
            mine = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[self._flow_run.id]))
            runs = client.read_flow_runs(flow_run_filter=mine, sort=FlowRunSort.START_TIME_ASC)
        return {run.name.split(" ")[0]: run.id for run in runs}

    # -- the page

    def line(self) -> str:
        """In one line, under the artifact's name."""
        return f"**{self.config.name}**: {self._verdict() or self._where()}"

    def page(self) -> str:
        name = self._flow_run.name if self._flow_run else self.config.name
        parts = [f"# {pages.escape(name)}", f"**{self._verdict() or self._where()}**"]
        if verdict := self._told.get("evaluate"):
            parts += [pages.escape(str(verdict["sentence"]))] if verdict.get("sentence") else []
            parts += [pages.escape(str(verdict["remark"]))] if verdict.get("remark") else []
            if (beside := verdict.get("champion")) and beside.get("sentence"):
                word = WORDS.get(beside.get("word"), str(beside.get("word")))
                parts.append(f"**Beside the champion: {word.lower()}.** {pages.escape(str(beside['sentence']))}")
        if decision := self._told.get("promote"):
            parts.append(f"**Champion.** {pages.escape(decision['reason'])}")
        if place := self._told.get("report"):
            parts.append(place)
        rows = [self._row(step) for step in STEPS if step in self.plan]
        parts += ["## Steps", pages.table(("step", "state", "look at", "time", "memory", "result"), rows, "lllrrl")]
        parts += ["## Lineage", pages.table(("step", "key", "made from"), [self._lineage(step) for step in STEPS])]
        parts.append(f"Store: {pages.code(self.store.uri)}")
        return "\n\n".join(parts) + "\n"

    def _row(self, step: Step) -> tuple[str, ...]:
        line, manifest = self._lines[step], self._lines[step].manifest
        job = f"[job](../../runs/flow-run/{line.job})" if line.job else ""
        live = f"[live](../../artifacts/key/{step}-live)" if line.state in {"running", "failed"} else ""
        report = f"[report]({line.report})" if line.report else ""
        took = duration(manifest.seconds) if manifest else ""
        return (
            f"**{step}**",
            line.state,
            " ".join(part for part in (report, live, job) if part),
            f"({took})" if took and line.state == "stored" else took,
            bytes_text(manifest.peak_memory_bytes) if manifest else "",
            _result(manifest) if manifest else "",
        )

    def _lineage(self, step: Step) -> tuple[str, str, str]:
        identity = self.plan[step]
        here = {name: one.key for name, one in self.plan.items()}
        origins = [
            name if here.get(name) == key else f"{pages.escape(name)} {pages.code(key[: pages.SHORT])}"  # type: ignore[call-overload]
            for name, key in identity.inputs.items()
        ]
        origins += [f"{pages.escape(name)} {pages.code(digest[: pages.SHORT])}" for name, digest in identity.external.items()]
        return f"**{step}**", pages.code(identity.key[: pages.SHORT]), ", ".join(origins)

    def _verdict(self) -> str:
        verdict = self._told.get("evaluate")
        if verdict is None:
            return ""
        low, high = verdict["interval"]
        word = WORDS.get(verdict["word"], str(verdict["word"]))
        return f"Verdict: {word} (gain {verdict['gain']:+.3f}, interval {low:+.3f} to {high:+.3f}, by {verdict['by']})"

    def _where(self) -> str:
        for step in STEPS:
            if self._lines[step].state in {"running", "failed"}:
                return f"{step} {'runs' if self._lines[step].state == 'running' else 'failed'}"
        done = [step for step in STEPS if self._lines[step].artifact is not None]
        return f"done up to {done[-1]}" if done else "nothing has run yet"


def _result(manifest: Manifest) -> str:
    """The headline numbers, two a line: a table's cells do not break."""
    numbers = [pages.escape(number) for number in headline(manifest).split("  ")]
    return "<br>".join(", ".join(numbers[place : place + 2]) for place in range(0, len(numbers), 2))
