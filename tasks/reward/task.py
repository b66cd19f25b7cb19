"""The Prefect side of `reward`."""

from typing import Any

from prefect.client.schemas.objects import State

from tasks.artifacts import Artifact, Identity
from tasks.distributed import launch
from tasks.reward.config import RewardConfig
from tasks.task import Execution, Work, conduct, step_task

VERSION = 2


def identify(config: RewardConfig, *, sft: str, ingest: str) -> Identity:
    return Identity(step="reward", version=VERSION, config=config.identity(), inputs={"sft": sft, "ingest": ingest})


@step_task("reward")
def reward(config: RewardConfig, execution: Execution, *, sft: Artifact, ingest: Artifact) -> State[Artifact]:
    """The reward model, and the judge, which watches PPO and never rewards it."""

    def produce(work: Work) -> dict[str, Any]:
        from tasks.reward.train import train

        return launch(
            train,
            execution.compute,
            config=config,
            sft=work.inputs["sft"],
            data=work.inputs["ingest"],
            out=work.out,
            compute=execution.compute,
            progress=work.progress,
            checkpoints=work.checkpoints,
        )

    identity = identify(config, sft=sft.key, ingest=ingest.key)
    return conduct(identity, {"sft": sft, "ingest": ingest}, produce, execution, shared=True, resumable=True)
