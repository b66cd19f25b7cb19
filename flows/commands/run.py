"""`stackrlhf run`: the whole pipeline, shown while it runs; the verdict, the decision and the report at the end."""

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from flows.commands import DONE, FAILED, FORBIDDEN, WRONG
from flows.commands.given import compute_of, prepare
from flows.presets import Step
from flows.show import Live, bytes_text, console, duration, gain_text, headline, numbers, table
from tasks.artifacts import Store
from tasks.interrupt import Interrupted
from tasks.progress import listening
from tasks.step import Event, Outcome, StepFailed, StepPlan, describe, watching


def run(arguments: argparse.Namespace) -> int:
    compute = compute_of(arguments)
    if compute.executor == "pool":
        check_server()
    config, store, plans = prepare(arguments)
    from flows.disk import check_disk, disk

    check_disk(store, plans, disk(config, store, plans), compute)
    outcomes: dict[str, Outcome] = {}
    states: dict[str, str] = dict.fromkeys(plans, "to-run")
    started = time.monotonic()
    failure: BaseException | None = None

    def keep(event: Event) -> None:
        states[event.step] = "to-run" if event.state == "running" else event.state
        if event.outcome:
            outcomes[event.step] = event.outcome

    with Live() as live, terminal(live), listening(live.update), watching(live.event), watching(keep):
        live.line(f"{config.name}, store {store.uri}")
        live.busy("starting Prefect")
        try:
            from flows.rlhf import rlhf

            rlhf(config=config, refresh=arguments.refresh, until=arguments.until, store=store.uri, compute=compute)
        except BaseException as error:
            failure = interruption(error) or error
    log = write_log(store, failure) if failure is not None and not isinstance(failure, KeyboardInterrupt) else None
    evaluated = store.open(outcomes["evaluate"].artifact) if "evaluate" in outcomes else None
    promoted = store.open(outcomes["promote"].artifact) if "promote" in outcomes else None
    verdict, decision = _verdict(evaluated), _decision(promoted)
    report = evaluated / "report.html" if evaluated else None
    _table(plans, outcomes, states)
    error_text = None if failure is None else describe(failure)
    if arguments.json:
        ending = {"verdict": verdict, "decision": decision, "report": str(report) if report else None, "error": error_text}
        print(json.dumps(_json(store, plans, outcomes, states) | ending, indent=1))
    if isinstance(failure, KeyboardInterrupt):
        raise failure
    if failure is not None:
        if arguments.debug:
            traceback.print_exception(failure)
        print(f"stackrlhf: {error_text} (traceback: {log})", file=sys.stderr)
        return WRONG if is_the_users(failure) else FAILED
    print(_words(verdict, decision, report, time.monotonic() - started), file=sys.stderr)
    allowed = decision["allowed"] if decision else (verdict or {}).get("word") == "better"
    if arguments.require_better and not allowed:
        print(f"stackrlhf: {(decision or {}).get('reason') or 'the verdict is not better'} (--require-better)", file=sys.stderr)
        return FORBIDDEN
    return DONE


def check_server() -> None:
    from prefect.settings import PREFECT_API_URL

    import flows  # noqa: F401  sets what Prefect reads when it is imported

    if not PREFECT_API_URL.value():
        raise ValueError(
            "--executor pool needs a Prefect server with workers: set PREFECT_API_URL, such as http://127.0.0.1:4200/api "
            "(prefect server start), or use --executor inline"
        )


@contextlib.contextmanager
def terminal(live: Live) -> Iterator[None]:
    """Prefect's own lines stay out of the terminal (its database has them), our warnings go through the live display."""
    import prefect.main  # noqa: F401  configures logging, so it has to come before what follows

    root = logging.getLogger()
    for handler in root.handlers[:]:
        if "Prefect" in type(handler).__name__:
            root.removeHandler(handler)
    for name in ("prefect", "prefect.flow_runs", "prefect.task_runs", "prefect.engine", "prefect.events"):
        logging.getLogger(name).propagate = False
    logging.captureWarnings(True)
    ours = live.handler()
    root.addHandler(ours)

    def interrupt(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        root.removeHandler(ours)
        logging.captureWarnings(False)


def interruption(error: BaseException) -> KeyboardInterrupt | None:
    """What Ctrl-C and SIGTERM become on their way through Prefect, which makes a TerminationSignal of its own of the latter."""
    if not isinstance(error, SystemExit | KeyboardInterrupt | Interrupted) and type(error).__name__ != "TerminationSignal":
        return None
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, Interrupted):
        cause = cause.__context__
    return KeyboardInterrupt(*(cause.args if cause else ()))


def is_the_users(failure: BaseException) -> bool:
    """Whether what was given is wrong: only the step could see it, as with a dump that is cut."""
    return isinstance(failure.__cause__ if isinstance(failure, StepFailed) else failure, ValueError)


def write_log(store: Store, failure: BaseException) -> Path:
    text = "".join(traceback.format_exception(failure))
    name = f"failed.{time.strftime('%Y%m%d-%H%M%S')}.{os.getpid()}.log"
    for folder in (store.root / "tmp", Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
            return folder / name
    return Path("nowhere")


def _verdict(evaluated: Path | None) -> dict[str, Any] | None:
    if evaluated is None:
        return None
    found = json.loads((evaluated / "verdict.json").read_text(encoding="utf-8"))
    return {name: found.get(name) for name in ("word", "gain", "interval", "by", "champion")}


def _decision(promoted: Path | None) -> dict[str, Any] | None:
    if promoted is None:
        return None
    found = json.loads((promoted / "decision.json").read_text(encoding="utf-8"))
    return {name: found.get(name) for name in ("allowed", "moved", "against", "reason", "pointer")}


def _json(store: Store, plans: dict[Step, StepPlan], outcomes: dict[str, Outcome], states: dict[str, str]) -> dict[str, Any]:
    steps = {}
    for step, plan in plans.items():
        outcome = outcomes.get(step)
        steps[step] = {
            "key": outcome.artifact.key if outcome else plan.identity.key,
            "state": states[step],
            **numbers(outcome.manifest if outcome else None, store),
            "warnings": list(outcome.warnings) if outcome else [],
        }
    return {"steps": steps, "store": store.uri}


def _table(plans: dict[Step, StepPlan], outcomes: dict[str, Outcome], states: dict[str, str]) -> None:
    rows = []
    for step in plans:
        outcome = outcomes.get(step)
        if outcome is None:
            rows.append((step, states[step].replace("-", " "), "", "", ""))
            continue
        manifest = outcome.manifest
        took = duration(manifest.seconds)
        took = f"({took})" if outcome.cached else took
        rows.append((step, states[step], took, bytes_text(manifest.peak_memory_bytes), headline(manifest)))
    text = table("", ("step", "state", "time", "memory", "result"), rows)
    console(sys.stderr).print(text)


def _words(verdict: dict[str, Any] | None, decision: dict[str, Any] | None, report: Path | None, seconds: float) -> str:
    lines = []
    if verdict:
        lines.append(f"verdict:  {gain_text(verdict)} against the run's own sft")
        if champion := verdict.get("champion"):
            lines.append(f"champion: {gain_text(champion)} against {str(champion.get('key'))[:12]}, the champion")
    if decision:
        lines.append(f"decision: {decision['reason']}")
    if report:
        lines.append(f"report:   {report}")
    return "\n".join([*lines, f"done in {duration(seconds)}; `prefect server start` shows the run"])
