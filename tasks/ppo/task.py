"""The Prefect side of `ppo`."""

from typing import Any

from prefect.client.schemas.objects import State

from tasks.artifacts import Artifact, Identity
from tasks.distributed import launch
from tasks.ppo.config import PPOConfig
from tasks.task import Execution, Work, conduct, step_task

VERSION = 2


def identify(config: PPOConfig, *, sft: str, reward: str, ingest: str) -> Identity:
    return Identity(step="ppo", version=VERSION, config=config.identity(), inputs={"sft": sft, "reward": reward, "ingest": ingest})


@step_task("ppo")
def ppo(config: PPOConfig, execution: Execution, *, sft: Artifact, reward: Artifact, ingest: Artifact) -> State[Artifact]:
    """Proximal policy optimization against the reward model."""

    def produce(work: Work) -> dict[str, Any]:
        from tasks.ppo.train import train

        return launch(
            train,
            execution.compute,
            config=config,
            sft=work.inputs["sft"],
            reward=work.inputs["reward"],
            data=work.inputs["ingest"],
            out=work.out,
            compute=execution.compute,
            progress=work.progress,
            checkpoints=work.checkpoints,
        )

    identity = identify(config, sft=sft.key, reward=reward.key, ingest=ingest.key)
    return conduct(identity, {"sft": sft, "reward": reward, "ingest": ingest}, produce, execution, shared=True, resumable=True)
