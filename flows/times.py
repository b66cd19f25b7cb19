"""How long a step will take: what the stored artifact most like it took, scaled where its time is proportional to what differs.

Nothing is said where another model, other data or a setting that changes the work stands between the two.
"""

from collections.abc import Mapping
from typing import Any

from flows.presets import Step
from tasks.artifacts import Identity, Manifest, Store
from tasks.step import StepPlan, flat

PROPORTIONAL: dict[Step, frozenset[str]] = {
    "ingest": frozenset({"simulate.questions"}),
    "base": frozenset({"scratch.steps", "scratch.batch_tokens"}),
    "sft": frozenset({"steps", "batch_size", "seq_length"}),
    "reward": frozenset({"epochs", "max_questions"}),
    "ppo": frozenset({"steps", "batch_size"}),
    "evaluate": frozenset({"max_questions", "samples_per_question"}),
}
"""Settings that a step's time grows with."""
HARMLESS = frozenset(
    {"seed", "learning_rate", "value_learning_rate", "warmup_steps", "weight_decay", "kl_coef", "kl_target",
    "kl_horizon", "gamma", "lam", "cliprange", "cliprange_value", "vf_coef", "whiten_advantages", "score_clip",
    "missing_eos_penalty", "max_ratio", "max_grad_norm", "adam_eps", "target_kl", "alpha", "centering", "gap_margin",
    "judge_split", "confidence", "bootstrap_samples", "shown_samples", "splits", "max_pairs", "max_quarantine",
    "allow_incomplete", "pointer", "guard", "value_warmup_steps"}
)  # fmt: skip
"""Settings, and sections of them, that leave a step's time as it is."""


def seconds(step: Step, plans: Mapping[Step, StepPlan], store: Store | None = None) -> float | None:
    """None where the like of the step says nothing about it. Without a store only inputs that the plan knows can be compared."""
    plan = plans[step]
    like = plan.last
    if like is None:
        return None
    factor = 1.0
    before, after = flat(like.identity.config), flat(plan.identity.config)
    for name in {*before, *after}:
        was, now = before.get(name), after.get(name)
        if was == now or {name.rsplit(".", 1)[-1], name.split(".", 1)[0]} & HARMLESS:
            continue
        ratio = _ratio(was, now) if name in PROPORTIONAL.get(step, ()) else None
        if ratio is None:
            return None
        factor *= ratio
    if step != "promote" and not _same_outside(step, like, plans, store):
        return None
    return like.seconds * factor


def _ratio(was: Any, now: Any) -> float | None:
    return now / was if isinstance(was, int) and isinstance(now, int) and was > 0 else None


def _same_outside(step: Step, like: Manifest, plans: Mapping[Step, StepPlan], store: Store | None) -> bool:
    """The same model, and as much data."""
    now = plans[step].identity
    if step in {"ingest", "base"} and like.identity.external != now.external:
        return False
    reads_all = step in {"reward", "evaluate"} and now.config.get("max_questions") is None
    if reads_all and like.identity.inputs.get("ingest") != now.inputs.get("ingest"):
        return False
    return step in {"ingest", "base"} or _same_model(like.identity, now, plans, store)


def _same_model(like: Identity, now: Identity, plans: Mapping[Step, StepPlan], store: Store | None) -> bool:
    name: Step = "base" if "base" in now.inputs else "sft"
    if like.inputs.get(name) == now.inputs[name]:
        return True
    theirs = _stored(store, name, like.inputs.get(name))
    if theirs is None or name not in plans:
        return False
    ours = plans[name].identity
    if name == "sft":
        widths = {key: (theirs.config.get(key), ours.config.get(key)) for key in ("dtype", "tuning")}
        return all(was == is_ for was, is_ in widths.values()) and _same_model(theirs, ours, plans, store)
    shapes = [{key: value for key, value in flat(one.config).items() if key not in _NO_SHAPE} for one in (theirs, ours)]
    return shapes[0] == shapes[1] and theirs.external == ours.external


_NO_SHAPE = frozenset({"seed", "scratch.steps", "scratch.batch_tokens", "scratch.learning_rate", "scratch.weight_decay"})


def _stored(store: Store | None, step: str, key: str | None) -> Identity | None:
    found = store.manifest(step, key) if store is not None and key else None
    return found.identity if found else None
