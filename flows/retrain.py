"""Retraining on a schedule: a newer dump makes a challenger, and the challenger becomes the champion only if it is better.

    look     what stands at the source now, against what stood there last; nothing is fetched that did not change
    ingest   the pipeline's own, up to ingest
    compare  the data of the champion and these: what is new, what is gone; a dump that is older or cut is refused
    base ... promote    the rest of the pipeline: the challenger meets the champion on the same held-out questions
    record   the decision, in the store and on the dashboard

A look that finds nothing new ends there, in seconds. "New" means the data: other settings of training train nothing by themselves.
"""

import contextvars
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefect import flow, runtime
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.attempts import begin_attempt
from flows.decision import Data, Decision, File, data_of, keys_of, last_training, page, records, settled, suspicions, write
from flows.pool import cancel_jobs
from flows.presets import PresetName, RLHFConfig, Step, resolve
from flows.rlhf import rlhf
from tasks.artifacts import Artifact, Manifest, Store, canonical
from tasks.champion import artifacts_of
from tasks.compute import Compute
from tasks.ingest import changes
from tasks.ingest.look import look
from tasks.ingest.task import identify
from tasks.manifest import sha256
from tasks.step import describe
from tasks.task import step_task

logger = logging.getLogger(__name__)
logger.setLevel(logging.INFO)

DEFAULT_COMPUTE = Compute()
DASHBOARD_SECONDS = 10.0


class Refused(ValueError):
    """The dump must not be trained on."""


def name_of_run() -> str:
    """Such as "retrain smollm2 on beer.stackexchange.com.7z"."""
    given = runtime.flow_run.parameters
    config = given.get("config") or "tiny"
    name = config if isinstance(config, str) else RLHFConfig.model_validate(config).name
    return f"retrain {name} on {' + '.join(_last_part(place) for place in given.get('source') or ()) or 'nothing'}"


@flow(name="retrain", flow_run_name=name_of_run, persist_result=False, on_cancellation=[cancel_jobs])
def retrain(
    source: list[str],
    config: RLHFConfig | PresetName = "tiny",
    *,
    overrides: dict[str, Any] | None = None,
    store: str = os.environ.get("STACKRLHF_STORE", "./store"),
    compute: Compute = DEFAULT_COMPUTE,
    force: bool = False,
) -> State[Decision]:
    """Look for a newer dump; train a challenger on it, and promote it only if it is better than the champion.

    Args:
        source: where dumps appear: paths, globs (of each site the newest counts), https:// and s3:// addresses, names of sites.
        config: the name of a preset, or a complete configuration; its ingest.dump is replaced by the source.
        overrides: single numbers by dotted name, such as {"ppo.kl_coef": 0.02}.
        store: the artifact store: a folder, or s3://bucket/prefix.
        compute: how the steps are executed; changes no result.
        force: train although nothing is new, or although the dump is older or much smaller than the champion's.
    """
    if not source or not all(place.strip() and "{{" not in place for place in source):
        raise ValueError(
            f"retrain has no source to look at (source={json.dumps(source)}): set its parameter `source`, such as "
            '["/data/dumps/*/beer.stackexchange.com.7z"]'
        )
    run = _Retraining(source, resolve(config, overrides, dump=source), Store(store), compute, force)
    try:
        why_not = run.look() or run.ingest() or run.compare()
        decision = run.end("nothing-new", why_not) if why_not else run.train()
    except Exception as error:
        run.failed(error)
        raise
    return Completed(name=decision.title, message=decision.reason, data=decision)


class _Retraining:
    """The parts of one retraining; `look`, `ingest` and `compare` return why there is nothing to train, or ""."""

    def __init__(self, source: Sequence[str], config: RLHFConfig, store: Store, compute: Compute, force: bool):
        begin_attempt("stackrlhf", "retrain", config.name)
        self.config, self.store, self.compute, self.force = config, store, compute, force
        self.started = time.monotonic()
        self.pointer = config.promote.pointer
        self.champion = store.pointer(self.pointer)
        self.last = settled(store, self.pointer)
        self.champions_data = self._champions_data()
        self.data: Manifest | None = None
        self.facts: dict[str, Any] = {
            "source": tuple(_without_secrets(place) for place in source),
            "config": config.name,
            "ingest": sha256(canonical(config.ingest.identity())),
            "champion": self.champion.to["key"] if self.champion else None,
            "flow_run": str(runtime.flow_run.id) if runtime.flow_run.id else None,
            "data": self.last.decision.data if self.last else keys_of(self.champions_data),
        }

    def look(self) -> str:
        """What stands at the source, against what stood there at the last look."""

        def work() -> tuple[str, str]:
            now = look(self.config.ingest)
            for line in now.passed_over:
                logger.info(line)
            self.facts["files"] = tuple(File(where=one.where, site=one.site, mark=one.mark) for one in now.files)
            self.facts["passed_over"] = now.passed_over
            chosen = {"dump": now.dump, "site_names": now.site_names}
            self.config = self.config.model_copy(update={"ingest": self.config.ingest.model_copy(update=chosen)})
            if self.force:
                return "Forced", "it is trained whether anything changed or not"
            if self.last and self._same_files(self.last.decision):
                return "Nothing new", f"Nothing changed at the source since the look of {_day(self.last.time)}.{self._story()}"
            key = identify(self.config.ingest).key  # fetches what changed elsewhere: only its content says what it is
            if known := self._known(lambda data: data.key == key):
                return "Nothing new", f"The files at the source are, byte by byte, {known}.{self._story()}"
            before = {file.where: file.mark for file in self.last.decision.files} if self.last else {}
            differing = [file.where for file in self.facts["files"] if before.get(file.where) != file.mark]
            return "Changed", f"new or changed since the last look: {', '.join(differing) or 'the settings of ingest'}"

        return self._part("look", work)

    def ingest(self) -> str:
        """The pipeline's own step, and what it made."""
        made = self._pipeline("ingest")["ingest"]
        self.data = self.store.manifest("ingest", made.key)
        assert self.data is not None, "it was made just now"
        return ""

    def compare(self) -> str:
        """What is new in the data since those of the champion. Refused where that cannot be right."""

        def work() -> tuple[str, str]:
            assert self.data is not None
            folder = self.store.open(self.store.artifact(self.data))
            now = data_of(self.data, folder)
            self.facts["data"] = now
            known = self._known(lambda data: data.digest == now.digest)
            if known and not self.force:
                return "Nothing new", f"The files changed, and the questions and pairs in them are {known}.{self._story()}"
            trained = last_training(self.store, self.pointer)
            before: list[tuple[str, Data]] = []
            if self.champions_data is not None:
                before.append(("the champion's", self._compared("champion", self.champions_data, folder)))
            if trained is not None and trained.decision.data is not None:
                data = trained.decision.data
                before.append(("the last challenger's", data))
                if self.champions_data is None and (manifest := self.store.manifest("ingest", data.key)):
                    self._compared("challenger", manifest, folder)
            wrong = [line for whose, data in before for line in suspicions(now, data, whose)]
            if wrong and not self.force:
                raise Refused(f"{'; '.join(wrong)}: not trained on; `force` does it all the same")
            for line in wrong:
                logger.warning("%s; trained on it all the same, as `force` asks", line)
            questions = self.facts.get("changes", {}).get("questions", {})
            counts = ", ".join(f"{questions[name]:,} {name}" for name in ("new", "gone", "changed") if name in questions)
            return "Changed", f"questions: {counts}" if counts else f"{sum(now.questions.values()):,} questions, the first"

        return self._part("compare", work)

    def train(self) -> Decision:
        """The challenger, its verdict, and what promote made of it."""
        made = self._pipeline()
        evaluated, promoted = self.store.open(made["evaluate"]), self.store.open(made["promote"])
        verdict = json.loads((evaluated / "verdict.json").read_text(encoding="utf-8"))
        self.facts |= {
            "challenger": made["ppo"].key,
            "report": f"{made['evaluate'].uri}/report.html",
            "verdict": {name: verdict.get(name) for name in ("word", "gain", "interval", "by", "champion")},
        }
        stands = self.store.pointer(self.pointer)
        reason = json.loads((promoted / "decision.json").read_text(encoding="utf-8"))["reason"]
        if self.facts["champion"] == made["ppo"].key:  # only `force` leads here
            return self.end("kept", f"The challenger is what the {self.pointer} names already.")
        moved = stands is not None and stands.to["key"] == made["ppo"].key
        return self.end("promoted" if moved else "kept", reason)

    def end(self, word: str, reason: str) -> Decision:
        """The record of what came of it: in the store, and on the dashboard."""
        decision = Decision(word=word, reason=reason, seconds=round(time.monotonic() - self.started, 1), **self.facts)

        def work() -> tuple[str, str]:
            number = write(self.store, self.pointer, decision)
            _show(page(decision, self.pointer, self.store))
            return "Completed", f"record {number}: {decision.title}: {reason}"

        self._part("record", work)
        logger.info("%s: %s", decision.title, reason)
        return decision

    def failed(self, error: Exception) -> None:
        """What stopped it is recorded too; a failure is looked at anew next time, a refusal is not."""
        try:
            self.end("refused" if isinstance(error, Refused) else "failed", describe(error))
        except Exception as another:
            logger.warning("that it failed could not be recorded: %s", describe(another))

    # ---- what they need

    def _part(self, name: str, work: Callable[[], tuple[str, str]]) -> str:
        """Runs `work` as a task run whose state says what it found. Returns its words where that is nothing new, else ""."""

        @step_task(name)
        def part() -> State[str]:
            title, text = work()
            return Completed(name=title, message=text, data=text)

        state: Any = part(return_state=True)
        text = state.result()  # raises what it raised
        return str(text) if state.name == "Nothing new" else ""

    def _pipeline(self, until: Step | None = None) -> dict[str, Artifact]:
        """The pipeline inside this flow run, not as a run of its own: a retry finds the jobs that an attempt before it started."""
        made: dict[str, Artifact] = rlhf.fn(config=self.config, until=until, store=self.store.uri, compute=self.compute)
        return made

    def _champions_data(self) -> Manifest | None:
        """The ingest artifact that the champion was trained on, where it is still in the store."""
        if self.champion is None:
            return None
        policy = self.store.manifest("ppo", artifacts_of(self.store, self.champion)["ppo"].key)
        found = self.store.manifest("ingest", policy.identity.inputs["ingest"]) if policy else None
        if found is None:
            logger.warning("what the %s was trained on is no longer in %s: a new dump is not compared with it",
                           self.pointer, self.store.uri)  # fmt: skip
        return found

    def _same_files(self, before: Decision) -> bool:
        now = {(file.site, file.where): file.mark for file in self.facts["files"]}
        then = {(file.site, file.where): file.mark for file in before.files}
        return now == then and None not in now.values() and before.ingest == self.facts["ingest"]

    def _known(self, same: Callable[[Data], bool]) -> str:
        """Whose data these are: the champion's, or those of the last look; "" where they are new."""
        champions = keys_of(self.champions_data)
        if champions is not None and same(champions):
            return "what the champion was trained on"
        looked = self.last.decision.data if self.last else None
        return "what stood there at the last look" if looked is not None and same(looked) else ""

    def _story(self) -> str:
        """Where to read what came of the last data that were new."""
        for record in records(self.store, self.pointer):
            if record.decision.word in {"promoted", "kept", "refused"}:
                return f" The last new data, on {_day(record.time)}, came to: {record.decision.title} (record {record.number})."
        return ""

    def _compared(self, against: str, before: Manifest, now: Path) -> Data:
        """Fills in what changed between older data and these; returns what the older ones are."""
        folder = self.store.open(self.store.artifact(before))
        found = changes.compare(folder, now)
        self.facts["against"] = against
        self.facts["changes"] = {part: found["total"][part] for part in ("questions", "answers", "pairs")}
        self.facts["moved_into_eval"] = sum(one["to"] == "eval" for one in found["moved"])
        return data_of(before, folder)


def _show(text: str) -> None:
    """The page on the dashboard: best effort, and never for long; the store has the record."""

    def create() -> None:
        try:
            create_markdown_artifact(text, key="retrain-decision", description="What was looked at, and what came of it")
        except Exception as error:
            logger.warning("the dashboard has no page of the decision: %s", describe(error))

    context = contextvars.copy_context()  # the artifact belongs to this run
    thread = threading.Thread(target=lambda: context.run(create), daemon=True, name="retrain-decision")
    thread.start()
    thread.join(DASHBOARD_SECONDS)


def _without_secrets(place: str) -> str:
    from tasks.ingest import fetch

    return fetch.shown(place) if place.startswith(("http://", "https://")) else place


def _last_part(place: str) -> str:
    return _without_secrets(place).rstrip("/").rsplit("/", 1)[-1]


def _day(time: str) -> str:
    return f"{time[:16].replace('T', ' ')} UTC"
