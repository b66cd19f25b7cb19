"""The Prefect side of `evaluate`."""

from typing import Any

from prefect.client.schemas.objects import State

from tasks.artifacts import Artifact, Identity, Pointer, Store
from tasks.champion import HEARD, input_keys
from tasks.champion import inputs as champion_inputs
from tasks.distributed import launch
from tasks.evaluate.config import EvaluateConfig
from tasks.task import Execution, Work, conduct, step_task

VERSION = 3


def identify(
    config: EvaluateConfig, *, base: str, sft: str, reward: str, ppo: str, ingest: str, champion: Pointer | None
) -> Identity:
    inputs = {"base": base, "sft": sft, "reward": reward, "ppo": ppo, "ingest": ingest, **input_keys(champion)}
    return Identity(step="evaluate", version=VERSION, config=config.identity(), inputs=inputs)


@step_task("evaluate")
def evaluate(
    config: EvaluateConfig,
    execution: Execution,
    *,
    base: Artifact,
    sft: Artifact,
    reward: Artifact,
    ppo: Artifact,
    ingest: Artifact,
    champion: Pointer | None = None,
) -> State[Artifact]:
    """Everybody answers the same held-out questions, the champion too; a verdict follows."""
    inputs = {"base": base, "sft": sft, "reward": reward, "ppo": ppo, "ingest": ingest}
    identity = identify(config, **{name: artifact.key for name, artifact in inputs.items()}, champion=champion)
    inputs |= champion_inputs(Store(execution.store), champion)

    def produce(work: Work) -> dict[str, Any]:
        from tasks.evaluate.evaluate import evaluate

        return launch(
            evaluate,
            execution.compute,
            config=config,
            base=work.inputs["base"],
            sft=work.inputs["sft"],
            reward=work.inputs["reward"],
            ppo=work.inputs["ppo"],
            data=work.inputs["ingest"],
            champion={step: work.inputs[f"champion_{step}"] for step in HEARD} if champion else None,
            out=work.out,
            compute=execution.compute,
            progress=work.progress,
        )

    return conduct(identity, inputs, produce, execution, shared=True)
