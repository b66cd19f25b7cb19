"""`stackrlhf plan`: what `run` would do, by the same functions, with the time, memory and disk that it takes."""

import argparse
import json
import logging
import sys
from dataclasses import asdict

from flows.commands import DONE, WRONG
from flows.commands.given import compute_of, errors_only, prepare
from flows.presets import Step
from flows.show import bytes_text, console, duration, numbers, table

SHOWN = 3


def plan(arguments: argparse.Namespace) -> int:
    from flows.disk import disk, disk_text, too_large
    from flows.plan import estimate, memory, out_of_memory
    from flows.times import seconds

    compute = compute_of(arguments)
    with errors_only(logging.getLogger("tasks")):  # what is damaged or old is said in the plan itself
        config, store, plans = prepare(arguments)
    needed, disks = memory(config, store, plans, compute), disk(config, store, plans)
    times = {step: plan.last.seconds if plan.stored and plan.last else seconds(step, plans, store) for step, plan in plans.items()}
    known = estimate(plans, store, needed, disks)
    problems: dict[Step, list[str]] = {step: [] for step in plans}
    for step, why in out_of_memory(plans, needed, compute).items():
        problems[step].append(why)
    for step, (needs, free) in too_large(store, plans, disks, compute).items():
        problems[step].append(disk_text(store, needs, free))
    stops = any(problems.values())
    if arguments.json:
        steps = {
            step: {
                "key": plan.identity.key,
                "state": "stored" if plan.stored else "to-run",
                "why": plan.why,
                "differences": list(plan.differences),
                "warnings": list(plan.warnings),
                **numbers(plan.last, store if plan.stored else None),
                "seconds": times[step],
                "memory": asdict(needed[step]),
                "disk": asdict(disks[step]),
                "fits": not problems[step],
                "problems": problems[step],
            }
            for step, plan in plans.items()
        }
        ending = {"verdict": None, "report": None, "store": store.uri, "estimate": asdict(known), "fits": not stops}
        print(json.dumps({"steps": steps, **ending}, indent=1))
        return WRONG if stops and arguments.check else DONE
    rows = []
    for step, plan in plans.items():
        peak, size = needed[step].peak_bytes, disks[step].bytes
        rows.append(
            (
                step,
                plan.identity.key[:12],
                "stored" if plan.stored else "does not fit" if problems[step] else "to run",
                _rough(None if times[step] is None else duration(times[step] or 0), not plan.stored),
                _rough(None if peak is None else bytes_text(peak), needed[step].source == "estimated"),
                _rough(None if size is None else bytes_text(size), disks[step].source == "estimated"),
                "" if plan.stored else _short(step, plan.why),
            )
        )
    out = console(sys.stdout)
    out.print(table(f"{config.name}, store {store.uri}", ("step", "key", "state", "time", "memory", "disk", "why"), rows))
    for plan in plans.values():
        for warning in plan.warnings:
            out.print(f"warning: {warning}", markup=False)
    waiting = [step for step, plan in plans.items() if not plan.stored]
    if not waiting:
        out.print("all is stored")
        return DONE
    time = f"about {duration(known.seconds)} and " if known.seconds or not known.unknown else ""
    unknown = f"; how long {', '.join(known.unknown)} will take is not known: nothing like it is stored" if known.unknown else ""
    working = max(disks[step].working_bytes for step in waiting)
    besides = f" (and up to {bytes_text(working)} for checkpoints and shards while it runs)" if working else ""
    out.print(
        f"{len(waiting)} to run: {time}{bytes_text(known.disk_bytes)} of disk{besides}{unknown}",
        markup=False,
    )
    out.print(
        f"memory: {bytes_text(known.peak_memory_bytes)} at the peak; ~ is an estimate, from the shape of the model, the settings "
        "or what the like of a step took; the rest was measured",
        markup=False,
    )
    for note in sorted({needed[step].note for step in waiting if needed[step].source != "estimated" and needed[step].note}):
        out.print(f"memory is not estimated: {note}", markup=False)
    for step, words in problems.items():
        for word in words:
            out.print(f"{step} does not fit: {word}", markup=False)
    return WRONG if stops and arguments.check else DONE


def _short(step: Step, why: str) -> str:
    """Where nearly all differs, a screen of settings would say less than three of them."""
    parts = why.split("; ")
    return why if len(parts) <= SHOWN else f"{'; '.join(parts[:SHOWN])}; and {len(parts) - SHOWN} more (stackrlhf why {step})"


def _rough(text: str | None, estimated: bool) -> str:
    return "?" if text is None else f"~{text}" if estimated else text
