"""What a run would do: every key before anything runs, by the same functions that the run uses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flows.memory import PROCESS, MemoryEstimate, Unknown, architecture_of, traced_estimate
from flows.presets import STEPS, RLHFConfig, Step
from tasks.artifacts import Identity, Store
from tasks.base.task import identify as base
from tasks.compute import Compute
from tasks.evaluate.task import identify as evaluate
from tasks.ingest.task import identify as ingest
from tasks.ppo.task import identify as ppo
from tasks.promote.task import identify as promote
from tasks.reward.task import identify as reward
from tasks.sft.task import identify as sft
from tasks.step import StepPlan, plan_step


@dataclass(frozen=True)
class Estimate:
    """What the steps that would run took last time, or something like them; None where nothing like them is stored."""

    seconds: float
    peak_memory_bytes: int
    disk_bytes: int
    unknown: tuple[str, ...]
    """Steps of which nothing is stored, so that nothing is known."""


@dataclass(frozen=True)
class Memory:
    """What a step will take at its peak, and how that is known."""

    peak_bytes: int | None
    source: Literal["estimated", "measured", "unknown"]
    """estimated: from the shape of the model and the settings; measured: by the manifest of this step, or of its like."""
    note: str = ""
    """The phase that takes most, or why nothing could be estimated."""


def identities(config: RLHFConfig, store: Store) -> dict[Step, Identity]:
    """The identity of every step. ValueError where an input from outside is not there."""
    i = ingest(config.ingest)
    b = base(config.base, ingest=i.key)
    s = sft(config.sft, base=b.key, ingest=i.key)
    r = reward(config.reward, sft=s.key, ingest=i.key)
    p = ppo(config.ppo, sft=s.key, reward=r.key, ingest=i.key)
    e = evaluate(config.evaluate, base=b.key, sft=s.key, reward=r.key, ppo=p.key, ingest=i.key)
    return {
        "ingest": i,
        "base": b,
        "sft": s,
        "reward": r,
        "ppo": p,
        "evaluate": e,
        "promote": promote(config.promote, evaluate=e.key, store=store),
    }


def make_plan(config: RLHFConfig, store: Store, refresh: Sequence[str] = (), until: Step | None = None) -> dict[Step, StepPlan]:
    """Step by step up to `until`: stored, or why it would run."""
    plans: dict[Step, StepPlan] = {}
    digests: dict[str, str] = {}
    for step, identity in identities(config, store).items():
        known = {name: digests[name] for name in identity.inputs if name in digests}
        plans[step] = plan = plan_step(store, identity, known, refresh=step in refresh)
        if plan.stored and plan.last is not None:
            digests[step] = plan.last.digest
        if step == until:
            break
    return plans


def estimate(plans: dict[Step, StepPlan]) -> Estimate:
    waiting = [(step, plan.last) for step, plan in plans.items() if not plan.stored]
    known = [last for _, last in waiting if last is not None]
    return Estimate(
        seconds=sum(m.seconds for m in known),
        peak_memory_bytes=max((m.peak_memory_bytes for m in known), default=0),
        disk_bytes=sum(m.bytes for m in known),
        unknown=tuple(step for step, last in waiting if last is None),
    )


def memory(config: RLHFConfig, store: Store, plans: dict[Step, StepPlan], compute: Compute) -> dict[Step, Memory]:
    """Of every step of the plan: of a stored one what it took, of the others what they will. Loads torch if any is to train."""
    base = plans.get("base")
    stored = store.open(store.artifact(base.last)) if base is not None and base.stored and base.last is not None else None
    found: dict[Step, Memory] = {}
    for step, plan in plans.items():
        note = ""
        if step in PROCESS and not plan.stored:
            try:
                one: MemoryEstimate = traced_estimate(step, config, architecture_of(config.base, stored), compute)
            except Unknown as error:
                note = str(error)
            else:
                found[step] = Memory(one.peak_bytes, "estimated", one.phase)
                continue
        last = plan.last
        found[step] = Memory(last.peak_memory_bytes, "measured", note) if last is not None else Memory(None, "unknown", note)
    return found


def check_steps(names: Sequence[str]) -> None:
    """ValueError for a word that is no step."""
    for name in names:
        if name not in STEPS:
            raise ValueError(f"{name!r} is no step; there are: {', '.join(STEPS)}")
