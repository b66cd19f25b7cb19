"""The pairwise loss of the reward model, in fp32. Scores may come in any dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(r_j - r_k - margin), the negative log-likelihood that j is preferred to k; (P,), (P,) -> (P,).

    InstructGPT eq. 1 (https://arxiv.org/abs/2203.02155); the margin is Llama 2's (https://arxiv.org/abs/2307.09288, eq. 2).
    """
    return -F.logsigmoid(chosen.float() - rejected.float() - margin)


def centring(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(r_j + r_k)^2, which pins down the constant that preferences leave free; (P,), (P,) -> (P,).

    Eisenstein et al. 2023 (https://arxiv.org/abs/2312.09244, eq. 2).
    """
    return (chosen.float() + rejected.float()).square()


def pair_weights(question: Tensor) -> Tensor:
    """1 / #pairs of the question that a pair belongs to; (P,) question numbers -> (P,).

    A question counts once, however many pairs it has (InstructGPT section 3.5).
    """
    return 1.0 / torch.bincount(question)[question].float()


def reward_loss(scores: Tensor, pairs: Tensor, question: Tensor, margin: Tensor | float = 0.0, centering: float = 0.0) -> Tensor:
    """Sum over questions of the mean loss of their pairs; (N,) scores, (P, 2) indices (j, k) into them, (P,) -> ().

    A sum, so that the sums of micro-batches of whole questions add up to that of the batch.
    """
    chosen, rejected = scores[pairs[:, 0]], scores[pairs[:, 1]]
    loss = bradley_terry(chosen, rejected, margin) + centering * centring(chosen, rejected)
    return (pair_weights(question) * loss).sum()
