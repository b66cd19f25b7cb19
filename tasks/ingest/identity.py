"""What a dump is, apart from where it lies: the part of ingest's key that its config cannot hold."""

from pathlib import Path

from tasks.artifacts import file_digest
from tasks.ingest import fetch, sources
from tasks.ingest.config import IngestConfig
from tasks.progress import Progress


def digest(config: IngestConfig, progress: Progress | None = None) -> dict[str, str]:
    """{"<site>: <file>": sha256} of each file that will be read: dumps, evaluation sets and the card of the previous artifact.

    Nothing of the simulated site, whose config says all.

    A dump that is elsewhere is fetched into the cache first, because only its content says what it is; `progress` is told so
    (without one: whoever listens to ingest in this process). From then on the digest that was recorded is taken, as long as
    nothing touches the file. ValueError where a dump is absent or cannot be opened, so that planning a run already says so.
    """
    known = {}
    # The scheduler does without what these load.
    if config.evaluation_sets:
        from tasks.ingest import contamination

        known = contamination.digests(config.evaluation_sets)
    if config.previous is not None:
        from tasks.ingest import changes

        changes.check(Path(config.previous))
        known["previous artifact"] = file_digest(Path(config.previous) / "card.json")
    if not config.dump:
        need_a_source(config)
        return known
    sites = sources.find(
        config.dump,
        config.site,
        site_names=config.site_names,
        archive=config.archive,
        progress=progress or Progress("ingest"),
    )
    return known | {f"{site.name}: {file.name}": _digest(file) for site in sites for file in site.files}


def _digest(file: sources.File) -> str:
    path = Path(file.path).expanduser()
    return sources.digest(file) or fetch.digest(path) or file_digest(path)  # the last one: once per process and state of the file


def need_a_source(config: IngestConfig) -> None:
    if not config.dump and config.simulate is None:
        raise ValueError("ingest has nothing to read: give a StackExchange dump with --dump, or set ingest.simulate")
