"""The champion: the policy that a store's pointer names, and that a new candidate has to beat."""

from typing import Any

from tasks.artifacts import Artifact, Pointer, Store

HEARD = ("ppo", "sft", "reward")
"""Steps whose artifacts it takes to ask a champion, and to score as its own judge does."""


def rival(store: Store, pointer: str, policy: str) -> Pointer | None:
    """The champion that the candidate whose ppo artifact has the key `policy` meets: the newest that is not that candidate itself.

    So a run that is repeated after its candidate became champion finds its evaluation and its decision stored.
    """
    return next((one for one in store.pointer_history(pointer) if one.to["key"] != policy), None)


def entry(ppo: Artifact, sft: Artifact, reward: Artifact, evaluate: Artifact) -> dict[str, Any]:
    """What a pointer says of a policy."""
    made = {one.step: one.model_dump(exclude={"uri"}) for one in (ppo, sft, reward, evaluate)}
    return {"key": ppo.key, "evaluate": evaluate.key, "artifacts": made}


def artifacts_of(store: Store, champion: Pointer) -> dict[str, Artifact]:
    """References to the champion's own artifacts by step (ppo, sft, reward, evaluate), in this store."""
    return {
        step: Artifact(step=step, key=one["key"], digest=one["digest"], uri=f"{store.uri}/{step}/{one['key']}")
        for step, one in champion.to["artifacts"].items()
    }


def inputs(store: Store, champion: Pointer | None) -> dict[str, Artifact]:
    """What evaluate reads of the champion, by the names that its key has for it."""
    return {f"champion_{step}": one for step, one in artifacts_of(store, champion).items() if step in HEARD} if champion else {}


def input_keys(champion: Pointer | None) -> dict[str, str]:
    """What evaluate's key holds of the champion: its policy, however often and under whatever number the pointer came to it."""
    if champion is None:
        return {}
    made = champion.to.get("artifacts", {})
    if missing := [step for step in HEARD if step not in made]:
        raise ValueError(
            f"entry {champion.number} of the champion pointer names no {', '.join(missing)}: remove it, so that the one before it "
            "counts, or give this run a pointer of its own (--set promote.pointer=NAME)"
        )
    return {f"champion_{step}": made[step]["key"] for step in HEARD}


def check(store: Store, pointer: str, champion: Pointer) -> None:
    """ValueError where the champion cannot be asked any more, because something of it is gone from the store."""
    gone = [one for one in inputs(store, champion).values() if not store.unchanged(one)]
    if gone:
        what = ", ".join(f"{one.step} {one.key[:12]}" for one in gone)
        entry_file = f"{store.uri}/pointers/{pointer}/{champion.number:08d}.json"
        raise ValueError(
            f"the {pointer} (policy {champion.to['key'][:12]}) cannot be asked: of its artifacts {what} is gone from {store.uri}, "
            f"or has another content now. Put it back; or remove {entry_file}, so that the {pointer} before it counts; or give "
            "this run a pointer of its own (--set promote.pointer=NAME)"
        )
