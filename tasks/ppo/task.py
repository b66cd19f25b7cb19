"""The Prefect side of `ppo`."""

from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State

from tasks.artifacts import Artifact, Identity
from tasks.ppo.config import PPOConfig
from tasks.progress import Progress
from tasks.task import Execution, conduct, step_task

VERSION = 1


def identify(config: PPOConfig, *, sft: str, reward: str, ingest: str) -> Identity:
    return Identity(step="ppo", version=VERSION, config=config.identity(), inputs={"sft": sft, "reward": reward, "ingest": ingest})


@step_task("ppo")
def ppo(config: PPOConfig, execution: Execution, *, sft: Artifact, reward: Artifact, ingest: Artifact) -> State[Artifact]:
    """Proximal policy optimization against the reward model."""

    def produce(folders: dict[str, Path], out: Path, progress: Progress) -> dict[str, Any]:
        from tasks.ppo.train import train

        return train(
            config,
            sft=folders["sft"],
            reward=folders["reward"],
            data=folders["ingest"],
            out=out,
            compute=execution.compute,
            progress=progress,
        )

    identity = identify(config, sft=sft.key, reward=reward.key, ingest=ingest.key)
    return conduct(identity, {"sft": sft, "reward": reward, "ingest": ingest}, produce, execution)
