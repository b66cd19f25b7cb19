"""The losses of PPO (Schulman et al. 2017, https://arxiv.org/abs/1707.06347), means over real tokens only (rows 12, 13, 18)."""

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the True tokens; (B, T), (B, T) -> ()."""
    return (x * mask).sum() / mask.sum()


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped surrogate, (B, T) x 4 -> (), and the share of tokens where the clip decides (), and the mean ratio ().

    mean of max(-A ratio, -A clip(ratio, 1 - c, 1 + c)),  ratio = exp(logprobs - old_logprobs)   (eq. 7, with the sign of a loss)
    `weights` (B, T) says how much each token counts: `importance` of tokens that another engine sampled.
    """
    ratio = torch.exp((logprobs - old_logprobs) * mask)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    worse = torch.maximum(plain, clipped)
    loss = masked_mean(worse if weights is None else worse * weights, mask)
    return loss, masked_mean((clipped > plain).float(), mask), masked_mean(ratio.detach(), mask)


def importance(logprobs: Tensor, engine_logprobs: Tensor, cap: float) -> Tensor:
    """min(p / p_engine, cap): makes tokens drawn by an engine's p_engine stand for tokens drawn by p; any shape.

    Truncated importance sampling (Ionides 2008, https://doi.org/10.1198/106186008X320456).
    """
    return (logprobs - engine_logprobs).exp().clamp(max=cap)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange_value: float) -> tuple[Tensor, Tensor]:
    """Clipped squared error, (B, T) x 4 -> (), and the share of tokens where the clip decides ().

    mean of 0.5 max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2)
    (https://huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo, P-10)
    """
    clipped_values = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    plain, clipped = (values - returns).square(), (clipped_values - returns).square()
    return 0.5 * masked_mean(torch.maximum(plain, clipped), mask), masked_mean((clipped > plain).float(), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - var(returns - values) / var(returns) over the True tokens; 0 where the returns do not vary."""
    v, r = values[mask.bool()], returns[mask.bool()]
    variance = r.var(correction=0)
    return float(1 - (r - v).var(correction=0) / variance) if variance > 0 else 0.0
