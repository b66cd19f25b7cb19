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

    LOCATIONS: ClassVar[frozenset[str]] = frozenset({"dump"})

    dump: tuple[str, ...] = ()
    """Dumps to read: .7z, .xml, .xml.gz, .xml.zst or a folder. Empty: the simulated site."""
    site: str | None = None
    """Name of the site, such as beer.stackexchange.com; by default taken from the dump's file name."""
    simulate: SimulatedSiteConfig | None = None
    """The simulated site to write and read when no dump is given."""
    converter: Literal["stackexchange", "markdownify"] = "stackexchange"
    """HTML to Markdown: ours, written for this HTML, or markdownify with the options of the original data set."""
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
