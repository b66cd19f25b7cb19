"""From the reward model's scores, one per response, to rewards, one per token (rows 5, 6, 7)."""

import torch
from torch import Tensor


def normalise_scores(scores: Tensor, mean: float, std: float, clip: float) -> Tensor:
    """Centred and scaled by the numbers stored with the reward model, then clipped to +- clip; (B,) -> (B,)."""
    return ((scores - mean) / std).clamp(-clip, clip)


def penalise_missing_eos(scores: Tensor, finished: Tensor, penalty: float) -> Tensor:
    """Scores less the penalty where a response never ended; finished is True where it did; (B,), (B,) -> (B,)."""
    return scores - penalty * (~finished).to(scores.dtype)


def token_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef (log p - log p_ref) on every token, and the score on the last real one; (B,), (B, T) x 3 -> (B, T), 0 outside."""
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, mask.sum(-1).long() - 1] += scores
    return rewards
