"""What Prefect's dashboard shows of a step: how far it is while it runs, a report when it is done.

Best effort, from a daemon thread: nothing here raises, and nothing waits for the API for long. An API that is away or hangs
must not cost a training run. While a step runs its page is one artifact, updated in place, so a week of training is one row of
the server's database.
"""

import contextvars
import logging
import threading
import time
from http import HTTPStatus
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.sorting import ArtifactSort
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import PrefectHTTPStatusError

from tasks import pages
from tasks.artifacts import Identity, Manifest
from tasks.progress import Update
from tasks.step import resident_bytes

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 2.0
SLOWEST_PROGRESS_SECONDS = 15.0
"""Between two looks at how far a step is: a hundredth of the time that it has run, within these bounds."""
LIVE_SECONDS = 10.0
"""Between two versions of the live page, which replace each other."""
LIVE_SHARE = 0.02
"""Of the process's time that drawing it may take."""
LOG_SECONDS = 15.0
LAST_WORDS_SECONDS = 1.5
"""How long a finished step waits for a dashboard that did not answer its last call."""
LAST_ANSWER_SECONDS = 6.0
"""How long for one that did."""


class Dashboard:
    """<step>-progress and <step>-live while a step runs, <step>-report when it is done."""

    def __init__(self, identity: Identity):
        self.step = identity.step
        self.live = pages.Live(self.step)
        self._inputs = identity.inputs
        self._links: dict[str, str] = {}
        self._finished: tuple[Manifest, Path] | None = None
        self._reached = False
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._logged = time.monotonic()

    def start(self) -> None:
        if TaskRunContext.get() is None:
            return
        context = contextvars.copy_context()  # the artifacts belong to this task run
        self._thread = threading.Thread(target=lambda: context.run(self._work), daemon=True, name=f"dashboard-{self.step}")
        self._thread.start()

    def listen(self, update: Update) -> None:
        if update.step != self.step:
            return
        self.live.hear(update)
        if not update.note and update.total > 0 and time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            logger.info("%s: %s", self.step, self.live.line())

    def finish(self, manifest: Manifest, folder: Path) -> None:
        """The step is stored: `close` shows its report."""
        self._finished = manifest, folder

    def close(self) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join(LAST_ANSWER_SECONDS if self._reached else LAST_WORDS_SECONDS)

    def _work(self) -> None:
        progress = Shown(f"{self.step}-progress", "progress")
        live = Shown(f"{self.step}-live", "markdown")
        next_live = 0.0
        while True:
            pause = min(SLOWEST_PROGRESS_SECONDS, max(PROGRESS_SECONDS, self.live.pace.elapsed / 100))
            done = self._done.wait(pause if progress.id else 0)
            try:
                if done and self._finished:
                    self._report(*self._finished)
                line = pages.without_secrets(f"**{self.step}**: {self._ended() if done else self.live.line()}")
                progress.show(100.0 if done and self._finished else self.live.percent, line)
                if done or time.monotonic() >= next_live:
                    began = time.thread_time()
                    page = self.live.page(resident_bytes(), state=self._ended() if done else "")
                    live.show(pages.bounded(pages.without_secrets(page)), line)
                    next_live = time.monotonic() + max(LIVE_SECONDS, (time.thread_time() - began) / LIVE_SHARE)
                self._links = self._links or {name: report_link(step_of(name), key) for name, key in self._inputs.items()}
                self._reached = True
            except Exception as error:
                self._reached = False
                logger.debug("the dashboard of %s was not reached: %s", self.step, error)
                if not done:
                    self._done.wait(PROGRESS_SECONDS)
            if done:
                return

    def _ended(self) -> str:
        return f"done in {pages.in_words(self.live.pace.elapsed)}" if self._finished else "ended without an artifact"

    def _report(self, manifest: Manifest, folder: Path) -> None:
        own = folder / "REPORT.md"
        text = own.read_text(encoding="utf-8") if own.is_file() else None
        more = ""
        if (page := folder / "report.html").is_file():
            more = pages.without_secrets(pages.report_place(manifest.key, str(page)))
        text = pages.bounded(pages.without_secrets(pages.report(manifest, text, self._links, more)))
        Shown(f"{self.step}-report", "markdown").show(text, described(manifest), {"key": manifest.key})
        if more:
            Shown("report", "markdown").show(more, f"The full report of **{manifest.step}** `{manifest.key[: pages.SHORT]}`")


class Shown:
    """One artifact of this task run, or of this flow run: made when it is first shown, then updated in place."""

    def __init__(self, key: str, kind: str, *, of_flow_run: bool = False):
        self.key, self.kind, self.of_flow_run = key, kind, of_flow_run
        self.id: UUID | None = None
        self._last: tuple[object, str] | None = None

    def show(self, data: str | float, description: str, metadata: dict[str, str] | None = None) -> None:
        if self._last == (data, description):
            return
        with get_client(sync_client=True) as client:
            if self.id is None and self.of_flow_run:
                self.id = self._earlier(client)
            if self.id is None:
                task, flow_run = TaskRunContext.get(), _flow_run_id()
                artifact = ArtifactCreate(
                    key=self.key, type=self.kind, data=data, description=description, metadata_=metadata, flow_run_id=flow_run,
                    task_run_id=task.task_run.id if task and not self.of_flow_run else None,
                )  # fmt: skip
                self.id = client.create_artifact(artifact).id
            else:
                try:
                    client.update_artifact(self.id, ArtifactUpdate(data=data, description=description))
                except PrefectHTTPStatusError as error:
                    if error.response.status_code == HTTPStatus.NOT_FOUND:
                        self.id = None  # the server lost its database, or somebody deleted it: made again next time
                    raise
        self._last = data, description

    def _earlier(self, client: SyncPrefectClient) -> UUID | None:
        """What an earlier attempt at the same flow run left."""
        flow_run = _flow_run_id()
        mine = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run] if flow_run else []))
        named = ArtifactFilter(key=ArtifactFilterKey(any_=[self.key]))
        found = client.read_artifacts(artifact_filter=named, flow_run_filter=mine, limit=1)
        return found[0].id if found else None


def _flow_run_id() -> UUID | None:
    task, flow = TaskRunContext.get(), FlowRunContext.get()
    return task.task_run.flow_run_id if task else flow.flow_run.id if flow and flow.flow_run else None


def described(manifest: Manifest) -> str:
    return f"Report of **{manifest.step}** `{manifest.key[: pages.SHORT]}`"


def step_of(name: str) -> str:
    """The step that made an input: evaluate reads the champion's as champion_ppo and the like."""
    return name.removeprefix("champion_")


def report_link(step: str, key: str) -> str:
    """Address of the report that belongs to a key: its own page if it is among the newest, else the list of all of them."""
    with get_client(sync_client=True) as client:
        named = ArtifactFilter(key=ArtifactFilterKey(any_=[f"{step}-report"]))
        for found in client.read_artifacts(artifact_filter=named, sort=ArtifactSort.CREATED_DESC, limit=2):
            if (found.metadata_ or {}).get("key") == key:
                return f"../../artifacts/artifact/{found.id}"
    return f"../../artifacts/key/{step}-report"
