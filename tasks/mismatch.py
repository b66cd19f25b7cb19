"""How far a sampler's log-probabilities are from the trainer's, for the tokens that it sampled.

A fast engine computes in other kernels and other precision than the update. Its tokens are then drawn from a policy that is near
the trained one but not the same, and PPO is silently off-policy: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
Off-Policy RL Training" (https://fengyao.notion.site/off-policy-rl). What is done about it is tasks.ppo.losses.importance.
"""

import torch
from torch import Tensor


def mismatch(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> dict[str, float]:
    """Of the same tokens by trainer and sampler; (B, T) x 3, mask True on response tokens. ValueError where one is not finite.

    Mean and max of |log p - log p_sampler|, and the effective sample size (sum w)^2 / (n sum w^2) of the weights w = p / p_sampler
    of all n tokens, as a share of n: 1 where the two agree.
    """
    difference = (logprobs.double() - sampler_logprobs.double())[mask]
    if not difference.isfinite().all():
        raise ValueError(
            f"{int((~difference.isfinite()).sum())} of {len(difference)} sampled tokens have no finite log-probability: "
            "trainer and sampler do not hold the same model"
        )
    weights = torch.exp(difference - difference.max())  # scaled: the same share, and no overflow
    return {
        "sampling/mean_difference": float(difference.abs().mean()),
        "sampling/max_difference": float(difference.abs().max()),
        "sampling/ess": float(weights.sum() ** 2 / (len(weights) * weights.square().sum())),
    }
