"""The Prefect side of `promote`: the decision is an artifact, the pointer is moved by compare-and-swap."""

from typing import Any

from prefect.client.schemas.objects import State

from tasks.artifacts import Artifact, Identity, Pointer, Store, StoreError
from tasks.promote.config import PromoteConfig
from tasks.task import Execution, Work, conduct, step_task

VERSION = 1


def rival(store: Store, pointer: str, evaluate: str) -> Pointer | None:
    """The champion that the candidate meets: the present one, unless this very evaluation put it there; then the one before.

    So a run that is repeated after its candidate became champion finds its decision stored.
    """
    history = store.pointer_history(pointer)
    newest = next(history, None)
    return next(history, None) if newest is not None and newest.to.get("evaluate") == evaluate else newest


def identify(config: PromoteConfig, *, evaluate: str, store: Store) -> Identity:
    champion = rival(store, config.pointer, evaluate)
    return Identity(
        step="promote",
        version=VERSION,
        config=config.identity(),
        inputs={"evaluate": evaluate},
        external={"champion": champion.digest if champion else "none"},
    )


@step_task("promote")
def promote(
    config: PromoteConfig, execution: Execution, *, evaluate: Artifact, ppo: Artifact, sft: Artifact, reward: Artifact
) -> State[Artifact]:
    """Move the champion pointer if the verdict is *better*."""
    store = Store(execution.store)
    candidate: dict[str, Any] = {
        "key": ppo.key,
        "evaluate": evaluate.key,
        "artifacts": {artifact.step: artifact.model_dump(exclude={"uri"}) for artifact in (ppo, sft, reward, evaluate)},
    }
    number = store.pointer_number(config.pointer)
    champion = rival(store, config.pointer, evaluate.key)
    identity = identify(config, evaluate=evaluate.key, store=store)

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
        if metrics["moved"] and not stands() and not store.move_pointer(config.pointer, candidate, number):
            raise StoreError(f"the {config.pointer} was moved by another run meanwhile: run again, and it is decided anew")
        return metrics

    def stands() -> bool:
        now = store.pointer(config.pointer)
        return now is not None and now.to.get("evaluate") == evaluate.key

    stored = store.find(identity, {"evaluate": evaluate.digest})
    if stored is not None and stored.metrics.get("moved") and not stands():  # the pointers were lost or copied without
        execution = execution.model_copy(update={"refresh": True})
    return conduct(identity, {"evaluate": evaluate}, produce, execution)
