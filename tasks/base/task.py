"""The Prefect side of `base`."""

from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State

from tasks.artifacts import Artifact, Identity
from tasks.base.config import BaseModelConfig
from tasks.base.identity import digest
from tasks.progress import Progress
from tasks.task import Execution, conduct, step_task

VERSION = 1


def identify(config: BaseModelConfig, *, ingest: str | None) -> Identity:
    """`ingest` is an input of a model trained from scratch, and of no other."""
    inputs = {"ingest": ingest} if config.source == "scratch" and ingest else {}
    return Identity(step="base", version=VERSION, config=config.identity(), inputs=inputs, external=digest(config))


@step_task("base")
def base(config: BaseModelConfig, execution: Execution, *, ingest: Artifact) -> State[Artifact]:
    """The language model that everything starts from."""
    inputs = {"ingest": ingest} if config.source == "scratch" else {}

    def produce(folders: dict[str, Path], out: Path, progress: Progress) -> dict[str, Any]:
        from tasks.base.build import build

        data = folders.get("ingest") or Path(ingest.uri)
        return build(config, data=data, out=out, compute=execution.compute, progress=progress)

    return conduct(identify(config, ingest=ingest.key), inputs, produce, execution, external=lambda: digest(config))
