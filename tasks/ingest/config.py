"""Configuration of `ingest`: from dumps, or a simulated site, to questions and pairs in Parquet."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from tasks.config import StepConfig


class SimulatedSiteConfig(StepConfig):
    """A site whose truth is known: votes are drawn from a known utility of the text."""

    questions: int = Field(ge=1)
    """Questions to write."""
    seed: int = 1
    """Seed of the whole site: the same seed gives the same bytes."""
    oddities: bool = False
    """Also write what real dumps hold: unsorted rows, tag wikis, invalid references, missing parents, deleted authors."""


class IngestConfig(StepConfig):
    """From StackExchange dumps to questions, preference pairs and splits."""

    LOCATIONS: ClassVar[frozenset[str]] = frozenset({"dump", "archive", "site_names", "evaluation_sets", "previous"})

    dump: tuple[str, ...] = ()
    """Dumps to read: .7z, .xml, .xml.gz, .xml.zst, folders and globs of them, local, s3:// or https://; or a site's bare name,
    such as coffee.stackexchange.com, which is fetched from `archive`. Empty: the simulated site."""
    archive: str = "https://archive.org/download/stackexchange/{site}.7z"
    """Where the dump of a bare site name is fetched from, once; {site} stands for the name."""
    site: str | None = None
    """Name of the site, such as beer.stackexchange.com; by default taken from the dump's file name."""
    site_names: dict[str, str] = {}
    """With several dumps: file name or path of a dump -> name of its site, where its file name does not say it."""
    simulate: SimulatedSiteConfig | None = None
    """The simulated site to write and read when no dump is given."""
    converter: Literal["stackexchange", "markdownify"] = "stackexchange"
    """HTML to Markdown: ours, written for this HTML, or markdownify with the options of the original data set."""
    questions: Literal["answered", "paired"] = "answered"
    """Keep every question with an answer, or only those with a pair, as the original data set did (and half as much to convert)."""
    weights: dict[str, float] = {}
    """Mixing weights: site -> share of its questions that is kept, above 0 and at most 1; 1 for sites that are not named.
    Which ones are kept is drawn by hash, so a larger weight keeps all that a smaller one did."""
    near_duplicates: float | None = Field(None, gt=0, lt=1)
    """Of questions whose texts have at least this Jaccard similarity (5-word shingles, estimated by MinHash), keep only the one
    with most votes; none of them is dropped when this is not given."""
    evaluation_sets: tuple[str, ...] = ()
    """Files (.parquet, .jsonl, .txt) with texts of benchmarks: what shares 13 words in a row with them is marked `contaminated`."""
    previous: str | None = None
    """Folder of an older ingest artifact of the same sites: the data card then says what changed since."""
    max_pairs: int = Field(10, ge=1)
    """Pairs drawn per question at most (StackLLaMA: 10)."""
    splits: dict[Literal["sft", "reward", "rl", "eval"], float] = {"sft": 0.3, "reward": 0.3, "rl": 0.3, "eval": 0.1}
    """Share of the questions in each split; a question is in exactly one."""
    max_quarantine: float = Field(0.001, ge=0, le=1)
    """Share of rows that may be unreadable before the step fails."""
    allow_incomplete: bool = False
    """Go on with a dump that was cut in the middle (what was read before the cut is kept and reported)."""

    @model_validator(mode="after")
    def _shares_add_up(self) -> "IngestConfig":
        total = sum(self.splits.values())
        if abs(total - 1) > 1e-9 or set(self.splits) != {"sft", "reward", "rl", "eval"} or min(self.splits.values()) <= 0:
            raise ValueError(f"splits must give sft, reward, rl and eval shares above 0 that add up to 1, not {self.splits}")
        return self
