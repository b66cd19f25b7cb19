"""One frozen base, sft's merged model, carries all the models of PPO as adapters (row 1)."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.models import add_lora, load_lora, load_model, load_tokenizer, pad_right, use
from tasks.ppo.config import PPOConfig
from tasks.ppo.forward import policy_forward, response_hidden, value_forward
from tasks.prompts import encode_query
from tasks.reward.model import RewardModel, ScoreHead, load_reward, similar_lengths
from tasks.rollout import Rollout


@dataclass
class PPO:
    """The models, all on one base, and how to run them."""

    config: PPOConfig
    model: Any
    tokenizer: Any
    reward: RewardModel
    judge: RewardModel
    value_head: ScoreHead
    device: torch.device
    micro_batch_tokens: int
    probe: tuple[Tensor, Tensor]
    """Ids and mask of a fixed text."""
    base_logits: Tensor
    """Of the probe, from the base before it carried any adapter."""

    @property
    def value_adapter(self) -> str:
        return "value" if self.config.value == "adapter" else "policy"

    def micro_batches(self, rollout: Rollout, rows: list[int]) -> list[list[int]]:
        """The rows in groups that fit one forward pass."""
        lengths = [len(rollout.queries[i]) + len(rollout.responses[i]) for i in rows]
        return [[rows[k] for k in group] for group in similar_lengths(lengths, self.micro_batch_tokens)]


def load(config: PPOConfig, sft: Path, reward: Path, device: torch.device, micro_batch_tokens: int) -> PPO:
    """One base, its adapters, and the critic's head, which begins as the reward model's in units of normalised scores (row 14)."""
    tokenizer = load_tokenizer(sft / "model")
    base = load_model(sft / "model", config.dtype, device)
    probe = pad_right([encode_query(tokenizer, "How is a probe made, and what of?", 32)], tokenizer.pad_token_id, device)
    with torch.no_grad():
        base_logits = base(input_ids=probe[0], attention_mask=probe[1]).logits.float()
    model = add_lora(base, config.lora, "policy", config.seed)
    reward_model = load_reward(model, reward, "reward")
    judge = load_reward(model, reward / "judge", "judge")
    for scorer in (reward_model, judge):
        scorer.micro_batch_tokens = micro_batch_tokens
    if config.value == "adapter":
        model = load_lora(model, reward / "adapter", "value", trainable=True)
    value_head = copy.deepcopy(reward_model.head).requires_grad_(True)
    with torch.no_grad():
        value_head.weight /= reward_model.std
        value_head.bias.copy_((value_head.bias - reward_model.mean) / reward_model.std)
    model.eval()  # row 2: no dropout, and it stays so
    return PPO(config, model, tokenizer, reward_model, judge, value_head, device, micro_batch_tokens, probe, base_logits)


@torch.no_grad()
def forward_rollout(ppo: PPO, rollout: Rollout, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies, reference log-probabilities and values of a rollout; (B, width) each, 0 outside responses."""
    results: list[tuple[Tensor, ...]] = []
    order: list[int] = []
    for rows in ppo.micro_batches(rollout, list(range(len(rollout.queries)))):
        queries, responses = [rollout.queries[i] for i in rows], [rollout.responses[i] for i in rows]
        at = (ppo.config.temperature, width, ppo.device)
        with use(ppo.model, "policy"):
            hidden = response_hidden(ppo.model, queries, responses, ppo.device)
            logprobs, entropy = policy_forward(ppo.model, queries, responses, *at, hidden=hidden)
        with use(ppo.model, None):
            ref_logprobs, _ = policy_forward(ppo.model, queries, responses, *at)
        with use(ppo.model, ppo.value_adapter):
            shared = hidden if ppo.value_adapter == "policy" else None
            values = value_forward(ppo.model, ppo.value_head, queries, responses, width, ppo.device, hidden=shared)
        results.append((logprobs, entropy, ref_logprobs, values))
        order += rows
    back = torch.tensor(order, device=ppo.device).argsort()
    logprobs, entropy, ref_logprobs, values = (torch.cat(parts)[back] for parts in zip(*results))
    return logprobs, entropy, ref_logprobs, values
