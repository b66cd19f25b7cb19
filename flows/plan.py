"""What a run would do: every key before anything runs, by the same functions that the run uses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flows.disk import Disk
from flows.memory import PROCESS, MemoryEstimate, Unknown, architecture_of, traced_estimate
from flows.presets import STEPS, RLHFConfig, Step
from flows.times import seconds
from tasks.artifacts import Identity, Pointer, Store
from tasks.base.task import identify as base
from tasks.champion import check, rival
from tasks.champion import inputs as champion_inputs
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
    """What the steps that would run will take together."""

    seconds: float
    peak_memory_bytes: int
    disk_bytes: int
    unknown: tuple[str, ...]
    """Steps of which no like is stored, so that nobody knows how long they take."""


@dataclass(frozen=True)
class Memory:
    """What a step will take at its peak, and how that is known."""

    peak_bytes: int | None
    source: Literal["estimated", "measured", "unknown"]
    """estimated: from the shape of the model and the settings; measured: by the manifest of this step, or of its like."""
    note: str = ""
    """The phase that takes most, or why nothing could be estimated."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Whose memory an estimate is of."""


def identities(config: RLHFConfig, store: Store) -> tuple[dict[Step, Identity], Pointer | None]:
    """The identity of every step, and the champion that the run's policy will meet. ValueError where an input from outside, or
    what is left to evaluate of that champion, is not there."""
    i = ingest(config.ingest)
    b = base(config.base, ingest=i.key)
    s = sft(config.sft, base=b.key, ingest=i.key)
    r = reward(config.reward, sft=s.key, ingest=i.key)
    p = ppo(config.ppo, sft=s.key, reward=r.key, ingest=i.key)
    champion = rival(store, config.promote.pointer, p.key)
    e = evaluate(config.evaluate, base=b.key, sft=s.key, reward=r.key, ppo=p.key, ingest=i.key, champion=champion)
    if champion is not None and store.find(e) is None:
        check(store, config.promote.pointer, champion)
    found: dict[Step, Identity] = {
        "ingest": i,
        "base": b,
        "sft": s,
        "reward": r,
        "ppo": p,
        "evaluate": e,
        "promote": promote(config.promote, evaluate=e.key, champion=champion),
    }
    return found, champion


def make_plan(config: RLHFConfig, store: Store, refresh: Sequence[str] = (), until: Step | None = None) -> dict[Step, StepPlan]:
    """Step by step up to `until`: stored, or why it would run."""
    plans: dict[Step, StepPlan] = {}
    found, champion = identities(config, store)
    digests = {name: one.digest for name, one in champion_inputs(store, champion).items()}
    for step, identity in found.items():
        known = {name: digests[name] for name in identity.inputs if name in digests}
        plans[step] = plan = plan_step(store, identity, known, refresh=step in refresh)
        if plan.stored and plan.last is not None:
            digests[step] = plan.last.digest
        if step == until:
            break
    return plans


def estimate(
    plans: dict[Step, StepPlan],
    store: Store | None = None,
    needed: dict[Step, Memory] | None = None,
    disks: dict[Step, Disk] | None = None,
) -> Estimate:
    """Where `needed` or `disks` are not given, what the like of a step took counts."""
    waiting = {step: plan for step, plan in plans.items() if not plan.stored}
    times = {step: seconds(step, plans, store) for step in waiting}
    likes = {step: plan.last for step, plan in waiting.items()}
    peaks = [needed[step].peak_bytes if needed else like.peak_memory_bytes if like else 0 for step, like in likes.items()]
    sizes = [disks[step].bytes if disks else like.bytes if like else 0 for step, like in likes.items()]
    return Estimate(
        seconds=sum(time for time in times.values() if time is not None),
        peak_memory_bytes=max((peak or 0 for peak in peaks), default=0),
        disk_bytes=sum(size or 0 for size in sizes),
        unknown=tuple(step for step, time in times.items() if time is None),
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
                found[step] = Memory(one.peak_bytes, "estimated", one.phase, one.device)
                continue
        last = plan.last
        found[step] = Memory(last.peak_memory_bytes, "measured", note) if last is not None else Memory(None, "unknown", note)
    return found


def out_of_memory(plans: dict[Step, StepPlan], needed: dict[Step, Memory], compute: Compute) -> dict[Step, str]:
    """Steps that would run here and whose estimate is above what is free: why, as `run` says it when it comes to them. Of jobs on
    work pools this machine can say nothing."""
    found: dict[Step, str] = {}
    if compute.executor == "pool":
        return found
    from tasks.memory import check_fits

    for step, plan in plans.items():
        one = needed[step]
        if not plan.stored and one.source == "estimated" and one.peak_bytes is not None:
            try:
                check_fits(step, one.peak_bytes, one.note, one.device, allow=compute.allow_memory)
            except ValueError as error:
                found[step] = str(error).removeprefix(f"{step} ")
    return found


def check_steps(names: Sequence[str]) -> None:
    """ValueError for a word that is no step."""
    for name in names:
        if name not in STEPS:
            raise ValueError(f"{name!r} is no step; there are: {', '.join(STEPS)}")
