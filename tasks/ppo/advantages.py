"""Generalized advantage estimation and whitening (rows 10 and 11 of the recipe)."""

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalized advantage estimation, backwards in time; (B, T), (B, T), (B, T) -> (B, T), 0 outside the mask.

    A_t = delta_t + gamma * lam * A_{t+1},  delta_t = r_t + gamma * V_{t+1} - V_t,  V_T = A_T = 0
    (Schulman et al. 2015, https://arxiv.org/abs/1506.02438). mask is True on response tokens, which begin in column 0.
    """
    rewards, values = rewards * mask, values * mask  # V after the last token is 0, whatever the critic says about padding
    advantages = torch.zeros_like(rewards)
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        next_value = values[:, t]
        advantages[:, t] = advantage
    return advantages * mask


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the True tokens of the whole batch, 0 elsewhere; (B, T), (B, T) -> (B, T).

    Give it the whole rollout batch: whitened inside a minibatch of one, an answer's mean advantage is 0 and its score can neither
    raise nor lower it (what StackLLaMA's trainer did).
    """
    n = mask.sum()
    mean = (x * mask).sum() / n
    var = ((x - mean).square() * mask).sum() / n
    return (x - mean) * torch.rsqrt(var + 1e-8) * mask
