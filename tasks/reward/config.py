"""Configuration of `reward`: a model of which answer people prefer."""

from typing import Literal

from pydantic import Field

from tasks.config import StepConfig
from tasks.sft.config import LoRAConfig


class RewardConfig(StepConfig):
    """Bradley-Terry reward model, all pairs of a question in one batch element; and the judge, its independent twin."""

    questions_per_step: int = Field(ge=1)
    """Questions, with all their pairs, per optimizer step."""
    max_length: int = Field(ge=16)
    """Tokens of query and response together (StackLLaMA: 512); longer responses are cut."""
    max_query_tokens: int = Field(ge=8)
    """Tokens; longer questions lose their end."""
    epochs: int = Field(1, ge=1)
    """More than one overfits (InstructGPT 3.5)."""
    max_questions: int | None = Field(None, ge=1)
    """Questions to train on at most; None: the whole split."""
    max_eval_questions: int | None = Field(None, ge=1)
    """Questions of the eval split to measure accuracy on at most."""
    lora: LoRAConfig = LoRAConfig(r=8, alpha=32, dropout=0.1)
    learning_rate: float = Field(2e-5, gt=0)
    """Peak, linear to 0 (StackLLaMA)."""
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    centering: float = Field(0.01, ge=0)
    """Weight of (r_j + r_k)^2, which keeps scores near 0 (https://arxiv.org/abs/2312.09244)."""
    gap_margin: float = Field(0.0, ge=0)
    """Margin in the loss per unit of score_gap; 0: plain Bradley-Terry."""
    judge_split: Literal["rl", "sft"] = "rl"
    """The judge learns from the votes of this split, which the reward model never sees."""
    score_samples: int = Field(256, ge=8)
    """SFT samples from which the score's mean and scale are taken."""
    max_new_tokens: int = Field(ge=1)
    """Length of those samples, tokens."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Bits of the frozen base's weights (bitsandbytes); adapters and head stay in fp32. PPO needs the same."""
    seed: int = 1
    """The judge uses seed + 1."""
