"""The Prefect side of `ingest`."""

from typing import Any

from prefect.client.schemas.objects import State

from tasks.artifacts import Artifact, Identity
from tasks.ingest.config import IngestConfig
from tasks.ingest.identity import digest
from tasks.task import Execution, Work, conduct, step_task

VERSION = 2


def identify(config: IngestConfig) -> Identity:
    return Identity(step="ingest", version=VERSION, config=config.identity(), external=digest(config))


@step_task("ingest")
def ingest(config: IngestConfig, execution: Execution) -> State[Artifact]:
    """From StackExchange dumps, or a simulated site, to questions, pairs and splits."""

    def produce(work: Work) -> dict[str, Any]:
        from tasks.ingest.ingest import ingest

        # Beside the attempt, which a kill leaves to be removed: its scratch files are for the next one.
        kept = work.out.parents[1] / f"{identity.key}.scratch"
        return ingest(config, out=work.out, compute=execution.compute, progress=work.progress, kept=kept)

    identity = identify(config)
    return conduct(identity, {}, produce, execution, external=lambda: digest(config))
