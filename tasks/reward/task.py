"""The Prefect side of `reward`."""

from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State

from tasks.artifacts import Artifact, Identity
from tasks.progress import Progress
from tasks.reward.config import RewardConfig
from tasks.task import Execution, conduct, step_task

VERSION = 1


def identify(config: RewardConfig, *, sft: str, ingest: str) -> Identity:
    return Identity(step="reward", version=VERSION, config=config.identity(), inputs={"sft": sft, "ingest": ingest})


@step_task("reward")
def reward(config: RewardConfig, execution: Execution, *, sft: Artifact, ingest: Artifact) -> State[Artifact]:
    """The reward model, and the judge, which watches PPO and never rewards it."""

    def produce(folders: dict[str, Path], out: Path, progress: Progress) -> dict[str, Any]:
        from tasks.reward.train import train

        return train(config, sft=folders["sft"], data=folders["ingest"], out=out, compute=execution.compute, progress=progress)

    return conduct(identify(config, sft=sft.key, ingest=ingest.key), {"sft": sft, "ingest": ingest}, produce, execution)
