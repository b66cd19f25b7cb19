"""One frozen base, sft's merged model, carries all the models of PPO as adapters (row 1), and the passes over a rollout."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tasks.compute import Compute, pass_tokens
from tasks.distributed import gather, load_frozen, mine, rounds
from tasks.models import adapter_parameters, add_lora, checkpoint_gradients, load_lora, load_tokenizer, pad_right, use
from tasks.optim import fast_matmul
from tasks.packing import best_fit
from tasks.ppo.config import PPOConfig
from tasks.ppo.forward import read_policy, response_hidden, stack
from tasks.prompts import encode_query
from tasks.reward.model import RewardModel, ScoreHead, load_reward
from tasks.rollout import Rollout, generate_shared


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
    def shared(self) -> bool:
        """Whether the critic is a head on the policy's trunk: one pass serves both."""
        return self.config.value == "policy_trunk"

    def policy_parameters(self) -> list[nn.Parameter]:
        return adapter_parameters(self.model, "policy")

    def value_parameters(self) -> list[nn.Parameter]:
        return [*([] if self.shared else adapter_parameters(self.model, "value")), *self.value_head.parameters()]

    def micro_batches(self, rollout: Rollout, rows: Sequence[int]) -> list[list[int]]:
        """The rows in groups that fit one forward pass, as few as there can be: packed rows have no padding to save."""
        lengths = [len(rollout.queries[i]) + len(rollout.responses[i]) for i in rows]
        groups = best_fit(lengths, max([self.micro_batch_tokens, *lengths]))
        return [[rows[k] for k in group] for group in groups]


def load(config: PPOConfig, sft: Path, reward: Path, device: torch.device, compute: Compute) -> PPO:
    """One base, its adapters, and the critic's head, which begins as the reward model's in units of normalised scores (row 14)."""
    tokenizer = load_tokenizer(sft / "model")
    base = load_frozen(sft / "model", config.dtype, device, config.quantization)
    probe = pad_right([encode_query(tokenizer, "How is a probe made, and what of?", 32)], tokenizer.pad_token_id, device)
    with torch.no_grad():
        base_logits = base(input_ids=probe[0], attention_mask=probe[1]).logits.float()
    model = add_lora(base, config.lora, "policy", config.seed)
    reward_model = load_reward(model, reward, "reward")
    judge = load_reward(model, reward / "judge", "judge")
    for scorer in (reward_model, judge):
        scorer.micro_batch_tokens = pass_tokens(compute, device)
    if config.value == "adapter":
        model = load_lora(model, reward / "adapter", "value", trainable=True)
    value_head = copy.deepcopy(reward_model.head).requires_grad_(True)
    with torch.no_grad():
        value_head.weight /= reward_model.std
        value_head.bias.copy_((value_head.bias - reward_model.mean) / reward_model.std)
    model.eval()  # row 2: no dropout, and it stays so
    if compute.gradient_checkpointing:
        checkpoint_gradients(model)
    return PPO(config, model, tokenizer, reward_model, judge, value_head, device, pass_tokens(compute, device), probe, base_logits)


def sample_responses(ppo: PPO, queries: list[list[int]], seed: int) -> Rollout:
    """A response to each query from the policy, by whichever engine is configured; the queries are cut among the ranks."""
    config = ppo.config
    how: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "seed": seed,
        "device": ppo.device,
    }
    with use(ppo.model, "policy"):
        if config.engine == "vllm":
            from tasks import rollout_vllm

            return rollout_vllm.generate_shared(ppo.model, ppo.tokenizer, queries, **how)
        return generate_shared(ppo.model, ppo.tokenizer, queries, value_head=ppo.value_head if ppo.shared else None, **how)


@torch.no_grad()
def pass_over(
    ppo: PPO, rollout: Rollout, width: int, adapter: str | None, read: Callable[[Tensor, list[list[int]]], Sequence[Tensor]]
) -> tuple[Tensor, ...]:
    """One packed pass over the rollout with an adapter (None: all off), cut among the ranks.

    read(hidden (N, D), responses) -> numbers of the response tokens, (N,) each; here they become (B, width) each, 0 outside.
    """
    n = len(rollout.queries)
    share = mine(range(n))
    groups = ppo.micro_batches(rollout, share)
    found: dict[int, Tensor] = {}
    with use(ppo.model, adapter), fast_matmul(ppo.model):
        for k in range(rounds(len(groups))):
            rows = groups[k] if k < len(groups) else [0]  # under fsdp, where another rank has more: a pass for nothing
            queries, responses = [rollout.queries[i] for i in rows], [rollout.responses[i] for i in rows]
            numbers = torch.stack(list(read(response_hidden(ppo.model, queries, responses, ppo.device), responses)), dim=1)
            if k < len(groups):
                found |= zip(rows, numbers.cpu().split([len(r) for r in responses]))
    return stack(gather([found[i] for i in share], n), width, ppo.device).unbind(-1)


def reference_pass(ppo: PPO, rollout: Rollout, width: int) -> Tensor:
    """Log-probabilities under the reference, which is the policy's adapter left out; (B, width)."""

    def read(hidden: Tensor, responses: list[list[int]]) -> tuple[Tensor]:
        return (read_policy(ppo.model, hidden, responses, ppo.config.temperature, entropy=False)[0],)

    return pass_over(ppo, rollout, width, None, read)[0]


def policy_pass(ppo: PPO, rollout: Rollout, width: int) -> tuple[Tensor, ...]:
    """Log-probabilities and entropies, and values where the critic shares the policy's trunk; (B, width) each."""

    def read(hidden: Tensor, responses: list[list[int]]) -> tuple[Tensor, ...]:
        numbers = read_policy(ppo.model, hidden, responses, ppo.config.temperature)
        return (*numbers, ppo.value_head(hidden)[:, 0]) if ppo.shared else numbers

    return pass_over(ppo, rollout, width, "policy", read)


def policy_numbers(ppo: PPO, rollout: Rollout, width: int, sampled: bool) -> tuple[Tensor, ...]:
    """What `policy_pass` gives, or, where `sampled` says so, what the sampler computed anyway when it drew the tokens."""
    if not sampled:
        return policy_pass(ppo, rollout, width)
    kept = [rollout.logprobs, rollout.entropies, *([rollout.values] if rollout.values is not None else [])]
    return tuple(stack(rows, width, ppo.device) for rows in kept)


def value_pass(ppo: PPO, rollout: Rollout, width: int) -> Tensor:
    """Values of the critic that has an adapter of its own; (B, width)."""
    return pass_over(ppo, rollout, width, "value", lambda hidden, _: (ppo.value_head(hidden)[:, 0],))[0]


def forward_rollout(ppo: PPO, rollout: Rollout, width: int, sampled: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies, reference log-probabilities and values of a rollout; (B, width) each, 0 outside responses.

    `sampled`: what the sampler computed when it drew the tokens is taken from it, instead of from one more pass.
    """
    policy = policy_numbers(ppo, rollout, width, sampled)
    values = policy[2] if ppo.shared else value_pass(ppo, rollout, width)
    return policy[0], policy[1], reference_pass(ppo, rollout, width), values


def score(ppo: PPO, scorer: RewardModel, rollout: Rollout) -> Tensor:
    """Raw scores of the responses by reward model or judge, cut among the ranks; (B,)."""
    with fast_matmul(ppo.model):
        return scorer.shared_scores(rollout.queries, rollout.responses)
