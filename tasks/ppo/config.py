"""Configuration of `ppo`: proximal policy optimization against the reward model."""

from typing import Literal

from pydantic import Field, model_validator

from tasks.config import Quantization, StepConfig
from tasks.sft.config import LoRAConfig


class GuardConfig(StepConfig):
    """Limits that are watched while PPO runs; an alarm raises the KL coefficient, then rolls back, then stops."""

    max_kl: float = Field(30.0, gt=0)
    """Ceiling of objective/kl, nats per response."""
    min_kl: float = -1.0
    """A mean KL below this means that sampling and scoring disagree."""
    min_entropy: float = Field(0.05, ge=0)
    """Floor of the mean entropy per token, nats."""
    min_eos_rate: float = Field(0.2, ge=0, le=1)
    """Share of responses that end by themselves, at least."""
    max_length_ratio: float = Field(2.5, gt=1)
    """Mean response length against that of the first rollout, in either direction."""
    max_repetition: float = Field(0.5, gt=0, le=1)
    """Share of 4-grams in a response that repeat an earlier one."""
    max_fence_increase: float = Field(0.3, gt=0, le=1)
    """Rise in the share of responses with a code fence (StackLLaMA's policy learned to write "```")."""
    patience: int = Field(3, ge=1)
    """Evaluations in a row with a higher reward and a lower judge score before the alarm."""


class PPOConfig(StepConfig):
    """PPO against the reward model, with a KL penalty to the frozen reference. Row numbers: the table of docs/recipe.md."""

    steps: int = Field(ge=1)
    """PPO iterations: one rollout and its optimization."""
    batch_size: int = Field(ge=1)
    """Queries per rollout."""
    minibatch_size: int = Field(ge=1)
    """Responses per optimizer step."""
    max_query_tokens: int = Field(ge=8)
    max_new_tokens: int = Field(ge=1)
    """Longest response, tokens."""
    value_warmup_steps: int = Field(ge=0)
    """First iterations that train the critic alone (row 14)."""
    eval_every: int = Field(ge=1)
    """Iterations between two scores on held-out queries."""
    eval_queries: int = Field(ge=1)
    """Held-out queries of the rl split, never trained on."""

    lora: LoRAConfig = LoRAConfig(r=16, alpha=32, dropout=0.0)
    """The policy's adapter; dropout must be 0 (row 2)."""
    value: Literal["adapter", "policy_trunk"] = "adapter"
    """The critic: an adapter of its own, begun from the reward adapter, or a head on the policy's trunk (row 1)."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling, and of every log-probability (rows 3 and 4)."""
    missing_eos_penalty: float = Field(1.0, ge=0)
    """Taken from the score of a response that never ended (row 5)."""
    score_clip: float = Field(5.0, gt=0)
    """Scores are centred, scaled, then clipped to +- this (row 7)."""
    kl_coef: float = Field(0.05, ge=0)
    """Initial weight of the KL penalty (N+; StackLLaMA used 0.2) (row 8)."""
    kl_target: float | None = Field(6.0, gt=0)
    """Nats per response that the controller steers to; None keeps kl_coef fixed (row 8)."""
    kl_horizon: int = Field(10_000, ge=1)
    """Episodes (row 8)."""
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    """Row 10."""
    whiten_advantages: bool = True
    """Over the whole rollout batch (row 11)."""
    cliprange: float = Field(0.2, gt=0)
    """Row 12."""
    cliprange_value: float = Field(0.2, gt=0)
    vf_coef: float = Field(0.1, ge=0)
    """Row 13."""
    learning_rate: float = Field(1.4e-5, gt=0)
    """Adam, linear to 0 (row 15)."""
    value_learning_rate: float | None = Field(None, gt=0)
    """Of the critic; None: learning_rate."""
    adam_eps: float = Field(1e-5, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)
    epochs: int = Field(4, ge=1)
    """Passes over a rollout (row 16)."""
    target_kl: float = Field(0.1, gt=0)
    """The passes stop when the mean KL between new and old policy exceeds 1.5 times this (row 16)."""
    max_ratio: float = Field(10.0, gt=1)
    """A minibatch whose mean ratio exceeds this is skipped (row 16)."""
    guard: GuardConfig = GuardConfig()
    engine: Literal["own", "vllm"] = "own"
    """What samples the rollouts: our own loop, or vLLM (extra `vllm`, a CUDA device)."""
    importance_cap: float = Field(2.0, ge=1)
    """Of another engine's tokens: each counts p / p_engine times, at most so often (`losses.importance`)."""
    old_logprobs: Literal["auto", "rollout", "forward"] = "auto"
    """Old log-probabilities (and, with policy_trunk, values): the sampler's own, or of one more forward pass; auto: the
    sampler's, where those of the first rollout are the forward pass's to 1e-5."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    quantization: Quantization = "none"
    """Of the frozen base that all the models share."""
    seed: int = 1

    @model_validator(mode="after")
    def _consistent(self) -> "PPOConfig":
        if self.lora.dropout != 0:
            raise ValueError(f"ppo.lora.dropout must be 0, not {self.lora.dropout}: otherwise the ratio is not 1 at step 0")
        if self.batch_size % self.minibatch_size:
            raise ValueError(f"ppo.batch_size ({self.batch_size}) must be a multiple of ppo.minibatch_size ({self.minibatch_size})")
        if self.value_warmup_steps >= self.steps:
            raise ValueError(f"ppo.value_warmup_steps ({self.value_warmup_steps}) must be below ppo.steps ({self.steps})")
        if self.engine != "own" and self.old_logprobs == "rollout":
            raise ValueError(f"ppo.old_logprobs=rollout, but ppo.engine={self.engine} computes otherwise than the update: use auto")
        return self
