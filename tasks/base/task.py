"""The Prefect side of `base`."""

from typing import Any

from prefect.client.schemas.objects import State

from tasks.artifacts import Artifact, Identity
from tasks.base.config import BaseModelConfig
from tasks.base.identity import digest
from tasks.distributed import launch
from tasks.task import Execution, Work, conduct, step_task

VERSION = 1


def identify(config: BaseModelConfig, *, ingest: str | None) -> Identity:
    """`ingest` is an input of a model trained from scratch, and of no other."""
    inputs = {"ingest": ingest} if config.source == "scratch" and ingest else {}
    return Identity(step="base", version=VERSION, config=config.identity(), inputs=inputs, external=digest(config))


@step_task("base")
def base(config: BaseModelConfig, execution: Execution, *, ingest: Artifact) -> State[Artifact]:
    """The language model that everything starts from."""
    trains = config.source == "scratch"
    inputs = {"ingest": ingest} if trains else {}

    def produce(work: Work) -> dict[str, Any]:
        from tasks.base.build import build

        if not trains:
            return build(config, data=None, out=work.out, compute=execution.compute, progress=work.progress)
        return launch(
            build,
            execution.compute,
            config=config,
            data=work.inputs["ingest"],
            out=work.out,
            compute=execution.compute,
            progress=work.progress,
            checkpoints=work.checkpoints,
        )

    identity = identify(config, ingest=ingest.key)
    return conduct(identity, inputs, produce, execution, lambda: digest(config), shared=trains, resumable=trains)
