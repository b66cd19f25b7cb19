"""What every step's configuration shares: frozen, no unknown keys, and an identity that leaves locations out."""

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

Quantization = Literal["none", "8bit", "4bit"]
"""Of a frozen base's weights (tasks/quantized.py). Here, because a configuration is read where torch is not loaded."""


class StepConfig(BaseModel):
    """Base of every step's configuration; whatever stands in one changes the step's result, and so its key."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    LOCATIONS: ClassVar[frozenset[str]] = frozenset()
    """Fields that say where an input lies. The digest of its content stands in the key instead of them."""

    def identity(self) -> dict[str, Any]:
        """The resolved values as plain JSON, without locations."""
        return self.model_dump(mode="json", exclude=set(self.LOCATIONS))
