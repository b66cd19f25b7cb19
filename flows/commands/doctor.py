"""`stackrlhf doctor`: a line a check, with the remedy where something is amiss. Leaves nothing behind, and prints no secret."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from flows.commands import DONE, FAILED
from flows.presets import PRESETS, resolve
from flows.show import console
from tasks.artifacts import Store


@dataclass(frozen=True)
class Check:
    """What was looked at, how it is, and what to do if it is not well."""

    name: str
    state: Literal["ok", "warn", "fail"]
    text: str
    remedy: str = ""


def doctor(arguments: argparse.Namespace) -> int:
    from flows.commands import checks_machine, checks_server, checks_store

    store = Store(arguments.store)
    preset = arguments.preset
    if preset not in PRESETS:
        resolve(preset)  # says which there are
    config = PRESETS[preset]
    groups: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("packages", checks_machine.packages),
        ("torch", checks_machine.accelerators),
        ("memory", lambda: checks_machine.memory(config)),
        ("disk", lambda: checks_machine.disk(config, store)),
        ("store", lambda: checks_store.store(store)),
        ("prefect", checks_server.server),
    ]
    found: list[Check] = []
    out = console(sys.stdout)
    for name, group in groups:
        for check in _guarded(name, group, arguments.debug):
            found.append(check)
            if not arguments.json:
                remedy = f"\n{'':17}{check.remedy}" if check.remedy else ""
                out.print(f"{check.state:4} {check.name:11} {check.text}{remedy}", markup=False, soft_wrap=True)
    failed = any(check.state == "fail" for check in found)
    if arguments.json:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in found]}, indent=1))
    return FAILED if failed else DONE


def _guarded(name: str, group: Callable[[], Iterator[Check]], debug: bool) -> Iterator[Check]:
    """A check that breaks is a finding too; its text is left out, for nobody knows what stands in it."""
    try:
        yield from group()
    except Exception as error:
        if debug:
            raise
        yield Check(name, "fail", f"could not be looked at ({type(error).__name__})", "stackrlhf doctor --debug shows more")
