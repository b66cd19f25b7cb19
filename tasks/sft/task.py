"""The Prefect side of `sft`."""

from typing import Any

from prefect.client.schemas.objects import State

from tasks.artifacts import Artifact, Identity
from tasks.distributed import launch
from tasks.sft.config import SFTConfig
from tasks.task import Execution, Work, conduct, step_task

VERSION = 2


def identify(config: SFTConfig, *, base: str, ingest: str) -> Identity:
    return Identity(step="sft", version=VERSION, config=config.identity(), inputs={"base": base, "ingest": ingest})


@step_task("sft")
def sft(config: SFTConfig, execution: Execution, *, base: Artifact, ingest: Artifact) -> State[Artifact]:
    """Supervised fine-tuning on each question's best answer."""

    def produce(work: Work) -> dict[str, Any]:
        from tasks.sft.train import train

        return launch(
            train,
            execution.compute,
            config=config,
            base=work.inputs["base"],
            data=work.inputs["ingest"],
            out=work.out,
            compute=execution.compute,
            progress=work.progress,
            checkpoints=work.checkpoints,
        )

    identity = identify(config, base=base.key, ingest=ingest.key)
    return conduct(identity, {"base": base, "ingest": ingest}, produce, execution, shared=True, resumable=True)
