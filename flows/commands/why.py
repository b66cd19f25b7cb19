"""`stackrlhf why`: which field made a step run again, or would; a new input is followed to the first step that really differs."""

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from flows.commands import DONE
from flows.commands.given import errors_only, prepare
from flows.lineage import Change, changes, find
from tasks.artifacts import Identity, Manifest, Store

LOOKED_AT = 50
"""Of the newest artifacts of the step, to find the one most like it."""


@dataclass
class Reasons:
    """What really differs, and along which steps it reached the one that was asked about."""

    found: list[Change] = field(default_factory=list)
    ways: dict[str, list[str]] = field(default_factory=dict)
    """Step that differs -> the steps from it to the one asked about."""
    gone: list[Change] = field(default_factory=list)
    """Inputs that differ and are not stored any more, so that nobody can say why."""


def why(arguments: argparse.Namespace) -> int:
    against: Manifest | None
    planned: dict[str, Identity] = {}
    redone: list[str] = []
    if len(arguments.keys) not in {0, 2}:
        raise ValueError("give two keys to compare, or none: then the step of the configuration is compared with what is stored")
    if arguments.keys:
        store = Store(arguments.store)
        old, new = (find(store, arguments.step, key) for key in arguments.keys)
        state, against, plan_why, identity = "stored", old, "", new.identity
        redone = _redone(old, new)
    else:
        with errors_only(logging.getLogger("tasks")):
            _, store, plans = prepare(arguments)
        if arguments.step not in plans:
            raise ValueError(f"--until {arguments.until} ends before {arguments.step}")
        plan = plans[arguments.step]
        identity, planned = plan.identity, {step: one.identity for step, one in plans.items()}
        state, plan_why = ("stored" if plan.stored else "to-run"), plan.why
        if plan.last is not None and plan.last.key == identity.key and not plan.stored:
            against, redone = plan.last, [plan.why]
        else:
            older = [
                m for m in store.manifests(arguments.step) if not (plan.stored and plan.last and m.created >= plan.last.created)
            ]
            against = _closest(known_in(store), identity, planned, older)
    reasons = Reasons() if against is None else differing(known_in(store), against.identity, identity, planned)
    if arguments.json:
        print(json.dumps(_json(arguments.step, identity, state, against, reasons, redone, plan_why), indent=1))
        return DONE
    print("\n".join(_words(store, arguments.step, identity, state, against, reasons, redone, plan_why)))
    return DONE


Known = Callable[[str, str | None], Identity | None]


def known_in(store: Store) -> Known:
    """The identity of a stored artifact; each is asked for once."""

    @cache
    def known(step: str, key: str | None) -> Identity | None:
        found = store.manifest(step, key) if key else None
        return found.identity if found else None

    return known


def differing(known: Known, old: Identity, new: Identity, planned: dict[str, Identity]) -> Reasons:
    """What really differs between two identities of a step. `planned`: those that may not be stored yet."""
    reasons = Reasons()
    _follow(known, old, new, planned, reasons, [new.step], set())
    return reasons


def _follow(
    known: Known, old: Identity, new: Identity, planned: dict[str, Identity], reasons: Reasons, way: list[str], seen: set[str]
) -> None:
    """Where an input differs, it is followed to the two inputs."""
    seen.add(new.step)
    for change in changes(old, new):
        name = change.field
        if change.kind != "input" or name == "champion_ppo":  # the champion is what it is: nobody asks why
            reasons.found.append(change)
            reasons.ways[new.step] = way
            continue
        if name.startswith("champion_"):
            continue
        if name in seen:
            continue
        was, now = known(name, change.was), planned.get(name)
        if now is None or now.key != change.now:
            now = known(name, change.now)
        if was is None or now is None:
            reasons.gone.append(change)
            reasons.ways.setdefault(new.step, way)
        else:
            _follow(known, was, now, planned, reasons, [name, *way], seen)


def _closest(known: Known, new: Identity, planned: dict[str, Identity], stored: Sequence[Manifest]) -> Manifest | None:
    """The artifact that differs least, with all that it was made from: what the new one is made again in place of."""

    def distance(manifest: Manifest) -> int:
        reasons = differing(known, manifest.identity, new, planned)
        return len(reasons.found) + 3 * len(reasons.gone)  # what is gone may differ in anything

    return min(reversed(stored[-LOOKED_AT:]), key=distance, default=None)


def _redone(old: Manifest, new: Manifest) -> list[str]:
    """Inputs of the same key and another content: somebody made them anew meanwhile."""
    same = [name for name, key in new.identity.inputs.items() if old.identity.inputs.get(name) == key]
    return [
        f"{name} was recomputed with another content" for name in same if old.input_digests.get(name) != new.input_digests.get(name)
    ]


def _json(
    step: str, identity: Identity, state: str, against: Manifest | None, reasons: Reasons, redone: list[str], why: str
) -> dict[str, Any]:
    return {
        "step": step,
        "key": identity.key,
        "state": state,
        "against": {"key": against.key, "created": against.created} if against else None,
        "why": why,
        "fields": [
            {
                "step": change.step,
                "kind": change.kind,
                "field": change.field,
                "was": change.was,
                "now": change.now,
                "way": reasons.ways[change.step],
            }
            for change in reasons.found
        ],
        "recomputed": redone,
        "unknown": [{"step": change.step, "input": change.field, "was": change.was, "now": change.now} for change in reasons.gone],
    }


def _words(
    store: Store, step: str, identity: Identity, state: str, against: Manifest | None, reasons: Reasons, redone: list[str], why: str
) -> list[str]:
    about = f"{step} {identity.key[:12]}"
    if against is None:
        return [f"{about} is stored, and nothing older like it" if state == "stored" else f"{about} would run: {why}"]
    other = f"{against.key[:12]} of {against.created[:16].replace('T', ' ')} UTC"
    if against.key == identity.key:
        return [f"{about} would run: {'; '.join(redone) or why}" if state == "to-run" else f"{about}: both are the same artifact"]
    verb = "is stored; it was made" if state == "stored" else "would run"
    lines = [f"{about} {verb} because these differ from {other}, the one most like it:"]
    for change in reasons.found:
        way = reasons.ways[change.step]
        lines.append(f"  {_text(store, change)}{'' if len(way) == 1 else f'   ({change.step} -> ' + ' -> '.join(way[1:]) + ')'}")
    lines += [f"  {words}" for words in redone]
    lines += [f"  input {one.field} of {one.step}: {str(one.was)[:12]} is not stored any more" for one in reasons.gone]
    if len(lines) == 1:
        lines.append("  nothing that the store still knows of")
    return lines


def _text(store: Store, change: Change) -> str:
    """A champion is known by the policy it names, not by the digest of its pointer."""
    if change.field == "champion_ppo":
        was, now = (f"ppo {str(key)[:12]}" if key else "none" for key in (change.was, change.now))
        return f"champion: {was} -> {now}"
    if change.kind != "content" or change.field != "champion":
        return change.text
    known = {one.digest: f"ppo {str(one.to.get('key'))[:12]} (of {one.moved[:10]})" for one in store.pointer_history("champion")}
    was, now = (known.get(str(digest), str(digest)[:12]) for digest in (change.was, change.now))
    return f"champion: {was} -> {now}"
