"""`stackrlhf store`: what is stored, whether it is whole, and room for more."""

import argparse
import json
import sys
from dataclasses import asdict

from flows.commands import DONE, FAILED
from flows.show import bytes_text, console, duration, headline, numbers, table
from tasks.artifacts import Store


def ls(arguments: argparse.Namespace) -> int:
    store = Store(arguments.store)
    manifests = store.list()
    if arguments.json:
        keys = [
            {"step": m.step, "key": m.key, "created": m.created, "bytes": m.bytes, "digest": m.digest, **numbers(m, store)}
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


def verify(arguments: argparse.Namespace) -> int:
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


def gc(arguments: argparse.Namespace) -> int:
    from flows.gc import clean, find

    store = Store(arguments.store)
    found = (find if arguments.dry_run else clean)(store, arguments.hours, arguments.keep)
    total = sum(one.bytes for one in found)
    if arguments.json:
        ending = {"store": store.uri, "dry_run": arguments.dry_run, "bytes": total}
        print(json.dumps({**ending, "removed": [asdict(one) for one in found]}, indent=1))
        return DONE
    for one in found:
        print(f"{one.kind:11} {bytes_text(one.bytes):>8}  {one.name}")
    word = "would be freed" if arguments.dry_run else "freed"
    print(f"{store.uri}: {bytes_text(total)} {word}, {len(found)} {'thing' if len(found) == 1 else 'things'}")
    return DONE
