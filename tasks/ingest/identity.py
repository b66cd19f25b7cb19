"""What a dump is, apart from where it lies: the part of ingest's key that its config cannot hold."""

import hashlib
from pathlib import Path

from tasks.artifacts import file_digest
from tasks.ingest import sources
from tasks.ingest.config import IngestConfig


def digest(config: IngestConfig) -> dict[str, str]:
    """{"<site>: <file>": sha256} of each file that will be read; {} for the simulated site, whose config says all.

    ValueError where a dump is absent or cannot be opened, so that planning a run already says so.
    """
    if not config.dump:
        need_a_source(config)
        return {}
    sites = sources.find(config.dump, config.site)
    return {f"{site.name}: {file.name}": _digest(file.path) for site in sites for file in site.files}


def _digest(path: str) -> str:
    if "://" not in path:
        return file_digest(Path(path))  # once per process and state of the file
    content = hashlib.sha256()
    with sources.open_file(path) as stream:
        while chunk := stream.read(sources.CHUNK):
            content.update(chunk)
    return content.hexdigest()


def need_a_source(config: IngestConfig) -> None:
    if not config.dump and config.simulate is None:
        raise ValueError("ingest has nothing to read: give a StackExchange dump with --dump, or set ingest.simulate")
