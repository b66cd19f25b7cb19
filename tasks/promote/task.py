"""The Prefect side of `promote`: the decision is an artifact, the pointer is moved by compare-and-swap."""

from typing import Any

from prefect.client.schemas.objects import State

from tasks.artifacts import Artifact, Identity, Manifest, Pointer, Store, StoreError
from tasks.champion import entry, rival
from tasks.promote.config import PromoteConfig
from tasks.task import Execution, Work, conduct, step_task

VERSION = 2


def identify(config: PromoteConfig, *, evaluate: str, champion: Pointer | None) -> Identity:
    return Identity(
        step="promote",
        version=VERSION,
        config=config.identity(),
        inputs={"evaluate": evaluate},
        external={"champion": champion.digest if champion else "none"},
    )


def stands(store: Store, config: PromoteConfig, policy: str, digest: str) -> bool:
    """Does the pointer stand on this policy, whatever evaluation brought it there? By its key and its content."""
    now = store.pointer(config.pointer)
    return now is not None and now.to["key"] == policy and now.to["artifacts"]["ppo"]["digest"] == digest


def unmoved(store: Store, config: PromoteConfig, evaluate_key: str, manifest: Manifest) -> bool:
    """Was it decided to move the pointer, and does it not stand there (it was lost, or the store copied without)? Then the step has
    to run again. `manifest` is that of the stored decision on `evaluate_key`."""
    assert manifest.identity.inputs["evaluate"] == evaluate_key
    metrics = manifest.metrics
    return bool(metrics["moved"]) and not stands(store, config, str(metrics["candidate"]), str(metrics["candidate_digest"]))


@step_task("promote")
def promote(
    config: PromoteConfig,
    execution: Execution,
    *,
    evaluate: Artifact,
    ppo: Artifact,
    sft: Artifact,
    reward: Artifact,
    champion: Pointer | None = None,
) -> State[Artifact]:
    """Move the champion pointer if the verdict is *better*."""
    store = Store(execution.store)
    candidate = entry(ppo, sft, reward, evaluate)
    identity = identify(config, evaluate=evaluate.key, champion=champion)

    def produce(work: Work) -> dict[str, Any]:
        from tasks.promote.promote import promote

        metrics = promote(
            config,
            evaluate=work.inputs["evaluate"],
            champion=champion.to if champion else None,
            candidate=candidate,
            out=work.out,
        )
        work.progress.note(metrics["reason"])
        if metrics["moved"] and not stands(store, config, ppo.key, ppo.digest):
            move()
        return metrics | {"candidate_digest": ppo.digest}

    def move() -> None:
        number = store.pointer_number(config.pointer)  # before the look: who comes after that makes the move fail
        if rival(store, config.pointer, ppo.key) != champion or not store.move_pointer(config.pointer, candidate, number):
            raise StoreError(f"the {config.pointer} was moved by another run meanwhile: run again, and it is decided anew")

    stored = store.find(identity, {"evaluate": evaluate.digest})
    if stored is not None and unmoved(store, config, evaluate.key, stored):
        execution = execution.model_copy(update={"refresh": True})
    return conduct(identity, {"evaluate": evaluate}, produce, execution)
