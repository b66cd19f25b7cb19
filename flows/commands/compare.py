"""`stackrlhf compare A B`: two runs side by side, as Markdown: settings that differ, verdicts, metrics, time, memory, answers."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.commands import DONE
from flows.lineage import changes, decision_of, find, lineage
from flows.show import bytes_text, duration, gain_text, plain, printable
from tasks.artifacts import Manifest, Store


@dataclass(frozen=True)
class Run:
    """An evaluation, all that it was made from, and what was decided on it."""

    key: str
    steps: dict[str, Manifest]
    verdict: dict[str, Any]
    decision: dict[str, Any] | None
    samples: list[dict[str, Any]]


def compare(arguments: argparse.Namespace) -> int:
    if arguments.samples < 0:
        raise ValueError(f"--samples {arguments.samples}: give 0 or more")
    store = Store(arguments.store)
    a, b = (read(store, asked) for asked in (arguments.a, arguments.b))
    if arguments.json:
        print(json.dumps(_json(a, b, arguments.samples), indent=1, ensure_ascii=False))
    else:
        print("\n".join(markdown(a, b, arguments.samples)))
    return DONE


def read(store: Store, asked: str) -> Run:
    evaluated = find(store, "evaluate", asked)
    folder = store.open(store.artifact(evaluated))
    steps = lineage(store, evaluated)
    promoted = decision_of(store, evaluated.key)
    decision = None
    if promoted is not None:
        steps["promote"] = promoted
        decision = _load(store.open(store.artifact(promoted)) / "decision.json")
    return Run(evaluated.key, steps, _load(folder / "verdict.json"), decision, _load(folder / "samples.json"))


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _steps(a: Run, b: Run) -> Iterator[tuple[str, Manifest | None, Manifest | None]]:
    for step in [*a.steps, *(step for step in b.steps if step not in a.steps)]:
        yield step, a.steps.get(step), b.steps.get(step)


def _differing(a: Run, b: Run) -> list[tuple[str, Any, Any]]:
    """Settings, versions and contents from outside; keys of inputs only follow from these."""
    found: list[tuple[str, Any, Any]] = []
    for step, one, two in _steps(a, b):
        if one is not None and two is not None:
            for change in changes(one.identity, two.identity):
                if change.kind != "input":
                    name = {"version": f"version of {step}", "content": f"{step}: content of {change.field}"}.get(change.kind)
                    short = (lambda value: str(value)[:12]) if change.kind == "content" else (lambda value: value)
                    found.append((name or f"{step}.{change.field}", short(change.was), short(change.now)))
    return found


def _common(a: Run, b: Run, limit: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The same question in both."""
    theirs = {(sample.get("site"), sample["qid"]): sample for sample in b.samples}
    found = [(sample, theirs[place]) for sample in a.samples if (place := (sample.get("site"), sample["qid"])) in theirs]
    return found[:limit]


def _json(a: Run, b: Run, samples: int) -> dict[str, Any]:
    def side(run: Run) -> dict[str, Any]:
        return {
            "evaluate": run.key,
            "verdict": {name: run.verdict.get(name) for name in ("word", "gain", "interval", "by", "champion", "gains")},
            "decision": {name: run.decision.get(name) for name in ("allowed", "moved", "against", "reason")}
            if run.decision
            else None,
            "steps": {
                step: {
                    "key": m.key,
                    "created": m.created,
                    "seconds": m.seconds,
                    "peak_memory_bytes": m.peak_memory_bytes,
                    "metrics": m.metrics,
                }
                for step, m in run.steps.items()
            },
        }

    return {
        "a": side(a),
        "b": side(b),
        "settings": [{"name": name, "a": one, "b": two} for name, one, two in _differing(a, b)],
        "samples": [
            {"site": one.get("site"), "qid": one["qid"], "question": one["question"], "a": _answers(one), "b": _answers(two)}
            for one, two in _common(a, b, samples)
        ],
    }


def _answers(sample: dict[str, Any]) -> dict[str, Any]:
    return {name: {"text": answer["text"], "scores": answer.get("scores")} for name, answer in sample["answers"].items()}


# ---- Markdown


def markdown(a: Run, b: Run, samples: int) -> Iterator[str]:
    yield f"# {a.key[:12]} (A) and {b.key[:12]} (B)\n"
    yield from _table(("", "A", "B"), _heads(a, b))
    yield "\n## Settings that differ\n"
    settings = _differing(a, b)
    yield from (
        _table(("setting", "A", "B"), [(name, _cell(one), _cell(two)) for name, one, two in settings]) if settings else ["None."]
    )
    yield "\n## Steps\n"
    yield from _table(("step", "A", "B", "time A", "time B", "memory A", "memory B"), list(_costs(a, b)))
    yield "\n## Metrics\n"
    yield from _table(("metric", "A", "B", "B - A"), list(_metrics(a, b)))
    pairs = _common(a, b, samples)
    if samples:
        yield "\n## Answers to the same questions\n"
        if not pairs:
            yield "The two runs show no question in common."
    for one, two in pairs:
        yield f"### {_line(one['title'])}\n"
        for name, run, sample in (("A, sft", a, one), ("A, ppo", a, one), ("B, sft", b, two), ("B, ppo", b, two)):
            answer = sample["answers"][name[3:]]
            by = run.verdict["by"]
            score = (answer.get("scores") or {}).get(by)
            yield f"**{name}**{'' if score is None else f' ({by} {score:.3f})'}:\n"
            yield "\n".join(f"> {printable(line)}" for line in answer["text"].splitlines() or [""]) + "\n"


def _heads(a: Run, b: Run) -> list[tuple[str, ...]]:
    runs = (a, b)
    rows = [("evaluate", *(f"{run.key[:12]} of {run.steps['evaluate'].created[:16].replace('T', ' ')}" for run in runs))]
    rows.append(("verdict against its own sft", *(gain_text(run.verdict) for run in runs)))
    against = [run.verdict.get("champion") for run in runs]
    if any(against):
        rows.append(
            ("against the champion of its time", *(f"{gain_text(c)}, {str(c.get('key'))[:12]}" if c else "-" for c in against))
        )
    rows.append(("decision", *(_decision(run) for run in runs)))
    return rows


def _decision(run: Run) -> str:
    if run.decision is None:
        return "-"
    return (
        "became champion" if run.decision.get("moved") else "allowed, not moved" if run.decision.get("allowed") else "not promoted"
    )


def _costs(a: Run, b: Run) -> Iterator[tuple[str, ...]]:
    for step, one, two in _steps(a, b):
        sides = (one, two)
        same = one is not None and two is not None and (one.key, one.digest) == (two.key, two.digest)
        keys = [m.key[:12] if m else "-" for m in sides]
        yield (
            step,
            keys[0],
            "the same" if same else keys[1],
            *(duration(m.seconds) if m else "-" for m in sides),
            *(bytes_text(m.peak_memory_bytes) if m else "-" for m in sides),
        )


def _metrics(a: Run, b: Run) -> Iterator[tuple[str, ...]]:
    for step, one, two in _steps(a, b):
        left, right = (m.metrics if m else {} for m in (one, two))
        if one is not None and two is not None and one.digest == two.digest:
            continue
        for name in [*left, *(name for name in right if name not in left)]:
            was, now = left.get(name), right.get(name)
            both = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (was, now))
            yield f"{step}.{name}", _cell(was), _cell(now), f"{now - was:+.4g}" if both else ""  # type: ignore[operator]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[number]) for row in [columns, *rows]) for number in range(len(columns))]
    for number, row in enumerate([columns, *rows]):
        yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
        if number == 0:
            yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"


def _cell(value: Any) -> str:
    return "-" if value is None else _line(plain(value))


def _line(text: str) -> str:
    return printable(" ".join(text.split()).replace("|", "\\|"))
