"""Configuration of `promote`: which pointer may move."""

from pydantic import Field

from tasks.config import StepConfig


class PromoteConfig(StepConfig):
    """The champion pointer moves only on the verdict *better*."""

    pointer: str = Field("champion", pattern=r"^[a-z0-9][a-z0-9._-]*$")
    """Name of the pointer in the store."""
