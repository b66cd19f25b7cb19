"""What a dump is, apart from where it lies: the part of ingest's key that its config cannot hold."""

import hashlib

from tasks.ingest import sources
from tasks.ingest.config import IngestConfig


def digest(config: IngestConfig) -> dict[str, str]:
    """Names and contents of the dump's files; {} for the simulated site, whose config says all.

    ValueError where a dump is absent or cannot be opened, so that planning a run already says so.
    """
    if not config.dump:
        need_a_source(config)
        return {}
    whole = hashlib.sha256()
    found = sources.find(config.dump, config.site)
    for site in found:
        for file in sorted(site.files, key=lambda f: f.name):
            content = hashlib.sha256()
            with sources.open_file(file.path) as stream:
                while chunk := stream.read(sources.CHUNK):
                    content.update(chunk)
            whole.update(f"{site.name}\0{file.name}\0{','.join(sorted(file.tables))}\0{content.hexdigest()}\n".encode())
    return {"dump": whole.hexdigest(), "site": ",".join(site.name for site in found)}


def need_a_source(config: IngestConfig) -> None:
    if not config.dump and config.simulate is None:
        raise ValueError("ingest has nothing to read: give a StackExchange dump with --dump, or set ingest.simulate")
