"""The Prefect side of `ingest`."""

import hashlib
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State

from tasks.artifacts import Artifact, Identity, file_digest
from tasks.ingest.config import IngestConfig
from tasks.progress import Progress
from tasks.task import Execution, conduct, step_task

VERSION = 1


def external(config: IngestConfig) -> dict[str, str]:
    """The content of each file that will be read, under its site and name. Where it lies does not matter."""
    if not config.dump:
        return {}
    from tasks.ingest.sources import find

    return {f"{site.name}: {file.name}": _digest(file.path) for site in find(config.dump, config.site) for file in site.files}


def _digest(path: str) -> str:
    if "://" not in path:
        return file_digest(Path(path))
    from tasks.ingest.sources import open_file

    digest = hashlib.sha256()
    with open_file(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def identify(config: IngestConfig) -> Identity:
    return Identity(step="ingest", version=VERSION, config=config.identity(), external=external(config))


@step_task("ingest")
def ingest(config: IngestConfig, execution: Execution) -> State[Artifact]:
    """From StackExchange dumps, or a simulated site, to questions, pairs and splits."""

    def produce(_: dict[str, Path], out: Path, progress: Progress) -> dict[str, Any]:
        from tasks.ingest.ingest import ingest

        return ingest(config, out=out, compute=execution.compute, progress=progress)

    return conduct(identify(config), {}, produce, execution, external=lambda: external(config))
