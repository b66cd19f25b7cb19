"""The Prefect side of `sft`."""

from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State

from tasks.artifacts import Artifact, Identity
from tasks.progress import Progress
from tasks.sft.config import SFTConfig
from tasks.task import Execution, conduct, step_task

VERSION = 1


def identify(config: SFTConfig, *, base: str, ingest: str) -> Identity:
    return Identity(step="sft", version=VERSION, config=config.identity(), inputs={"base": base, "ingest": ingest})


@step_task("sft")
def sft(config: SFTConfig, execution: Execution, *, base: Artifact, ingest: Artifact) -> State[Artifact]:
    """Supervised fine-tuning on each question's best answer."""

    def produce(folders: dict[str, Path], out: Path, progress: Progress) -> dict[str, Any]:
        from tasks.sft.train import train

        return train(config, base=folders["base"], data=folders["ingest"], out=out, compute=execution.compute, progress=progress)

    return conduct(identify(config, base=base.key, ingest=ingest.key), {"base": base, "ingest": ingest}, produce, execution)
