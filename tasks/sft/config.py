"""Configuration of `sft`: supervised fine-tuning on each question's best answer."""

from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.config import Quantization, StepConfig


class LoRAConfig(StepConfig):
    """Low-rank adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685) on every linear layer of the trunk."""

    r: int = Field(16, ge=1)
    """Rank (StackLLaMA: 16 for SFT and PPO, 8 for the reward model)."""
    alpha: float = Field(32, gt=0)
    """The update is scaled by alpha / r (StackLLaMA: 32)."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Of the adapters' inputs while they train. Masks are drawn pass by pass, so above 0 the result depends, within the noise that
    dropout is, on compute.micro_batch_tokens and the number of processes, which are in no key; at 0 it does not."""


class SFTConfig(StepConfig):
    """Language modelling on answers, packed, with attention inside each document."""

    steps: int = Field(ge=1)
    """Optimizer steps (StackLLaMA: 5,000)."""
    batch_size: int = Field(ge=1)
    """Packed sequences per optimizer step (StackLLaMA: 128)."""
    seq_length: int = Field(ge=16)
    """Tokens of a packed sequence (StackLLaMA: 1,024)."""
    max_query_tokens: int = Field(ge=8)
    """Longer questions lose their end; longer answers than what then remains of seq_length are cut (and lose their EOS)."""
    tuning: Literal["lora", "full", "prompt"] = "lora"
    """LoRA; all weights; or a soft prompt in front of every query (Lester et al. 2021, https://arxiv.org/abs/2104.08691)."""
    lora: LoRAConfig = LoRAConfig()
    prompt_tokens: int = Field(20, ge=1)
    """Length of the soft prompt, part of max_query_tokens (the paper: 20 is near the best, 100 the best). It wants a high
    learning rate (the paper: 0.3)."""
    learning_rate: float = Field(1e-5, gt=0)
    """Peak (StackLLaMA); linear warm-up, then cosine to 0."""
    warmup_steps: int = Field(100, ge=0)
    """StackLLaMA: 100."""
    weight_decay: float = Field(0.05, ge=0)
    """StackLLaMA."""
    loss_on: Literal["answer", "all"] = "answer"
    """Tokens that carry loss; StackLLaMA trained on all."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    quantization: Quantization = "none"
    """Of the frozen base while it is tuned (StackLLaMA: 8bit). What is stored is merged into the base as it was."""
    seed: int = 1

    @model_validator(mode="after")
    def _rounded_weights_stay_frozen(self) -> Self:
        if self.tuning == "full" and self.quantization != "none":
            raise ValueError(
                f"sft.tuning=full trains the weights that sft.quantization={self.quantization} rounds: "
                "use sft.tuning=lora, or sft.quantization=none"
            )
        return self
