"""Configuration of `evaluate`: is the result better, and how sure are we?"""

from typing import Literal

from pydantic import Field

from tasks.config import Quantization, StepConfig


class EvaluateConfig(StepConfig):
    """Paired comparison on held-out questions, with bootstrap intervals by question."""

    max_questions: int | None = Field(ge=1)
    """Questions of the eval split to answer at most; None: all."""
    samples_per_question: int = Field(ge=1)
    """Answers that each model writes to each question; scores are averaged over them."""
    best_of: int = Field(ge=2)
    """n of SFT + best-of-n by the reward model."""
    max_query_tokens: int = Field(ge=8)
    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(1.0, gt=0)
    """The same for every model."""
    bootstrap_samples: int = Field(10_000, ge=100)
    confidence: float = Field(0.95, gt=0.5, lt=1)
    shown_samples: int = Field(12, ge=0)
    """Questions with all their answers side by side in the report."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    quantization: Quantization = "none"
    """Of every model here: the one that `reward` and `ppo` were trained on."""
    seed: int = 1
